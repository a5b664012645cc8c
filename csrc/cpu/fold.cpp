#include "fold.h"

#include <cstring>
#include <limits>

#include "vector_math.h"

namespace dlogp {
namespace {

template <typename Acc>
DLOGP_INLINE Acc largest(int64_t count, const Acc* z) {
  Acc max = kMaskedLogit<Acc>;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < count; ++i) max = z[i] > max ? z[i] : max;
  return max;
}

// Moves a state's maximum up to `max`, if that is larger; returns whether it is.
template <typename Acc>
bool raise(SoftmaxState<Acc>& state, Acc max) {
  const bool is_new = max > state.max;
  if (is_new) rebase(state, max);
  return is_new;
}

// One after another, for tiles with −inf, +inf or NaN; the vectorised sums of such a tile are not finite.
template <typename Acc>
void fold_special(int64_t count, const Acc* z, SoftmaxState<Acc>& state) {
  for (int64_t i = 0; i < count; ++i) {
    if (z[i] == kMaskedLogit<Acc>) continue;
    const bool is_new = raise(state, z[i]);
    const double d = double(z[i]) - double(state.max);  // of a new maximum 0, or NaN for +inf
    const double e = std::exp(d);
    state.rest += is_new ? d : e;
    state.weighted += e * d;
  }
}

template <typename Acc>
void fold_special(int64_t count, const Acc* z, const Acc* base_z, PairState<Acc>& state) {
  for (int64_t i = 0; i < count; ++i) {
    const bool possible = z[i] != kMaskedLogit<Acc>, base_possible = base_z[i] != kMaskedLogit<Acc>;
    move_cross(state, larger(z[i], state.model.max), larger(base_z[i], state.base.max));
    const bool is_new = raise(state.model, z[i]), base_is_new = raise(state.base, base_z[i]);
    const double d = double(z[i]) - double(state.model.max), base_d = double(base_z[i]) - double(state.base.max);
    const double e = std::exp(d), base_e = std::exp(base_d);
    if (possible) {
      state.model.rest += is_new ? d : e;
      state.model.weighted += e * d;
    }
    if (base_possible) {
      state.base.rest += base_is_new ? base_d : base_e;
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

// How far above a state's maximum a tile's may lie, so that most tiles are read once, not first for their maximum, and
// the state's need not follow each time. The old maximum is a good part of the rest about the new one, so that `settle`
// may take the new one's 1 from the sum.
constexpr int kSlack = 2;

// The sums of a tile about `max`. Either all its tokens are in `sum`, and `largest` may exceed `max` by kSlack; or it
// does not, and tokens with z = max are counted apart, in `maxima`.
enum class Maxima { kSummed, kApart };

template <typename Acc>
struct TileSums {
  Acc max, largest, sum, weighted, maxima;

  bool is_far_above(const SoftmaxState<Acc>& state) const { return state.empty() || largest > state.max + kSlack; }

  // To a state about `max`.
  void add_summed(SoftmaxState<Acc>& state) const {
    state.rest += sum;
    state.weighted += weighted;
    // A branch: the sum of the next tile does not wait for a choice.
    if (largest > state.largest) [[unlikely]]
      state.largest = largest;
  }
  // To a state about `max` or less.
  void add_apart(SoftmaxState<Acc>& state) const {
    const bool is_new = raise(state, max);
    state.rest += double(sum) + double(maxima - Acc(is_new));
    state.weighted += weighted;
  }
};

template <Maxima place, bool with_weighted, typename Acc>
DLOGP_INLINE TileSums<Acc> sum_tile(int64_t count, const Acc* z, Acc max) {
  constexpr bool apart = place == Maxima::kApart;
  Acc largest = kMaskedLogit<Acc>, sum = 0, weighted = 0, maxima = 0;
#pragma omp simd reduction(max : largest) reduction(+ : sum, weighted, maxima)
  for (int64_t i = 0; i < count; ++i) {
    const Acc d = z[i] - max;
    const Acc e = exp_of(d);
    if constexpr (!apart) largest = z[i] > largest ? z[i] : largest;
    if constexpr (apart) maxima += d == 0 ? Acc(1) : Acc(0);
    sum += apart && d == 0 ? Acc(0) : e;
    if constexpr (with_weighted) weighted += e * d;
  }
  return {max, largest, sum, weighted, maxima};
}

template <bool with_weighted, typename Acc>
DLOGP_INLINE void fold_body(int64_t count, const Acc* z, SoftmaxState<Acc>& state) {
  TileSums<Acc> tile = {};
  if (state.empty())
    tile.largest = largest(count, z);
  else
    tile = sum_tile<Maxima::kSummed, with_weighted>(count, z, state.max);
  const bool apart = tile.is_far_above(state);
  if (apart) tile = sum_tile<Maxima::kApart, with_weighted>(count, z, tile.largest);
  if (!std::isfinite(tile.sum + tile.weighted)) return fold_special(count, z, state);
  if (apart) return tile.add_apart(state);
  tile.add_summed(state);
}

template <typename Acc>
struct PairTileSums {
  TileSums<Acc> model, base;
  Acc cross, base_cross;

  bool finite() const { return std::isfinite(model.weighted + base.weighted + cross + base_cross); }
  bool is_far_above(const PairState<Acc>& state) const {
    return model.is_far_above(state.model) || base.is_far_above(state.base);
  }

  void add_summed(PairState<Acc>& state) const {
    model.add_summed(state.model);
    base.add_summed(state.base);
    add_cross(state);
  }
  void add_apart(PairState<Acc>& state) const {
    move_cross(state, model.max, base.max);
    model.add_apart(state.model);
    base.add_apart(state.base);
    add_cross(state);
  }

 private:
  void add_cross(PairState<Acc>& state) const {
    state.cross += cross;
    state.base_cross += base_cross;
  }
};

template <Maxima place, typename Acc>
DLOGP_INLINE PairTileSums<Acc> sum_pair_tile(int64_t count, const Acc* z, const Acc* base_z, Acc max, Acc base_max) {
  constexpr bool apart = place == Maxima::kApart;
  Acc largest = kMaskedLogit<Acc>, sum = 0, weighted = 0, maxima = 0, cross = 0;
  Acc base_largest = largest, base_sum = 0, base_weighted = 0, base_maxima = 0, base_cross = 0;
#pragma omp simd reduction(max : largest, base_largest) \
    reduction(+ : sum, weighted, maxima, cross, base_sum, base_weighted, base_maxima, base_cross)
  for (int64_t i = 0; i < count; ++i) {
    const Acc d = z[i] - max, base_d = base_z[i] - base_max;
    const Acc e = exp_of(d), base_e = exp_of(base_d);
    if constexpr (apart) {
      maxima += d == 0 ? Acc(1) : Acc(0);
      base_maxima += base_d == 0 ? Acc(1) : Acc(0);
    } else {
      largest = z[i] > largest ? z[i] : largest;
      base_largest = base_z[i] > base_largest ? base_z[i] : base_largest;
    }
    sum += apart && d == 0 ? Acc(0) : e;
    weighted += e * d;
    cross += e * (d - base_d);
    base_sum += apart && base_d == 0 ? Acc(0) : base_e;
    base_weighted += base_e * base_d;
    base_cross += base_e * (base_d - d);
  }
  return {{max, largest, sum, weighted, maxima},
          {base_max, base_largest, base_sum, base_weighted, base_maxima},
          cross,
          base_cross};
}

// A log-probability below this has p = 0 in float32; the bound keeps 0·(−inf) from being NaN.
template <typename Acc>
DLOGP_INLINE Acc bounded(Acc logp) {
  return logp < Acc(-1e30) ? Acc(-1e30) : logp;
}

}  // namespace

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

#define DLOGP_LOOPS "fold_loops.h"
#include "for_each_accumulator.h"
