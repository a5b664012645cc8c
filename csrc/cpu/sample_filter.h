// Top-k, top-p and min-p without a sort. Each keeps the tokens from some logit on (equal logits fall together), so all
// that is needed is the least logit that is kept.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "../common/online_softmax.h"
#include "../common/sampling.h"
#include "scaled_logits.h"

namespace dlogp {

// Where nothing is cut off: every logit but −inf is kept.
template <typename Acc>
constexpr Acc kKeepAll = std::numeric_limits<Acc>::lowest();

template <typename Acc>
Acc nth_largest(Acc* values, int64_t count, int64_t n) {
  std::nth_element(values, values + (n - 1), values + count, std::greater<Acc>());
  return values[n - 1];
}

// The k-th largest logit, or the least finite one if there are fewer. A bound from below, which rises, keeps the number
// of candidates small: first it is the k-th largest of the blocks' maxima, then that of the candidates so far.
template <typename Acc>
Acc top_k_cut(const ScaledLogits<Acc>& logits, const BlockMaxima<Acc>& maxima, int64_t k,
              std::vector<Acc>& candidates) {
  Acc bound = kKeepAll<Acc>;
  if (logits.blocks() >= k) {
    candidates = maxima.values;
    bound = std::max(bound, nth_largest(candidates.data(), logits.blocks(), k));
  }
  const int64_t most = k + std::max(k, int64_t(4096));
  int64_t count = 0;
  candidates.resize(most + kBlockTokens);
  for_blocks(
      logits, maxima, [&](Acc max) { return max >= bound; },
      [&](int64_t, const Acc* s, int64_t size) {
        count += copy_within(size, s, bound, maxima.largest, candidates.data() + count);
        if (count <= most) return;
        bound = nth_largest(candidates.data(), count, k);
        count = k;
      });
  if (count == 0) return kKeepAll<Acc>;
  if (count < k) return *std::min_element(candidates.begin(), candidates.begin() + count);
  return nth_largest(candidates.data(), count, k);
}

constexpr int32_t kBuckets = 512;
// So many logits of one bucket are sorted; of more, the bucket becomes a histogram of its own.
constexpr int64_t kSorted = 2048;
// Logits within the first range are kept, up to so many; what comes after looks at them alone.
constexpr int64_t kHeld = 32768;

struct Histogram {
  std::array<double, kBuckets> mass{};
  std::array<int64_t, kBuckets> count{};

  double total() const {
    double sum = 0;
    for (double value : mass) sum += value;
    return sum;
  }
};

// The search for the least logit that top-p keeps: the one at which the mass of all larger logits is still below
// `wanted`. Masses are relative to the largest logit, e^{s − max}.
template <typename Acc>
class TopPSearch {
 public:
  TopPSearch(const ScaledLogits<Acc>& logits, const BlockMaxima<Acc>& maxima, std::vector<Acc>& scratch)
      : logits_(logits), maxima_(maxima), scratch_(scratch), top_(maxima.largest) {}

  // Of all logits, with `softmax` their state.
  Acc among_all(const SoftmaxState<Acc>& softmax, double top_p) {
    const double total = softmax.sum() * std::exp(double(softmax.max) - double(top_));
    wanted_ = top_p * total;
    // Even if all V logits lay so far below the largest, they would have less than 1 − p of the mass together: what
    // lies lower is not kept. Seldom is more than one in twenty near that bound, so a higher one is tried first.
    const double reach = std::log(double(logits_.vocabulary()) / ((1 - top_p) * total)) + 1e-3;
    const double likely = reach - std::log(20.0);
    if (likely > 1 && below_top(likely) < top_ && search(below_top(likely))) return cut_;
    restart();
    return search(below_top(reach)) ? cut_ : low_;
  }

  // Of the logits from `low` on.
  Acc among_largest(Acc low, double top_p) {
    wanted_ = -top_p;  // of a total that the first histogram gives
    return search(low) ? cut_ : low_;
  }

 private:
  // e^{−kDeepest} is about the least number of Acc.
  static constexpr double kDeepest = sizeof(Acc) == 4 ? 87 : 700;

  Acc below_top(double reach) const { return Acc(double(top_) - std::clamp(reach, 0.0, kDeepest)); }

  void restart() {
    top_ = maxima_.largest;
    above_ = 0;
    held_ = -1;
  }

  // Finds cut_ among the logits from `low` on; false if their mass is not enough.
  bool search(Acc low) {
    low_ = low;
    // Every turn but the last leaves two different logits at the ends of the range, in different buckets.
    while (low_ < top_) {
      const Buckets<Acc> buckets = {top_, Acc(kBuckets) / (top_ - low_), maxima_.largest, kBuckets - 1};
      if (!std::isfinite(buckets.per_unit)) break;
      const Histogram histogram = histogram_of(buckets);
      if (wanted_ < 0) wanted_ *= -histogram.total();
      const int32_t bucket = crossing(histogram);
      if (bucket == kBuckets) return false;
      if (histogram.count[bucket] <= kSorted) {
        cut_ = cut_within(buckets, bucket);
        return true;
      }
      narrow(buckets, bucket);
    }
    cut_ = low_;
    return true;
  }

  // Calls use(bucket, value, mass) for the logits within [low_, top_].
  template <typename Use>
  void for_buckets(const Buckets<Acc>& buckets, Use use) {
    const auto use_all = [&](const Acc* values, int64_t count) {
      int32_t index[kPiece];
      Acc mass[kPiece];
      for (int64_t begin = 0; begin < count; begin += kPiece) {
        const int64_t size = std::min(kPiece, count - begin);
        bucket_masses(buckets, size, values + begin, index, mass);
        for (int64_t i = 0; i < size; ++i) use(index[i], values[begin + i], mass[i]);
      }
    };
    if (held_ < 0)
      collect(use_all);
    else
      for_held(use_all);
  }

  template <typename Use>
  void collect(Use use_all) {
    if (int64_t(scratch_.size()) < kHeld) scratch_.resize(kHeld);
    Acc* const begin = scratch_.data();
    Acc* end = begin;
    bool dropped = false;
    for_blocks(
        logits_, maxima_, [&](Acc max) { return max >= low_; },
        [&](int64_t, const Acc* s, int64_t size) {
          if (end - begin > kHeld - kBlockTokens) {
            use_all(begin, end - begin);
            end = begin;
            dropped = true;
          }
          end += copy_within(size, s, low_, top_, end);
        });
    use_all(begin, end - begin);
    if (!dropped) held_ = end - begin;
  }

  template <typename Use>
  void for_held(Use use_all) {
    Acc within[kPiece];
    for (int64_t begin = 0; begin < held_; begin += kPiece) {
      const int64_t size = std::min(kPiece, held_ - begin);
      use_all(within, copy_within(size, scratch_.data() + begin, low_, top_, within));
    }
  }

  Histogram histogram_of(const Buckets<Acc>& buckets) {
    Histogram histogram;
    for_buckets(buckets, [&](int32_t index, Acc, Acc mass) {
      histogram.mass[index] += mass;
      ++histogram.count[index];
    });
    return histogram;
  }

  // The bucket in which the mass reaches what is wanted; kBuckets if none. above_ becomes the mass above it.
  int32_t crossing(const Histogram& histogram) {
    int32_t bucket = 0;
    while (bucket < kBuckets && above_ + histogram.mass[bucket] < wanted_) above_ += histogram.mass[bucket++];
    return bucket;
  }

  Acc cut_within(const Buckets<Acc>& buckets, int32_t bucket) {
    std::vector<Acc> values;
    for_buckets(buckets, [&](int32_t index, Acc value, Acc) {
      if (index == bucket) values.push_back(value);
    });
    if (values.empty()) return low_;  // only where logits / T overflowed
    std::sort(values.begin(), values.end(), std::greater<Acc>());
    Acc cut = values.front();
    for (auto value = values.begin(); value != values.end() && above_ < wanted_;) {
      cut = *value;
      for (; value != values.end() && *value == cut; ++value) above_ += std::exp(double(cut) - double(maxima_.largest));
    }
    return cut;
  }

  // The range becomes that of the logits of one bucket.
  void narrow(const Buckets<Acc>& buckets, int32_t bucket) {
    Acc low = top_, top = low_;
    for_buckets(buckets, [&](int32_t index, Acc value, Acc) {
      if (index != bucket) return;
      low = std::min(low, value);
      top = std::max(top, value);
    });
    low_ = low;
    top_ = top;
  }

  const ScaledLogits<Acc>& logits_;
  const BlockMaxima<Acc>& maxima_;
  std::vector<Acc>& scratch_;
  int64_t held_ = -1;  // of the first range, in scratch_; −1: too many, or not looked at yet
  Acc low_ = 0, top_, cut_ = 0;
  double wanted_ = 0, above_ = 0;
};

// The least Acc that is not below `value`.
template <typename Acc>
Acc round_up_to(double value) {
  const Acc rounded = Acc(value);
  return double(rounded) < value ? std::nextafter(rounded, std::numeric_limits<Acc>::infinity()) : rounded;
}

// The least logit / T that top-k, then top-p of what is left, then min-p keep. `softmax` is that of the same logits; it
// is looked at for top-p without top-k only. `scratch` is room for values.
template <typename Acc>
Acc least_kept(const ScaledLogits<Acc>& logits, const BlockMaxima<Acc>& maxima, const Filters& filters,
               const SoftmaxState<Acc>& softmax, std::vector<Acc>& scratch) {
  Acc cut = kKeepAll<Acc>;
  const bool by_rank = filters.limits_rank(logits.vocabulary());
  if (by_rank) cut = top_k_cut(logits, maxima, filters.top_k, scratch);
  if (filters.top_p < 1) {
    TopPSearch<Acc> search(logits, maxima, scratch);
    const Acc top_p_cut = by_rank ? search.among_largest(cut, filters.top_p) : search.among_all(softmax, filters.top_p);
    cut = std::max(cut, top_p_cut);
  }
  if (filters.min_p > 0) cut = std::max(cut, round_up_to<Acc>(double(maxima.largest) + std::log(filters.min_p)));
  return cut;
}

}  // namespace dlogp
