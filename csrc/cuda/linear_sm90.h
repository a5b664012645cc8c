// A head's products on Hopper and what becomes of them, for one model or a pair: softmax states of splits of the
// vocabulary, or the gradient by the logits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dlogp {

// What the tensor memory accelerator wants to know of a matrix: a CUtensorMap, whose header need not be there.
struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

struct HeadMatrices {
  const void* hidden = nullptr;  // (hidden_rows, hidden_size) and (V, hidden_size), rows at multiples of 16 bytes
  const void* weight = nullptr;
  int64_t hidden_rows = 0, hidden_size = 0, stride_hidden = 0, stride_weight = 0;  // strides in elements
  const float* bias = nullptr;  // (V padded to whole tiles), nothing below kMasked; or none
  float tanh_scale = 0;         // 0: no softcap
  float output_scale = 1;
};

// Pointers are to memory of the device.
struct LinearArguments {
  HeadMatrices heads[2];
  int models = 1;
  bool half = false;  // float16 instead of bfloat16
  int64_t vocabulary = 0, splits = 0;
  const int64_t* target = nullptr;  // (N, K)
  int64_t num_targets = 1;          // K
  int64_t rows = 0;                 // at most: R
  // Row i is row_index[first + i] of target, of num_rows; or without these, first + i of total_rows.
  const int64_t* row_index = nullptr;  // (N,)
  const int* num_rows = nullptr;       // (1,)
  int64_t first = 0, total_rows = 0;
};

// States and x at the targets are laid out as the Triton kernels have them.
struct LinearForwardArguments : LinearArguments {
  float* state = nullptr;          // (3 of one model, 10 of a pair; splits; R)
  float* target_logits = nullptr;  // (models · K, R)
};

// Of a block of tokens, whose targets count from first_token on. By the raw logits, of one model.
struct LinearGradientArguments : LinearArguments {
  int64_t first_token = 0;
  // (4, N): the largest z, log Σ e^{z − that}, and what multiplies p and p · log p. And (N, K): p's 1-hot terms.
  const float *row_terms = nullptr, *target_terms = nullptr;
  void* gradient = nullptr;  // (R, V) of the heads' type
  int64_t stride_gradient = 0;
};

// Columns of a tile, and so how the bias is padded.
constexpr int tile_columns(int models) { return models == 1 ? 256 : 160; }

// Both queue a kernel on a stream of the current device, which has compute capability 9.0.
cudaError_t launch_linear_forward(const LinearForwardArguments& arguments, cudaStream_t stream);
cudaError_t launch_linear_gradient(const LinearGradientArguments& arguments, cudaStream_t stream);

}  // namespace dlogp
