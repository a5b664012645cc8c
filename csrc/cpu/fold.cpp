#include "fold.h"

#include <cstring>
#include <limits>

#include "vector_math.h"

namespace dlogp {
namespace {

template <typename Acc>
DLOGP_INLINE void transform_body(const LogitTransform& transform, int64_t count, const Acc* bias, Acc* z) {
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] += bias[i];
  }
  if (transform.is_identity()) return;
  const Acc output_scale = Acc(transform.output_scale());
  if (!transform.has_softcap()) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] *= output_scale;
    return;
  }
  const Acc tanh_scale = Acc(transform.tanh_scale());
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) z[i] = output_scale * tanh_of(z[i] * tanh_scale);
}

template <typename Acc>
DLOGP_INLINE Acc largest(int64_t count, const Acc* z) {
  Acc max = kMaskedLogit<Acc>;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < count; ++i) max = z[i] > max ? z[i] : max;
  return max;
}

// One after another, for tiles with −inf, +inf or NaN; the vectorised sums of such a tile are not finite.
template <typename Acc>
void fold_special(int64_t count, const Acc* z, SoftmaxState<Acc>& state) {
  for (int64_t i = 0; i < count; ++i) {
    if (z[i] == kMaskedLogit<Acc>) continue;
    if (z[i] > state.max) rebase(state, z[i]);
    const double d = double(z[i]) - double(state.max);
    const double e = std::exp(d);
    state.sum += e;
    state.weighted += e * d;
  }
}

template <typename Acc>
void fold_special(int64_t count, const Acc* z, const Acc* base_z, PairState<Acc>& state) {
  for (int64_t i = 0; i < count; ++i) {
    const bool possible = z[i] != kMaskedLogit<Acc>, base_possible = base_z[i] != kMaskedLogit<Acc>;
    rebase(state, larger(z[i], state.model.max), larger(base_z[i], state.base.max));
    const double d = double(z[i]) - double(state.model.max), base_d = double(base_z[i]) - double(state.base.max);
    const double e = std::exp(d), base_e = std::exp(base_d);
    if (possible) {
      state.model.sum += e;
      state.model.weighted += e * d;
    }
    if (base_possible) {
      state.base.sum += base_e;
      state.base.weighted += base_e * base_d;
    }
    if (possible && base_possible) {
      state.cross += e * (d - base_d);
      state.base_cross += base_e * (base_d - d);
    }
    state.model_unsupported |= possible && !base_possible;
    state.base_unsupported |= base_possible && !possible;
  }
}

// How far above the running maximum a logit may lie before that has to follow; the sums are as exact around
// any nearby value. So a tile is mostly read once, not first for its maximum.
constexpr int kSlack = 2;

template <typename Acc>
struct TileSums {
  Acc largest, sum, weighted;
};

template <bool with_weighted, typename Acc>
DLOGP_INLINE TileSums<Acc> sum_tile(int64_t count, const Acc* z, Acc max) {
  Acc largest = kMaskedLogit<Acc>, sum = 0, weighted = 0;
#pragma omp simd reduction(max : largest) reduction(+ : sum, weighted)
  for (int64_t i = 0; i < count; ++i) {
    const Acc d = z[i] - max;
    const Acc e = exp_of(d);
    largest = z[i] > largest ? z[i] : largest;
    sum += e;
    if constexpr (with_weighted) weighted += e * d;
  }
  return {largest, sum, weighted};
}

template <bool with_weighted, typename Acc>
DLOGP_INLINE void fold_body(int64_t count, const Acc* z, SoftmaxState<Acc>& state) {
  if (state.empty()) rebase(state, largest(count, z));
  TileSums<Acc> tile = sum_tile<with_weighted>(count, z, state.max);
  if (tile.largest > state.max + kSlack) {
    rebase(state, tile.largest);
    tile = sum_tile<with_weighted>(count, z, state.max);
  }
  if (!std::isfinite(tile.sum + tile.weighted)) return fold_special(count, z, state);
  state.sum += tile.sum;
  state.weighted += tile.weighted;
}

template <typename Acc>
struct PairTileSums {
  TileSums<Acc> model, base;
  Acc cross, base_cross;

  bool finite() const { return std::isfinite(model.weighted + base.weighted + cross + base_cross); }
};

template <typename Acc>
DLOGP_INLINE PairTileSums<Acc> sum_pair_tile(int64_t count, const Acc* z, const Acc* base_z, Acc max, Acc base_max) {
  Acc largest = kMaskedLogit<Acc>, base_largest = largest;
  Acc sum = 0, weighted = 0, cross = 0, base_sum = 0, base_weighted = 0, base_cross = 0;
#pragma omp simd reduction(max : largest, base_largest) \
    reduction(+ : sum, weighted, cross, base_sum, base_weighted, base_cross)
  for (int64_t i = 0; i < count; ++i) {
    const Acc d = z[i] - max, base_d = base_z[i] - base_max;
    const Acc e = exp_of(d), base_e = exp_of(base_d);
    largest = z[i] > largest ? z[i] : largest;
    base_largest = base_z[i] > base_largest ? base_z[i] : base_largest;
    sum += e;
    weighted += e * d;
    cross += e * (d - base_d);
    base_sum += base_e;
    base_weighted += base_e * base_d;
    base_cross += base_e * (base_d - d);
  }
  return {{largest, sum, weighted}, {base_largest, base_sum, base_weighted}, cross, base_cross};
}

template <typename Acc>
DLOGP_INLINE void fold_pair_body(int64_t count, const Acc* z, const Acc* base_z, PairState<Acc>& state) {
  if (state.model.empty() || state.base.empty())
    rebase(state, larger(largest(count, z), state.model.max), larger(largest(count, base_z), state.base.max));
  PairTileSums<Acc> tile = sum_pair_tile(count, z, base_z, state.model.max, state.base.max);
  if (tile.model.largest > state.model.max + kSlack || tile.base.largest > state.base.max + kSlack) {
    rebase(state, larger(tile.model.largest, state.model.max), larger(tile.base.largest, state.base.max));
    tile = sum_pair_tile(count, z, base_z, state.model.max, state.base.max);
  }
  if (!tile.finite()) return fold_special(count, z, base_z, state);
  state.model.sum += tile.model.sum;
  state.model.weighted += tile.model.weighted;
  state.cross += tile.cross;
  state.base.sum += tile.base.sum;
  state.base.weighted += tile.base.weighted;
  state.base_cross += tile.base_cross;
}

// A log-probability below this has p = 0 in float32; the bound keeps 0·(−inf) from being NaN.
template <typename Acc>
DLOGP_INLINE Acc bounded(Acc logp) {
  return logp < Acc(-1e30) ? Acc(-1e30) : logp;
}

template <typename Acc>
DLOGP_INLINE void gradient_body(const GradientTerms<Acc>& terms, int64_t count, const Acc* z, Acc* grad) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Acc logp = bounded(z[i] - terms.lse);
    grad[i] = exp_of(logp) * (terms.constant + terms.log_term * logp);
  }
}

template <typename Acc>
DLOGP_INLINE void gradient_pair_body(const GradientTerms<Acc>& terms, int64_t count, const Acc* z, const Acc* other_z,
                                     Acc* grad) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Acc logp = bounded(z[i] - terms.lse), other_logp = bounded(other_z[i] - terms.other_lse);
    const Acc own = terms.constant + terms.log_term * logp + terms.ratio_term * (logp - other_logp);
    grad[i] = exp_of(logp) * own + terms.other_term * exp_of(other_logp);
  }
}

template <typename Acc>
DLOGP_INLINE void softcap_gradient_body(const LogitTransform& transform, int64_t count, const Acc* z, Acc* grad) {
  const Acc to_tanh = Acc(transform.temperature / transform.softcap);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Acc t = z[i] * to_tanh;
    grad[i] *= (Acc(1) - t) * (Acc(1) + t);
  }
}

template <typename Acc>
DLOGP_INLINE void add_body(int64_t count, const Acc* values, Acc* sums) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sums[i] += values[i];
}

}  // namespace

#define DLOGP_DEFINE(attribute, Acc)                                                                             \
  template <>                                                                                                    \
  attribute void transform_row(const LogitTransform& transform, int64_t count, const Acc* bias, Acc* z) {        \
    transform_body(transform, count, bias, z);                                                                   \
  }                                                                                                              \
  template <>                                                                                                    \
  attribute void fold_row(int64_t count, const Acc* z, SoftmaxState<Acc>& state) {                               \
    fold_body<true>(count, z, state);                                                                            \
  }                                                                                                              \
  template <>                                                                                                    \
  attribute void fold_sum(int64_t count, const Acc* z, SoftmaxState<Acc>& state) {                               \
    fold_body<false>(count, z, state);                                                                           \
  }                                                                                                              \
  template <>                                                                                                    \
  attribute void fold_row(int64_t count, const Acc* z, const Acc* base_z, PairState<Acc>& state) {               \
    fold_pair_body(count, z, base_z, state);                                                                     \
  }                                                                                                              \
  template <>                                                                                                    \
  attribute void gradient_row(const GradientTerms<Acc>& terms, int64_t count, const Acc* z, Acc* grad) {         \
    gradient_body(terms, count, z, grad);                                                                        \
  }                                                                                                              \
  template <>                                                                                                    \
  attribute void gradient_row(const GradientTerms<Acc>& terms, int64_t count, const Acc* z, const Acc* other_z,  \
                              Acc* grad) {                                                                       \
    gradient_pair_body(terms, count, z, other_z, grad);                                                          \
  }                                                                                                              \
  template <>                                                                                                    \
  attribute void softcap_gradient_row(const LogitTransform& transform, int64_t count, const Acc* z, Acc* grad) { \
    softcap_gradient_body(transform, count, z, grad);                                                            \
  }                                                                                                              \
  template <>                                                                                                    \
  attribute void add_row(int64_t count, const Acc* values, Acc* sums) {                                          \
    add_body(count, values, sums);                                                                               \
  }
DLOGP_FOR_EACH_ACCUMULATOR(DLOGP_DEFINE)
#undef DLOGP_DEFINE

DLOGP_CLONES void round_row(int64_t count, const float* from, uint16_t* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    to[i] = uint16_t(from[i] != from[i] ? 0x7fc0u : rounded);
  }
}

}  // namespace dlogp
