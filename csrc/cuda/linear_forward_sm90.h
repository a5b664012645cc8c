// The forward pass over a head on Hopper: softmax states of splits of the vocabulary, for one model or a pair.
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

// Pointers are to memory of the device. States and x at the targets are laid out as the Triton kernels have them.
struct LinearForwardArguments {
  HeadMatrices heads[2];
  int models = 1;
  bool half = false;  // float16 instead of bfloat16
  int64_t rows = 0;   // R, of states
  int64_t vocabulary = 0, splits = 0;
  const int64_t* target = nullptr;     // (N, K)
  int64_t num_targets = 1;             // K
  const int64_t* row_index = nullptr;  // (N,) and (1,): row i is row_index[first + i] of target, of num_rows; or none,
  const int* num_rows = nullptr;       // and row i is first + i of total_rows
  int64_t first = 0, total_rows = 0;
  float* state = nullptr;          // (3 of one model, 10 of a pair; splits; R)
  float* target_logits = nullptr;  // (models · K, R)
};

// Columns of a tile, and so how the bias is padded.
constexpr int tile_columns(int models) { return models == 1 ? 256 : 160; }

// Queues the kernel on a stream of the current device, which has compute capability 9.0.
cudaError_t launch_linear_forward(const LinearForwardArguments& arguments, cudaStream_t stream);

}  // namespace dlogp
