// The sums of online_softmax.h over one row of a pair, in float32.
//
// A thread adds groups of four tokens about a reference near the largest logit that it has met. Where sums merge, all
// of them move to their largest logit first, so that what follows is plain addition.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../common/online_softmax.h"
#include "cluster.cuh"
#include "logits.cuh"

namespace dlogp {

// e^x, up to two roundings and one of x; 0 below 2⁻¹²⁶.
__device__ inline float fast_exp(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
#else
  return std::exp(x);
#endif
}

struct NoMoments {};
// Besides Σ e^d.
struct Moments {
  float weighted = 0, base_weighted = 0, cross = 0, base_cross = 0;
};

// Sums about max and base_max. Tokens without a finite logit leave no trace but in `unsupported`, a NaN or +inf makes
// the sum NaN.
template <bool kAll>
struct SoftmaxSums : std::conditional_t<kAll, Moments, NoMoments> {
  float max = -FLT_MAX, base_max = -FLT_MAX, sum = 0, base_sum = 0;
  uint32_t unsupported = 0;  // bit 0: a token that only the RL model can draw; bit 1, with kAll: only the base

  // Whether there is something to draw from both, and nothing else than numbers.
  __device__ bool can_draw() const { return sum > 0 && base_sum > 0; }

  __device__ void move(float to, float base_to) {
    const float shift = shift_to(max, to), base_shift = shift_to(base_max, base_to);
    const float factor = fast_exp(shift), base_factor = fast_exp(base_shift);
    if constexpr (kAll) {
      this->cross = factor * (this->cross + (shift - base_shift) * sum);
      this->base_cross = base_factor * (this->base_cross + (base_shift - shift) * base_sum);
      this->weighted = factor * (this->weighted + shift * sum);
      this->base_weighted = base_factor * (this->base_weighted + base_shift * base_sum);
    }
    sum *= factor;
    base_sum *= base_factor;
    max = to;
    base_max = base_to;
  }

  __device__ PairState<float> state() const {
    PairState<float> state;
    state.model.max = max;
    state.model.rest = double(sum) - 1;
    state.base.max = base_max;
    state.base.rest = double(base_sum) - 1;
    if constexpr (kAll) {
      state.model.weighted = this->weighted;
      state.base.weighted = this->base_weighted;
      state.cross = this->cross;
      state.base_cross = this->base_cross;
    }
    state.model_unsupported = (unsupported & 1) != 0;
    state.base_unsupported = (unsupported & 2) != 0;
    return state;
  }

 private:
  // Not −inf, which times a sum of 0 would be NaN.
  __device__ static float shift_to(float from, float to) { return fmaxf(from - to, -1e30f); }
};

// Of states about different maxima.
template <bool kAll>
struct MergeSums {
  using Sums = SoftmaxSums<kAll>;

  template <int kLanes>
  __device__ void prepare(Sums& sums) const {
    float max = sums.max, base_max = sums.base_max;
#pragma unroll
    for (int lane_mask = kLanes / 2; lane_mask > 0; lane_mask /= 2) {
      max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, lane_mask));
      base_max = fmaxf(base_max, __shfl_xor_sync(0xFFFFFFFFu, base_max, lane_mask));
    }
    sums.move(max, base_max);
  }
  __device__ Sums operator()(Sums a, const Sums& b) const {
    a.sum += b.sum;
    a.base_sum += b.base_sum;
    a.unsupported |= b.unsupported;
    if constexpr (kAll) {
      a.weighted += b.weighted;
      a.base_weighted += b.base_weighted;
      a.cross += b.cross;
      a.base_cross += b.base_cross;
    }
    return a;
  }
};

// A thread's own.
template <bool kAll>
class ThreadSums {
 public:
  __device__ void add(const Group& z, const Group& base) {
    const float top = z.largest(), base_top = base.largest();
    // Sums may grow far beyond 1; but Σ e^d·d loses digits when it moves far.
    if (top > sums_.max + kHeadroom || base_top > sums_.base_max + kHeadroom)
      sums_.move(fmaxf(sums_.max, top), fmaxf(sums_.base_max, base_top));
    max_ = fmaxf(max_, top);
    base_max_ = fmaxf(base_max_, base_top);
    float d[kGroupTokens], base_d[kGroupTokens];
#pragma unroll
    for (int j = 0; j < kGroupTokens; ++j) {
      d[j] = z.z[j] - sums_.max;
      base_d[j] = base.z[j] - sums_.base_max;
    }
    const bool possible = !kAll || (d[0] + d[1]) + (d[2] + d[3]) > -INFINITY;
    if (possible && (base_d[0] + base_d[1]) + (base_d[2] + base_d[3]) > -INFINITY) {
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) add_token<true>(d[j], base_d[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) add_token<false>(d[j], base_d[j]);
    }
  }

  // About the largest logits.
  __device__ SoftmaxSums<kAll> sums() {
    sums_.move(max_, base_max_);
    return sums_;
  }

 private:
  static constexpr float kHeadroom = 8;

  template <bool kPossible>
  __device__ void add_token(float d, float base_d) {
    const float e = fast_exp(d), base_e = fast_exp(base_d);
    const bool possible = kPossible || d > -INFINITY, base_possible = kPossible || base_d > -INFINITY;
    sums_.sum += e;
    sums_.base_sum += base_e;
    if constexpr (kAll) {
      if (possible) sums_.weighted += e * d;
      if (base_possible) sums_.base_weighted += base_e * base_d;
      if (possible && base_possible) {
        sums_.cross += e * (d - base_d);
        sums_.base_cross += base_e * (base_d - d);
      }
    }
    if constexpr (!kPossible)
      sums_.unsupported |= uint32_t(possible && !base_possible) | uint32_t(base_possible && !possible) << 1;
  }

  SoftmaxSums<kAll> sums_;
  float max_ = -FLT_MAX, base_max_ = -FLT_MAX;
};

}  // namespace dlogp
