// What becomes of a tile of logits in registers: each thread folds its columns of two rows into softmax states, and at
// the end of a split the four threads of a row merge theirs.
//
// States are those of dlogp_kernels/triton/_math.py, whose kernel merges the splits: x with z = output_scale · x, and
// about the maximum m of x, with d = x − m and the scales as there:
//   rest = Σ e^{s·d} − 1   weighted = Σ e^{s·d}·d   cross = Σ e^{s·d}·u   base_cross = −Σ e^{base_s·base_d}·u
// Here exponents are of 2: `scale` is output_scale · log2 e, and cross terms are in units of log 2 until they are
// stored.
#pragma once

#include "hopper.cuh"

namespace dlogp::hopper {

constexpr float kMasked = -1e25f;   // MASKED_LOGIT
constexpr float kLargeRest = 0.5f;  // LARGE_REST
constexpr float kLn2 = 0.693147180559945f;
constexpr float kLog2e = 1.44269504088896f;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// A thread's columns lie in pairs, 8 apart; of every four elements two are of its upper row, two of its lower one.
__device__ inline int quad_lane() { return int(threadIdx.x) & 3; }
constexpr __host__ __device__ int row_of(int element) { return (element >> 1) & 1; }
constexpr __host__ __device__ int column_of(int element) { return 2 * (element & ~3) + (element & 1); }

struct State {
  float m = kMasked, rest = -1, weighted = 0;
};

struct PairState {
  State model, base;
  float cross = 0, base_cross = 0;
};

// A state's sums about an m that is no smaller.
struct Sums {
  float sum, weighted;
};

__device__ inline Sums about(const State& state, float m, float scale) {
  const float shift = state.m - m, factor = exp2_of(scale * shift), sum = 1 + state.rest;
  return {factor * sum, factor * fmaf(shift, sum, state.weighted)};
}

struct CrossSums {
  float cross, base_cross;
};

__device__ inline CrossSums cross_about(const PairState& state, float m, float base_m, float scale, float base_scale) {
  const float shift = scale * (state.model.m - m), base_shift = base_scale * (state.base.m - base_m);
  const float change = shift - base_shift;
  return {exp2_of(shift) * fmaf(change, 1 + state.model.rest, state.cross),
          exp2_of(base_shift) * fmaf(-change, 1 + state.base.rest, state.base_cross)};
}

// The larger of m and a thread's x of each row.
template <int kCount>
__device__ inline void raise(const float (&x)[kCount], float (&m)[2]) {
  float even[2] = {m[0], m[1]}, odd[2] = {m[0], m[1]};
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    even[row_of(i)] = fmaxf(even[row_of(i)], x[i]);
    odd[row_of(i)] = fmaxf(odd[row_of(i)], x[i + 1]);
  }
  for (int r = 0; r < 2; ++r) m[r] = fmaxf(even[r], odd[r]);
}

// `state.rest` with a tile whose terms about m have the sum `total`. Where the tile brings m, its 1 is among them; for
// a row with a target there, and where rounding to 1 would show, all terms but that are summed once more.
template <int kCount>
__device__ inline float rest_with(const State& state, float m, float before, float total, const float (&x)[kCount],
                                  int row, float scale, bool has_target) {
  if (!(m > state.m)) return state.rest + total;
  const float rest = before + (total - 1);
  if (!has_target || !(rest < kLargeRest)) return rest;
  float others = 0, again = m;
  asm volatile(""
               : "+f"(again));  // or the compiler would keep all terms for this branch, in registers that are not there
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (row_of(i) == row) {
      const float e = exp2_of(scale * (x[i] - again));
      others += e < 1 ? e : 0;
    }
  return before + others;
}

template <int kCount>
__device__ inline void fold(const float (&x)[kCount], float scale, const bool (&has_target)[2], State (&states)[2]) {
  float m[2] = {states[0].m, states[1].m}, total[2] = {}, weighted[2] = {};
  raise(x, m);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int r = row_of(i);
    const float d = x[i] - m[r], e = exp2_of(scale * d);
    total[r] += e;
    weighted[r] = fmaf(e, d, weighted[r]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Sums before = about(states[r], m[r], scale);
    states[r].rest = rest_with(states[r], m[r], before.sum, total[r], x, r, scale, has_target[r]);
    states[r].weighted = before.weighted + weighted[r];
    states[r].m = m[r];
  }
}

template <int kCount>
__device__ inline void fold(const float (&x)[kCount], const float (&base_x)[kCount], float scale, float base_scale,
                            const bool (&has_target)[2], PairState (&states)[2]) {
  float m[2] = {states[0].model.m, states[1].model.m}, base_m[2] = {states[0].base.m, states[1].base.m};
  raise(x, m);
  raise(base_x, base_m);
  float total[2] = {}, weighted[2] = {}, cross[2] = {}, base_total[2] = {}, base_weighted[2] = {}, base_cross[2] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int r = row_of(i);
    const float d = x[i] - m[r], base_d = base_x[i] - base_m[r];
    const float exponent = scale * d, base_exponent = base_scale * base_d, u = exponent - base_exponent;
    const float e = exp2_of(exponent), base_e = exp2_of(base_exponent);
    total[r] += e;
    weighted[r] = fmaf(e, d, weighted[r]);
    cross[r] = fmaf(e, u, cross[r]);
    base_total[r] += base_e;
    base_weighted[r] = fmaf(base_e, base_d, base_weighted[r]);
    base_cross[r] = fmaf(-base_e, u, base_cross[r]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    PairState& state = states[r];
    const CrossSums before = cross_about(state, m[r], base_m[r], scale, base_scale);
    const Sums model = about(state.model, m[r], scale), base = about(state.base, base_m[r], base_scale);
    const float rest = rest_with(state.model, m[r], model.sum, total[r], x, r, scale, has_target[r]);
    const float base_rest =
        rest_with(state.base, base_m[r], base.sum, base_total[r], base_x, r, base_scale, has_target[r]);
    state.cross = before.cross + cross[r];
    state.base_cross = before.base_cross + base_cross[r];
    state.model = {m[r], rest, model.weighted + weighted[r]};
    state.base = {base_m[r], base_rest, base.weighted + base_weighted[r]};
  }
}

__device__ inline State merged(const State& a, const State& b, float scale) {
  const float m = fmaxf(a.m, b.m);
  const Sums of_a = about(a, m, scale), of_b = about(b, m, scale);
  const bool a_has_m = a.m == m, b_has_m = b.m == m;
  const float rest = (a_has_m ? a.rest : of_a.sum) + (b_has_m ? b.rest : of_b.sum) + (a_has_m && b_has_m ? 1 : 0);
  return {m, rest, of_a.weighted + of_b.weighted};
}

__device__ inline State from_lane(const State& state, int mask) {
  return {__shfl_xor_sync(kWholeWarp, state.m, mask), __shfl_xor_sync(kWholeWarp, state.rest, mask),
          __shfl_xor_sync(kWholeWarp, state.weighted, mask)};
}

// One state of the four threads of a row, in each of them.
__device__ inline void merge_quad(State& state, float scale, float) {
  for (int mask = 1; mask <= 2; mask *= 2) state = merged(state, from_lane(state, mask), scale);
}

__device__ inline void merge_quad(PairState& state, float scale, float base_scale) {
  for (int mask = 1; mask <= 2; mask *= 2) {
    const PairState other = {from_lane(state.model, mask), from_lane(state.base, mask),
                             __shfl_xor_sync(kWholeWarp, state.cross, mask),
                             __shfl_xor_sync(kWholeWarp, state.base_cross, mask)};
    const State model = merged(state.model, other.model, scale), base = merged(state.base, other.base, base_scale);
    const CrossSums mine = cross_about(state, model.m, base.m, scale, base_scale);
    const CrossSums theirs = cross_about(other, model.m, base.m, scale, base_scale);
    state = {model, base, mine.cross + theirs.cross, mine.base_cross + theirs.base_cross};
  }
}

__device__ inline void store(float* place, int64_t stride, const State& state) {
  place[0] = state.m;
  place[stride] = state.rest;
  place[2 * stride] = state.weighted;
}

__device__ inline void store(float* place, int64_t stride, const PairState& state) {
  store(place, stride, state.model);
  store(place + 3 * stride, stride, state.base);
  place[6 * stride] = kLn2 * state.cross;
  place[7 * stride] = kLn2 * state.base_cross;
}

// Near 0 too, where 1 − 2 / (e^{2x} + 1) cancels: `tanh` of _math.py.
__device__ inline float tanh_of(float x) {
  const float x2 = x * x, magnitude = fabsf(x);
  const float polynomial = fmaf(x2, fmaf(x2, -0.00570498633f, 0.0206390866f), -0.0537397148f);
  const float near = fmaf(x * x2, fmaf(x2, fmaf(x2, polynomial, 0.133314422f), -0.333332819f), x);
  const float far = copysignf(1 - __fdividef(2, exp2_of(2 * kLog2e * magnitude) + 1), x);
  return magnitude < 0.625f ? near : far;
}

// x of raw products: with the bias, behind the softcap.
template <int kCount>
__device__ inline void transform(const HeadMatrices& head, int column, float (&x)[kCount]) {
  if (head.bias != nullptr) {
    const float* bias = head.bias + column + 2 * quad_lane();
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float2 of_columns = __ldg(reinterpret_cast<const float2*>(bias + column_of(i)));
      x[i] += of_columns.x;
      x[i + 1] += of_columns.y;
      x[i + 2] += of_columns.x;
      x[i + 3] += of_columns.y;
    }
  }
  if (head.tanh_scale != 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = tanh_of(head.tanh_scale * x[i]);
  }
}

// What lies behind the vocabulary's end, in the last tile.
template <int kCount>
__device__ inline void mask_from(int vocabulary, int column, float (&x)[kCount]) {
  if (column + 2 * kCount <= vocabulary) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (column + column_of(i) + 2 * quad_lane() >= vocabulary) x[i] = kMasked;
}

// Whether some column of the thread's is possible for one model alone, which biases alone decide: bit 0 for the model,
// bit 1 for the base.
template <int kCount>
__device__ inline int unsupported(const HeadMatrices& head, const HeadMatrices& base, int vocabulary, int column) {
  int found = 0;
  const auto possible = [](const HeadMatrices& of, int token) {
    return of.bias == nullptr || of.tanh_scale != 0 || of.bias[token] > kMasked;
  };
  for (int i = 0; i < kCount; ++i) {
    const int token = column + column_of(i) + 2 * quad_lane();
    if (row_of(i) != 0 || token >= vocabulary) continue;
    const bool here = possible(head, token), there = possible(base, token);
    found |= (here && !there ? 1 : 0) | (there && !here ? 2 : 0);
  }
  return found;
}

// x at a column of the thread's, counted from its first one.
template <int kCount>
__device__ inline float element_at(const float (&x)[kCount], int row, int column) {
  float found = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (row_of(i) == row && column_of(i) == column) found = x[i];
  return found;
}

}  // namespace dlogp::hopper
