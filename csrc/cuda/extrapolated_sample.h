// extrapolated_sample on GPUs: one launch, a cluster of thread blocks a row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/sampling.h"
#include "logits.h"

namespace dlogp {

// Pointers are to memory of the device. A seed that has a pointer is read there.
struct SampleArguments {
  LogitRows logits, base_logits;
  bool aligned = false, base_aligned = false;  // LogitRows::has_aligned_groups
  int64_t rows = 0, vocabulary = 0;
  SampleOptions options;
  RowIdentities identities;
  const int64_t* seed = nullptr;  // (1,)
  int64_t *token = nullptr, *draft_token = nullptr;
  bool* selected = nullptr;
  float *delta_logp = nullptr, *logp = nullptr, *base_logp = nullptr;
};

// The arguments with what a launcher tells the kernel besides.
inline SampleArguments completed(SampleArguments arguments) {
  arguments.aligned = arguments.logits.has_aligned_groups();
  arguments.base_aligned = arguments.base_logits.has_aligned_groups();
  return arguments;
}

// Logits are kept as they are, or as float where the two models differ.
inline LogitType kept_type(const SampleArguments& arguments) {
  return arguments.logits.type == arguments.base_logits.type ? arguments.logits.type : LogitType::kFloat;
}

// Of larger vocabularies the mass, a sum of 64-bit integers, could overflow.
constexpr int64_t kMostTokens = int64_t(1) << 23;

// Queues the kernel on a stream of the current device; rows > 0.
cudaError_t launch_extrapolated_sample(const SampleArguments& arguments, cudaStream_t stream);

}  // namespace dlogp
