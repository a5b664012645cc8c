// The epilogue of forward: each thread folds its columns of two rows into softmax states, and at the end of a split the
// four threads of a row merge theirs.
//
// States are those of dlogp_kernels/triton/_math.py, whose kernel merges the splits: x with z = output_scale · x, and
// about the maximum m of x, with d = x − m and the scales as there:
//   rest = Σ e^{s·d} − 1   weighted = Σ e^{s·d}·d   cross = Σ e^{s·d}·u   base_cross = −Σ e^{base_s·base_d}·u
// (csrc/common/online_softmax.h has sums in double, for which there are no registers here.)
// Here exponents are of 2: `scale` is output_scale · log2 e, and cross terms are in units of log 2 until they are
// stored.
#pragma once

#include <type_traits>

#include "linear_logits.cuh"

namespace dlogp::hopper {

constexpr float kLargeRest = 0.5f;  // LARGE_REST
constexpr float kLn2 = 0.693147180559945f;

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

template <typename T, bool kTransformed>
class Forward {
  using States = std::conditional_t<T::kModels == 1, State, PairState>;
  using Arguments = KernelArguments<LinearForwardArguments>;

 public:
  static constexpr int kOwnBytes = 0;

  __device__ Forward(const Arguments& p, uint32_t, int num_rows, int consumer)
      : p_(p), num_rows_(num_rows), row_(thread_row(consumer)) {}

  __device__ void begin(const Unit& unit) {
    rows_.load(p_, unit.row + row_, num_rows_);
    states_[0] = states_[1] = {};
    unsupported_ = 0;
  }

  template <int kBase>
  __device__ void take(int column, float (&x)[T::kElements], float (&base_x)[kBase]) {
    const int vocabulary = int(p_.vocabulary);
    bool has_target[2];
    if constexpr (kTransformed) transform(p_.heads[0], column, x);
    mask_from(vocabulary, column, x);
    if constexpr (T::kModels == 1) {
      pick<T::kElements>(p_, rows_, column, has_target,
                         [&](int r, int k, int local) { *target_logit(r, k) = element_at(x, r, local); });
      fold(x, scale(), has_target, states_);
    } else {
      if constexpr (kTransformed) {
        transform(p_.heads[1], column, base_x);
        unsupported_ |= unsupported<T::kElements>(p_.heads[0], p_.heads[1], vocabulary, column);
      }
      mask_from(vocabulary, column, base_x);
      pick<T::kElements>(p_, rows_, column, has_target, [&](int r, int k, int local) {
        *target_logit(r, k) = element_at(x, r, local);
        *target_logit(r, int(p_.num_targets) + k) = element_at(base_x, r, local);
      });
      fold(x, base_x, scale(), base_scale(), has_target, states_);
    }
  }

  __device__ void end(const Unit& unit) {
    if constexpr (T::kModels == 2)
      for (int mask = 1; mask <= 2; mask *= 2) unsupported_ |= __shfl_xor_sync(kWholeWarp, unsupported_, mask);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      merge_quad(states_[r], scale(), base_scale());
      if (quad_lane() != 0 || !rows_.inside[r]) continue;
      float* place = p_.state + unit.split * p_.rows + rows_.i[r];
      const int64_t stride = p_.splits * p_.rows;
      store(place, stride, states_[r]);
      if constexpr (T::kModels == 2) {
        place[8 * stride] = unsupported_ & 1;
        place[9 * stride] = unsupported_ >> 1;
      }
    }
  }

 private:
  __device__ float scale() const { return kLog2e * p_.heads[0].output_scale; }
  __device__ float base_scale() const { return kLog2e * p_.heads[1].output_scale; }
  __device__ float* target_logit(int r, int k) const { return p_.target_logits + k * p_.rows + rows_.i[r]; }

  const Arguments& p_;
  const int num_rows_, row_;
  ThreadRows rows_;
  States states_[2];
  int unsupported_ = 0;
};

}  // namespace dlogp::hopper
