// What the bindings of the CUDA ops ask of a tensor before they take its pointer.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace dlogp {

using torch::stable::Tensor;

// Before its pointer is taken: a model whose weights are sharded leaves tensors behind whose storage was taken away.
inline void check_storage(const Tensor& x, const char* name) {
  if (x.numel() == 0) return;
  int64_t bytes = 0, last = x.storage_offset();
  STD_TORCH_CHECK(aoti_torch_get_storage_size(x.get(), &bytes) == AOTI_TORCH_SUCCESS, name, " has no storage");
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  const int64_t needed = (last + 1) * int64_t(x.element_size());
  STD_TORCH_CHECK(needed <= bytes, name, " has a storage of ", bytes, " bytes, expected the ", needed, " of its shape");
}

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream) == AOTI_TORCH_SUCCESS,
                  "torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace dlogp
