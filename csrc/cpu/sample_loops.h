// The loops that sample_blocks.h declares, for Acc (for_each_accumulator.h).

namespace dlogp {

template <>
DLOGP_CLONED Finiteness block_maxima(int64_t count, const Acc* z, Acc* maxima) {
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

template <>
DLOGP_CLONED Acc least_finite(int64_t count, const Acc* z) {
  constexpr Acc infinity = std::numeric_limits<Acc>::infinity();
  Acc least = infinity;
#pragma omp simd reduction(min : least)
  for (int64_t i = 0; i < count; ++i) {
    const Acc value = z[i] == kMaskedLogit<Acc> ? infinity : z[i];
    least = value < least ? value : least;
  }
  return least;
}

template <>
DLOGP_CLONED int64_t copy_within(int64_t count, const Acc* values, Acc low, Acc top, Acc* to) {
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

template <>
DLOGP_CLONED int64_t places_from(int64_t count, const Acc* s, Acc cut, int64_t most, uint8_t* places) {
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

template <>
DLOGP_CLONED void extrapolate_row(int64_t count, Acc gamma, Acc least, const Acc* from, const Acc* base_z, Acc* z) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) z[i] = extrapolated(from[i], base_z[i], gamma, least);
}

template <>
DLOGP_CLONED void divide_row(int64_t count, Acc divisor, const Acc* from, Acc* z) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) z[i] = from[i] / divisor;
}

template <>
DLOGP_CLONED void divide_scores(int64_t count, Acc divisor, Acc* s) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    s[i] = s[i] == kMaskedLogit<Acc> ? kMaskedLogit<Acc> : above_masked(s[i] / divisor);
}

template <>
DLOGP_CLONED bool extrapolated_scores(int64_t count, Acc gamma, const Acc* z, const Acc* base_z, Acc* s) {
  int32_t unlikely = 0;
#pragma omp simd reduction(+ : unlikely)
  for (int64_t i = 0; i < count; ++i) {
    const Acc value = above_masked((1 + gamma) * z[i] - gamma * base_z[i]);
    s[i] = (z[i] == kMaskedLogit<Acc>) | (base_z[i] == kMaskedLogit<Acc>) ? kMaskedLogit<Acc> : value;
    unlikely += base_z[i] == kMaskedLogit<Acc> ? 1 : 0;
  }
  return unlikely != 0;
}

template <>
DLOGP_CLONED void unlikely_scores(int64_t count, Acc gamma, const Acc* z, const Acc* base_z, Acc* s) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Acc value = above_masked((1 + gamma) * z[i]);
    s[i] = (z[i] == kMaskedLogit<Acc>) | (base_z[i] != kMaskedLogit<Acc>) ? kMaskedLogit<Acc> : value;
  }
}

// A score ≥ best needs −log(1 − u) ≤ e^{s − best}, hence u ≤ e^{s − best}, hence log2 u ≤ (s − best)·log2 e. The bits
// of a float, read as an integer, are a lower bound of its log2 that is off by 0.086 at most: no logarithm is needed.
template <>
DLOGP_CLONED bool may_win(int64_t count, const Acc* s, const uint32_t* bits, Acc cut, double best) {
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

template <>
DLOGP_CLONED void bucket_masses(const Buckets<Acc>& buckets, int64_t count, const Acc* s, int32_t* index, Acc* mass) {
  const Acc top = buckets.top, per_unit = buckets.per_unit, centre = buckets.centre, last = Acc(buckets.last);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Acc place = (top - s[i]) * per_unit;
    index[i] = int32_t(place < last ? place : last);
    mass[i] = exp_of(s[i] - centre);
  }
}

}  // namespace dlogp
