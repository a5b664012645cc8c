// A head's products on Hopper. Their launcher, dlogp_kernels/triton/hopper.py, has seen to shapes and dtypes; what
// would make a kernel read or write outside of a tensor is checked here once more.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "../csrc/cuda/linear_sm90.h"
#include "cuda_checks.h"

namespace dlogp {
namespace {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

bool is_matrix_of_rows(const Tensor& x) {
  return x.dim() == 2 && x.stride(1) == 1 && x.stride(0) % 8 == 0 && (x.stride(0) >= x.size(1) || x.size(0) < 2) &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

template <typename T>
T* checked(const Tensor& x, ScalarType type, int64_t elements, const char* name) {
  STD_TORCH_CHECK(x.is_cuda() && x.scalar_type() == type && x.is_contiguous() && x.numel() == elements, name,
                  " is not a contiguous tensor of its dtype with ", elements, " elements on a CUDA device");
  check_storage(x, name);
  return static_cast<T*>(x.mutable_data_ptr());
}

bool is_half(const Tensor& hidden) {
  const bool half = hidden.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(half || hidden.scalar_type() == ScalarType::BFloat16, "hidden is neither bfloat16 nor float16");
  return half;
}

HeadMatrices matrices(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, double tanh_scale,
                      double output_scale, int models) {
  for (const Tensor* x : {&hidden, &weight})
    STD_TORCH_CHECK(x->is_cuda() && is_matrix_of_rows(*x) && x->scalar_type() == hidden.scalar_type(),
                    "hidden and weight are not matrices of one dtype with rows that begin on 16 bytes");
  check_storage(hidden, "hidden");
  check_storage(weight, "weight");
  STD_TORCH_CHECK(hidden.size(1) == weight.size(1), "hidden and weight have other columns");
  HeadMatrices head;
  head.hidden = hidden.const_data_ptr();
  head.weight = weight.const_data_ptr();
  head.hidden_rows = hidden.size(0);
  head.hidden_size = hidden.size(1);
  head.stride_hidden = hidden.stride(0);
  head.stride_weight = weight.stride(0);
  const int64_t columns = tile_columns(models), padded = (weight.size(0) + columns - 1) / columns * columns;
  if (bias.has_value()) head.bias = checked<float>(*bias, ScalarType::Float, padded, "bias");
  head.tanh_scale = float(tanh_scale);
  head.output_scale = float(output_scale);
  return head;
}

void fill_targets(LinearArguments& arguments, const Tensor& target, int64_t first) {
  STD_TORCH_CHECK(target.dim() == 2 && first >= 0, "target is not a matrix, or first is negative");
  arguments.target = checked<int64_t>(target, ScalarType::Long, target.numel(), "target");
  arguments.num_targets = target.size(1);
  arguments.total_rows = target.size(0);
  arguments.first = first;
}

void check_launched(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

void linear_states(Tensor hidden, Tensor weight, OptionalTensor bias, double tanh_scale, double output_scale,
                   OptionalTensor base_hidden, OptionalTensor base_weight, OptionalTensor base_bias,
                   double base_tanh_scale, double base_output_scale, Tensor target, OptionalTensor row_index,
                   OptionalTensor num_rows, int64_t first, Tensor state, Tensor target_logits) {
  LinearForwardArguments arguments;
  const int models = base_hidden.has_value() && base_weight.has_value() ? 2 : 1;
  arguments.models = models;
  arguments.half = is_half(hidden);
  arguments.heads[0] = matrices(hidden, weight, bias, tanh_scale, output_scale, models);
  if (models == 2) {
    STD_TORCH_CHECK(base_hidden->scalar_type() == hidden.scalar_type() && base_weight->size(0) == weight.size(0),
                    "base_hidden has another dtype, or base_weight other tokens");
    arguments.heads[1] = matrices(*base_hidden, *base_weight, base_bias, base_tanh_scale, base_output_scale, models);
  }
  fill_targets(arguments, target, first);
  if (row_index.has_value() && num_rows.has_value()) {
    arguments.row_index = checked<int64_t>(*row_index, ScalarType::Long, target.size(0), "row_index");
    arguments.num_rows = checked<int>(*num_rows, ScalarType::Int, 1, "num_rows");
  }
  STD_TORCH_CHECK(state.dim() == 3 && state.size(1) > 0, "state has other dimensions");
  arguments.vocabulary = weight.size(0);
  arguments.splits = state.size(1);
  arguments.rows = state.size(2);
  const int64_t places = state.size(1) * state.size(2), picked = models * target.size(1) * state.size(2);
  arguments.state = checked<float>(state, ScalarType::Float, (models == 1 ? 3 : 10) * places, "state");
  arguments.target_logits = checked<float>(target_logits, ScalarType::Float, picked, "target_logits");
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device());
  check_launched(launch_linear_forward(arguments, current_stream(hidden)), "linear_logp");
}

void linear_gradient(Tensor hidden, Tensor weight, OptionalTensor bias, double tanh_scale, double output_scale,
                     Tensor target, Tensor target_terms, Tensor row_terms, int64_t first, int64_t first_token,
                     Tensor gradient) {
  LinearGradientArguments arguments;
  arguments.half = is_half(hidden);
  arguments.heads[0] = matrices(hidden, weight, bias, tanh_scale, output_scale, 1);
  fill_targets(arguments, target, first);
  arguments.target_terms = checked<float>(target_terms, ScalarType::Float, target.numel(), "target_terms");
  arguments.row_terms = checked<float>(row_terms, ScalarType::Float, 4 * target.size(0), "row_terms");
  STD_TORCH_CHECK(gradient.is_cuda() && is_matrix_of_rows(gradient) && gradient.size(0) == hidden.size(0) &&
                      gradient.size(1) == weight.size(0) && gradient.scalar_type() == hidden.scalar_type(),
                  "gradient is not a matrix of rows × tokens of hidden's dtype with rows that begin on 16 bytes");
  check_storage(gradient, "gradient");
  STD_TORCH_CHECK(first + hidden.size(0) <= target.size(0), "hidden has rows beyond those of target");
  arguments.first_token = first_token;
  arguments.rows = hidden.size(0);
  arguments.vocabulary = weight.size(0);
  arguments.splits = (weight.size(0) + tile_columns(1) - 1) / tile_columns(1);
  arguments.gradient = gradient.mutable_data_ptr();
  arguments.stride_gradient = gradient.stride(0);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device());
  check_launched(launch_linear_gradient(arguments, current_stream(hidden)), "linear_logp's backward");
}

}  // namespace
}  // namespace dlogp

STABLE_TORCH_LIBRARY_IMPL(dlogp, CUDA, library) {
  library.impl("_cuda_linear_states", TORCH_BOX(&dlogp::linear_states));
  library.impl("_cuda_linear_gradient", TORCH_BOX(&dlogp::linear_gradient));
}
