#include "sample_filter.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

namespace dlogp {
namespace {

// Appends to `values` the logits of a block within [low, top].
template <typename Real>
void append_within(const ScaledLogits<Real>& logits, int64_t block, Real low, Real top, std::vector<Real>& values) {
  Real buffer[kBlockTokens];
  const Real* s = logits.block(block, buffer);
  const int64_t size = logits.block_size(block);
  const size_t before = values.size();
  values.resize(before + size);
  Real* end = values.data() + before;
  for (int64_t i = 0; i < size; ++i) {
    *end = s[i];
    end += (s[i] >= low) & (s[i] <= top);
  }
  values.resize(end - values.data());
}

// Calls use(values) with the logits within [low, top], some at a time.
template <typename Real, typename Use>
void for_values_within(const ScaledLogits<Real>& logits, const BlockMaxima<Real>& maxima, Real low, Real top,
                       std::vector<Real>& scratch, Use use) {
  scratch.clear();
  for (int64_t block = 0; block < logits.blocks(); ++block) {
    if (!(maxima.values[block] >= low)) continue;
    append_within(logits, block, low, top, scratch);
    if (int64_t(scratch.size()) > kPiece - kBlockTokens) {
      use(scratch);
      scratch.clear();
    }
  }
  if (!scratch.empty()) use(scratch);
}

template <typename Real>
Real nth_largest(std::vector<Real>& values, int64_t n) {
  std::nth_element(values.begin(), values.begin() + (n - 1), values.end(), std::greater<Real>());
  return values[n - 1];
}

// The k-th largest logit, or the least finite one if there are fewer. A bound from below, which rises, keeps the number
// of candidates small: first it is the k-th largest of the blocks' maxima, then that of the candidates so far.
template <typename Real>
Real top_k_cut(const ScaledLogits<Real>& logits, const BlockMaxima<Real>& maxima, int64_t k,
               std::vector<Real>& candidates) {
  Real bound = kKeepAll<Real>;
  if (logits.blocks() >= k) {
    candidates = maxima.values;
    bound = std::max(bound, nth_largest(candidates, k));
  }
  candidates.clear();
  const int64_t most = k + std::max(k, int64_t(4096));
  for (int64_t block = 0; block < logits.blocks(); ++block) {
    if (!(maxima.values[block] >= bound)) continue;
    append_within(logits, block, bound, maxima.largest, candidates);
    if (int64_t(candidates.size()) <= most) continue;
    bound = nth_largest(candidates, k);
    candidates.resize(k);
  }
  if (candidates.empty()) return kKeepAll<Real>;
  if (int64_t(candidates.size()) < k) return *std::min_element(candidates.begin(), candidates.end());
  return nth_largest(candidates, k);
}

constexpr int32_t kBuckets = 512;
// So many logits of one bucket are sorted; of more, the bucket becomes a histogram of its own.
constexpr int64_t kSorted = 2048;

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
template <typename Real>
class TopPSearch {
 public:
  TopPSearch(const ScaledLogits<Real>& logits, const BlockMaxima<Real>& maxima, std::vector<Real>& scratch)
      : logits_(logits), maxima_(maxima), scratch_(scratch), top_(maxima.largest) {}

  // Of all logits, with `softmax` their state.
  Real among_all(const SoftmaxState<Real>& softmax, double top_p) {
    const double total = softmax.sum * std::exp(double(softmax.max) - double(top_));
    wanted_ = top_p * total;
    // Below this all tokens together have no mass that matters: even if all V lay there they had less than (1 − p).
    const double reach = std::log(double(logits_.vocabulary()) / ((1 - top_p) * total)) + 1e-3;
    low_ = Real(double(top_) - std::clamp(reach, 0.0, kDeepest));
    return search();
  }

  // Of the logits from `low` on.
  Real among_largest(Real low, double top_p) {
    low_ = low;
    wanted_ = -top_p;  // of a total that the first histogram gives
    return search();
  }

 private:
  // e^{−kDeepest} is about the least number of Real.
  static constexpr double kDeepest = sizeof(Real) == 4 ? 87 : 700;

  Real search() {
    // Every turn but the last leaves two different logits at the ends of the range, in different buckets.
    while (low_ < top_) {
      const Buckets<Real> buckets = {top_, Real(kBuckets) / (top_ - low_), maxima_.largest, kBuckets - 1};
      if (!std::isfinite(buckets.per_unit)) break;
      const Histogram histogram = histogram_of(buckets);
      if (wanted_ < 0) wanted_ *= -histogram.total();
      const int32_t bucket = crossing(histogram);
      if (bucket == kBuckets) break;  // by rounding only
      if (histogram.count[bucket] <= kSorted) return cut_within(buckets, bucket);
      narrow(buckets, bucket);
    }
    return low_;
  }

  template <typename Use>
  void for_buckets(const Buckets<Real>& buckets, Use use) {
    for_values_within(logits_, maxima_, low_, top_, scratch_, [&](const std::vector<Real>& values) {
      int32_t index[kPiece];
      Real mass[kPiece];
      const int64_t count = int64_t(values.size());
      bucket_masses(buckets, count, values.data(), index, mass);
      for (int64_t i = 0; i < count; ++i) use(index[i], values[i], mass[i]);
    });
  }

  Histogram histogram_of(const Buckets<Real>& buckets) {
    Histogram histogram;
    for_buckets(buckets, [&](int32_t index, Real, Real mass) {
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

  Real cut_within(const Buckets<Real>& buckets, int32_t bucket) {
    std::vector<Real> values;
    for_buckets(buckets, [&](int32_t index, Real value, Real) {
      if (index == bucket) values.push_back(value);
    });
    if (values.empty()) return low_;  // only where logits / T overflowed
    std::sort(values.begin(), values.end(), std::greater<Real>());
    Real cut = values.front();
    for (auto value = values.begin(); value != values.end() && above_ < wanted_;) {
      cut = *value;
      for (; value != values.end() && *value == cut; ++value) above_ += std::exp(double(cut) - double(maxima_.largest));
    }
    return cut;
  }

  // The range becomes that of the logits of one bucket.
  void narrow(const Buckets<Real>& buckets, int32_t bucket) {
    Real low = top_, top = low_;
    for_buckets(buckets, [&](int32_t index, Real value, Real) {
      if (index != bucket) return;
      low = std::min(low, value);
      top = std::max(top, value);
    });
    low_ = low;
    top_ = top;
  }

  const ScaledLogits<Real>& logits_;
  const BlockMaxima<Real>& maxima_;
  std::vector<Real>& scratch_;
  Real low_ = 0, top_;
  double wanted_ = 0, above_ = 0;
};

// The least Real that is not below `value`.
template <typename Real>
Real round_up_to(double value) {
  const Real rounded = Real(value);
  return double(rounded) < value ? std::nextafter(rounded, std::numeric_limits<Real>::infinity()) : rounded;
}

}  // namespace

template <typename Real>
Real least_kept(const ScaledLogits<Real>& logits, const BlockMaxima<Real>& maxima, const Filters& filters,
                const SoftmaxState<Real>& softmax, std::vector<Real>& scratch) {
  Real cut = kKeepAll<Real>;
  const bool by_rank = filters.limits_rank(logits.vocabulary());
  if (by_rank) cut = top_k_cut(logits, maxima, filters.top_k, scratch);
  if (filters.top_p < 1) {
    TopPSearch<Real> search(logits, maxima, scratch);
    const Real top_p_cut =
        by_rank ? search.among_largest(cut, filters.top_p) : search.among_all(softmax, filters.top_p);
    cut = std::max(cut, top_p_cut);
  }
  if (filters.min_p > 0) cut = std::max(cut, round_up_to<Real>(double(maxima.largest) + std::log(filters.min_p)));
  return cut;
}

#define DLOGP_INSTANTIATE(Real)                                                                       \
  template Real least_kept<Real>(const ScaledLogits<Real>&, const BlockMaxima<Real>&, const Filters&, \
                                 const SoftmaxState<Real>&, std::vector<Real>&);
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
