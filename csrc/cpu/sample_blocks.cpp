#include "sample_blocks.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/sampling.h"
#include "vector_math.h"

namespace dlogp {
namespace {

template <typename Acc>
DLOGP_INLINE Finiteness finiteness_of(int64_t count, const Acc* z) {
  constexpr Acc infinity = std::numeric_limits<Acc>::infinity();
  int32_t special = 0, masked = 0;
#pragma omp simd reduction(+ : special, masked)
  for (int64_t i = 0; i < count; ++i) {
    special += z[i] < infinity ? 0 : 1;
    masked += z[i] == kMaskedLogit<Acc> ? 1 : 0;
  }
  return {special != 0, masked != 0};
}

template <typename Acc>
DLOGP_INLINE Finiteness block_maxima_body(int64_t count, const Acc* z, Acc* maxima) {
  Acc zero = 0;
  for (int64_t begin = 0; begin < count; begin += kBlockTokens) {
    const int64_t size = std::min(kBlockTokens, count - begin);
    const Acc* block = z + begin;
    Acc max = kMaskedLogit<Acc>;
#pragma omp simd reduction(max : max) reduction(+ : zero)
    for (int64_t i = 0; i < size; ++i) {
      max = block[i] > max ? block[i] : max;
      zero += block[i] * 0;  // NaN where a logit is not finite
    }
    *maxima++ = max;
  }
  return zero == 0 ? Finiteness() : finiteness_of(count, z);
}

template <typename Acc>
DLOGP_INLINE Acc least_finite_body(int64_t count, const Acc* z) {
  constexpr Acc infinity = std::numeric_limits<Acc>::infinity();
  Acc least = infinity;
#pragma omp simd reduction(min : least)
  for (int64_t i = 0; i < count; ++i) {
    const Acc value = z[i] == kMaskedLogit<Acc> ? infinity : z[i];
    least = value < least ? value : least;
  }
  return least;
}

// Calls use(place) where `inside` is 1, in order; most runs of eight have none.
template <typename Use>
DLOGP_INLINE void for_inside(const uint8_t (&inside)[kBlockTokens], Use use) {
  for (int64_t i = 0; i < kBlockTokens; i += 8) {
    uint64_t eight = 0;
    for (int j = 0; j < 8; ++j) eight |= uint64_t(inside[i + j]) << 8 * j;
    for (; eight != 0; eight &= eight - 1) use(i + std::countr_zero(eight) / 8);
  }
}

template <typename Acc>
DLOGP_INLINE int64_t copy_within_body(int64_t count, const Acc* values, Acc low, Acc top, Acc* to) {
  const Acc* const first = to;
  for (int64_t begin = 0; begin < count; begin += kBlockTokens) {
    const int64_t size = std::min(kBlockTokens, count - begin);
    const Acc* block = values + begin;
    uint8_t inside[kBlockTokens] = {};
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) inside[i] = uint8_t((block[i] >= low) & (block[i] <= top));
    for_inside(inside, [&](int64_t place) { *to++ = block[place]; });
  }
  return to - first;
}

template <typename Acc>
DLOGP_INLINE int64_t places_from_body(int64_t count, const Acc* s, Acc cut, int64_t most, uint8_t* places) {
  uint8_t inside[kBlockTokens] = {};
  int32_t kept = 0;
#pragma omp simd reduction(+ : kept)
  for (int64_t i = 0; i < count; ++i) {
    inside[i] = uint8_t(s[i] >= cut);
    kept += s[i] >= cut ? 1 : 0;
  }
  if (kept <= most) for_inside(inside, [&](int64_t place) { *places++ = uint8_t(place); });
  return kept;
}

template <typename Acc>
DLOGP_INLINE void extrapolate_body(int64_t count, Acc gamma, Acc least, const Acc* from, const Acc* base_z, Acc* z) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) z[i] = extrapolated(from[i], base_z[i], gamma, least);
}

template <typename Acc>
DLOGP_INLINE void divide_body(int64_t count, Acc divisor, const Acc* from, Acc* z) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) z[i] = from[i] / divisor;
}

// A possible token keeps a score that can win, however far its logit overflowed.
template <typename Acc>
DLOGP_INLINE Acc above_masked(Acc score) {
  constexpr Acc lowest = std::numeric_limits<Acc>::lowest();
  return score > lowest ? score : lowest;
}

template <typename Acc>
DLOGP_INLINE void divide_scores_body(int64_t count, Acc divisor, Acc* s) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    s[i] = s[i] == kMaskedLogit<Acc> ? kMaskedLogit<Acc> : above_masked(s[i] / divisor);
}

template <typename Acc>
DLOGP_INLINE bool extrapolated_scores_body(int64_t count, Acc gamma, const Acc* z, const Acc* base_z, Acc* s) {
  int32_t unlikely = 0;
#pragma omp simd reduction(+ : unlikely)
  for (int64_t i = 0; i < count; ++i) {
    const Acc value = above_masked((1 + gamma) * z[i] - gamma * base_z[i]);
    s[i] = (z[i] == kMaskedLogit<Acc>) | (base_z[i] == kMaskedLogit<Acc>) ? kMaskedLogit<Acc> : value;
    unlikely += base_z[i] == kMaskedLogit<Acc> ? 1 : 0;
  }
  return unlikely != 0;
}

template <typename Acc>
DLOGP_INLINE void unlikely_scores_body(int64_t count, Acc gamma, const Acc* z, const Acc* base_z, Acc* s) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Acc value = above_masked((1 + gamma) * z[i]);
    s[i] = (z[i] == kMaskedLogit<Acc>) | (base_z[i] != kMaskedLogit<Acc>) ? kMaskedLogit<Acc> : value;
  }
}

// Ten rounds one after the other in the body of the loop over the counters, which the compiler then vectorises.
DLOGP_INLINE void block_noise_body(const NoiseKey& key, int64_t first_token, uint32_t* bits) {
  const uint32_t first = uint32_t(first_token / 4), row_id = key.row_id, step = key.step;
  const uint32_t stream = uint32_t(key.stream), key0 = uint32_t(key.seed), key1 = uint32_t(key.seed >> 32);
  constexpr int counters = kBlockTokens / 4;
  uint32_t words[4][counters];
#pragma omp simd
  for (int c = 0; c < counters; ++c) {
    uint32_t x0 = first + c, x1 = row_id, x2 = step, x3 = stream;
#pragma GCC unroll 10
    for (uint32_t round = 0; round < 10; ++round) {
      const uint32_t high0 = uint32_t((uint64_t(0xD2511F53u) * x0) >> 32), low0 = 0xD2511F53u * x0;
      const uint32_t high1 = uint32_t((uint64_t(0xCD9E8D57u) * x2) >> 32), low1 = 0xCD9E8D57u * x2;
      x0 = high1 ^ x1 ^ (key0 + round * 0x9E3779B9u);
      x2 = high0 ^ x3 ^ (key1 + round * 0xBB67AE85u);
      x1 = low1;
      x3 = low0;
    }
    words[0][c] = x0;
    words[1][c] = x1;
    words[2][c] = x2;
    words[3][c] = x3;
  }
  for (int c = 0; c < counters; ++c)
    for (int lane = 0; lane < 4; ++lane) bits[4 * c + lane] = words[lane][c];
}

// A score ≥ best needs −log(1 − u) ≤ e^{s − best}, hence u ≤ e^{s − best}, hence log2 u ≤ (s − best)·log2 e. The bits
// of a float, read as an integer, are a lower bound of its log2 that is off by 0.086 at most: no logarithm is needed.
template <typename Acc>
DLOGP_INLINE bool may_win_body(int64_t count, const Acc* s, const uint32_t* bits, Acc cut, double best) {
  const Acc centre = Acc(best);
  const Acc slack = Acc(1e-3) + std::fabs(centre) * 4 * std::numeric_limits<Acc>::epsilon();
  int32_t contenders = 0;
#pragma omp simd reduction(+ : contenders)
  for (int64_t i = 0; i < count; ++i) {
    const float half = float(int32_t(bits[i] >> 1));
    int32_t pattern;
    std::memcpy(&pattern, &half, sizeof pattern);
    const float log2_u = float(pattern) * 0x1p-23f - (127 + 31);
    const Acc log2_most = (s[i] - centre) * Acc(1.44269504) + slack;
    contenders += (s[i] >= cut) & (log2_u <= log2_most);
  }
  return contenders != 0;
}

template <typename Acc>
DLOGP_INLINE void bucket_masses_body(const Buckets<Acc>& buckets, int64_t count, const Acc* s, int32_t* index,
                                     Acc* mass) {
  const Acc top = buckets.top, per_unit = buckets.per_unit, centre = buckets.centre, last = Acc(buckets.last);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Acc place = (top - s[i]) * per_unit;
    index[i] = int32_t(place < last ? place : last);
    mass[i] = exp_of(s[i] - centre);
  }
}

}  // namespace

DLOGP_CLONES void block_noise(const NoiseKey& key, int64_t first_token, uint32_t* bits) {
  block_noise_body(key, first_token, bits);
}

#define DLOGP_DEFINE(attribute, Acc)                                                                                  \
  template <>                                                                                                         \
  attribute Finiteness block_maxima(int64_t count, const Acc* z, Acc* maxima) {                                       \
    return block_maxima_body(count, z, maxima);                                                                       \
  }                                                                                                                   \
  template <>                                                                                                         \
  attribute Acc least_finite(int64_t count, const Acc* z) {                                                           \
    return least_finite_body(count, z);                                                                               \
  }                                                                                                                   \
  template <>                                                                                                         \
  attribute int64_t copy_within(int64_t count, const Acc* values, Acc low, Acc top, Acc* to) {                        \
    return copy_within_body(count, values, low, top, to);                                                             \
  }                                                                                                                   \
  template <>                                                                                                         \
  attribute int64_t places_from(int64_t count, const Acc* s, Acc cut, int64_t most, uint8_t* places) {                \
    return places_from_body(count, s, cut, most, places);                                                             \
  }                                                                                                                   \
  template <>                                                                                                         \
  attribute void extrapolate_row(int64_t count, Acc gamma, Acc least, const Acc* from, const Acc* base_z, Acc* z) {   \
    extrapolate_body(count, gamma, least, from, base_z, z);                                                           \
  }                                                                                                                   \
  template <>                                                                                                         \
  attribute void divide_row(int64_t count, Acc divisor, const Acc* from, Acc* z) {                                    \
    divide_body(count, divisor, from, z);                                                                             \
  }                                                                                                                   \
  template <>                                                                                                         \
  attribute void divide_scores(int64_t count, Acc divisor, Acc* s) {                                                  \
    divide_scores_body(count, divisor, s);                                                                            \
  }                                                                                                                   \
  template <>                                                                                                         \
  attribute bool extrapolated_scores(int64_t count, Acc gamma, const Acc* z, const Acc* base_z, Acc* s) {             \
    return extrapolated_scores_body(count, gamma, z, base_z, s);                                                      \
  }                                                                                                                   \
  template <>                                                                                                         \
  attribute void unlikely_scores(int64_t count, Acc gamma, const Acc* z, const Acc* base_z, Acc* s) {                 \
    unlikely_scores_body(count, gamma, z, base_z, s);                                                                 \
  }                                                                                                                   \
  template <>                                                                                                         \
  attribute bool may_win(int64_t count, const Acc* s, const uint32_t* bits, Acc cut, double best) {                   \
    return may_win_body(count, s, bits, cut, best);                                                                   \
  }                                                                                                                   \
  template <>                                                                                                         \
  attribute void bucket_masses(const Buckets<Acc>& buckets, int64_t count, const Acc* s, int32_t* index, Acc* mass) { \
    bucket_masses_body(buckets, count, s, index, mass);                                                               \
  }
DLOGP_FOR_EACH_ACCUMULATOR(DLOGP_DEFINE)
#undef DLOGP_DEFINE

}  // namespace dlogp
