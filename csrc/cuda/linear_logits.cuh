// Logits of a tile in the registers of a thread, which has columns in pairs, 8 apart, of two rows, 8 apart: which they
// are, their transform, and the targets among them.
#pragma once

#include "linear_products.cuh"

namespace dlogp::hopper {

constexpr float kMasked = -1e25f;  // MASKED_LOGIT
constexpr float kLog2e = 1.44269504088896f;

// Of every four elements of a thread two are of its upper row, two of its lower one.
__device__ inline int quad_lane() { return int(threadIdx.x) & 3; }
constexpr __host__ __device__ int row_of(int element) { return (element >> 1) & 1; }
constexpr __host__ __device__ int column_of(int element) { return 2 * (element & ~3) + (element & 1); }

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

// The first row of a consumer's thread in a tile.
__device__ inline int thread_row(int consumer) {
  return 64 * consumer + int(threadIdx.x) % 128 / 32 * 16 + int(threadIdx.x) % 32 / 4;
}

// The two rows of a consumer's thread.
struct ThreadRows {
  int i[2];          // of states
  int64_t place[2];  // of targets, of the first of K
  int target[2];     // that
  bool inside[2];

  __device__ void load(const LinearArguments& p, int row, int num_rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      i[r] = row + 8 * r;
      inside[r] = i[r] < num_rows;
      int64_t n = p.first + i[r];
      if (inside[r] && p.row_index != nullptr) n = p.row_index[n];
      place[r] = n * p.num_targets;
      target[r] = inside[r] ? int(p.target[place[r]]) : -1;
    }
  }
};

// Stores x at the targets that lie in this thread's columns of the tile, and says of which rows some do.
template <int kCount, typename Store>
__device__ inline void pick(const LinearArguments& p, const ThreadRows& rows, int column, bool (&has_target)[2],
                            Store store_x) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    has_target[r] = false;
    int target = rows.target[r];
    for (int k = 0;;) {
      const unsigned local = unsigned(target) - unsigned(column + 2 * quad_lane());
      if (local < 2 * kCount && local % 8 < 2) {
        has_target[r] = true;
        store_x(r, k, int(local));
      }
      if (++k >= p.num_targets || !rows.inside[r]) break;
      target = int(p.target[rows.place[r] + k]);
    }
  }
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
