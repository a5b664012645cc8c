// The epilogue of backward: each thread makes of its logits the gradient by them, `logits_gradient` of
// dlogp_kernels/triton/_math.py with its terms of a row gathered before, and a tile leaves by way of shared memory.
#pragma once

#include "linear_logits.cuh"

namespace dlogp::hopper {

constexpr int kBoxColumns = 64;  // of 128 bytes, the width of a swizzle

__device__ inline uint32_t packed(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint32_t packed(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T, bool kTransformed>
class Gradient {
  using Arguments = KernelArguments<LinearGradientArguments>;
  static constexpr int kBoxes = 2, kBoxBytes = 64 * 2 * kBoxColumns;  // of a consumer's 64 rows

 public:
  static constexpr int kOwnBytes = kConsumers * kBoxes * kBoxBytes;

  __device__ Gradient(const Arguments& p, uint32_t boxes, int num_rows, int consumer)
      : p_(p), num_rows_(num_rows), consumer_(consumer), boxes_(boxes + consumer * kBoxes * kBoxBytes) {
    const HeadMatrices& head = p.heads[0];
    curvature_ = head.output_scale * head.tanh_scale;
    slope_ = head.tanh_scale != 0 ? curvature_ : head.output_scale;
  }

  // A block's shared memory may be another's once it has ended.
  __device__ ~Gradient() {
    if (threadIdx.x % 128 == 0) wait_for_stores<0>();
  }

  __device__ void begin(const Unit& unit) {
    row_ = unit.row + 64 * consumer_;
    rows_.load(p_, unit.row + thread_row(consumer_), num_rows_);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int term = 0; term < 4; ++term)
        terms_[r][term] = rows_.inside[r] ? p_.row_terms[term * p_.total_rows + p_.first + rows_.i[r]] : 0;
  }

  __device__ void take(int column, float (&x)[T::kElements], float (&)[1]) {
    if constexpr (kTransformed) transform(p_.heads[0], column, x);
    bool has_target[2];
    pick<T::kElements>(p_, rows_, int(p_.first_token) + column, has_target, [](int, int, int) {});
    if (has_target[0] || has_target[1]) {
      hold(x);  // or what both branches compute would be hoisted, and take registers that are not there
      float first_terms[2];
      for (int r = 0; r < 2; ++r) first_terms[r] = rows_.inside[r] ? p_.target_terms[rows_.place[r]] : 0;
#pragma unroll
      for (int i = 0; i < T::kElements; ++i) x[i] = of_logit(x[i], row_of(i), target_term(column, i, first_terms));
    } else {
#pragma unroll
      for (int i = 0; i < T::kElements; ++i) x[i] = of_logit(x[i], row_of(i), 0);
    }
    write(column, x);
  }

  __device__ void end(const Unit&) {}

 private:
  // The gradient by a raw logit with this x; `target_term` is that of the statistics by its own log p.
  __device__ float of_logit(float x, int row, float target_term) const {
    const float (&terms)[4] = terms_[row];
    const HeadMatrices& head = p_.heads[0];
    const float logp = fmaf(head.output_scale, x, -terms[0]) - terms[1];
    const float slope = kTransformed ? fmaf(-curvature_ * x, x, slope_) : head.output_scale;
    const float p = exp2_of(kLog2e * logp), by_logp = fmaf(terms[3], logp, terms[2]);
    return slope * ((p == 0 ? 0 : p * by_logp) + target_term);  // where log p is −inf, by_logp may be infinite
  }

  // By the log p of this element's own token: of the first candidate given, of further ones read.
  __device__ float target_term(int column, int element, const float (&first_terms)[2]) const {
    const int r = row_of(element), token = int(p_.first_token) + column + column_of(element) + 2 * quad_lane();
    float found = rows_.target[r] == token ? first_terms[r] : 0;
    if (p_.num_targets == 1) return found;
    for (int k = 1; k < p_.num_targets && rows_.inside[r]; ++k)
      if (p_.target[rows_.place[r] + k] == token) found += p_.target_terms[rows_.place[r] + k];
    return found;
  }

  // By boxes in turn: one is written while the other is read.
  __device__ void write(int column, const float (&x)[T::kElements]) {
    using Element = typename T::Element;
    const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) % 128 / 32 * 16 + lane % 16;
    const bool first = threadIdx.x % 128 == 0;
#pragma unroll
    for (int begin = 0; begin < T::kColumns; begin += kBoxColumns) {
      const uint32_t box = boxes_ + begin / kBoxColumns % kBoxes * kBoxBytes;
      if (first) wait_for_stores<kBoxes - 1>();
      sync_group(1 + consumer_);
#pragma unroll
      for (int j = 0; j < kBoxColumns / 16; ++j) {
        const float* of = x + (begin + 16 * j) / 2;
        const int chunk = (2 * j + lane / 16) ^ (row % 8);  // of 16 bytes, swizzled
        store_matrices(box + row * 2 * kBoxColumns + 16 * chunk, packed(of[0], of[1], Element()),
                       packed(of[2], of[3], Element()), packed(of[4], of[5], Element()),
                       packed(of[6], of[7], Element()));
      }
      publish_for_stores();
      sync_group(1 + consumer_);
      if (first) store_box(p_.gradient_map, box, column + begin, row_);
    }
  }

  const Arguments& p_;
  const int num_rows_, consumer_;
  const uint32_t boxes_;
  float slope_, curvature_;  // dz/dx_raw = slope − curvature · x²
  int row_ = 0;
  ThreadRows rows_;
  float terms_[2][4];
};

}  // namespace dlogp::hopper
