// The CUDA ops, in a library of its own that loads with a CUDA build of torch only. It uses torch's stable ABI: one
// build serves torch 2.11 and later.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../csrc/cuda/extrapolated_sample.h"
#include "cuda_checks.h"

namespace dlogp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

LogitType type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return LogitType::kBFloat16;
    case ScalarType::Half:
      return LogitType::kHalf;
    case ScalarType::Float:
      return LogitType::kFloat;
    default:
      STD_TORCH_CHECK(false, name,
                      " has a dtype that the CUDA kernels do not read, expected bfloat16, float16 or float32");
  }
}

// A tensor (…, columns) seen as rows, and what keeps it alive: a copy where two strides do not reach every row.
struct Rows {
  Tensor tensor;
  LogitRows rows;

  Rows(const Tensor& x, const char* name) : tensor(x) {
    STD_TORCH_CHECK(x.is_cuda(), name, " is not on a CUDA device");
    STD_TORCH_CHECK(x.dim() >= 2, name, " has ", x.dim(), " dimensions, expected at least 2");
    check_storage(x, name);
    rows.type = type_of(x, name);
    if (describe()) return;
    tensor = torch::stable::contiguous(x);
    describe();
  }

 private:
  bool describe() {
    std::array<int64_t, 2> sizes = {1, 1}, strides = {0, 0};  // outer, inner
    int found = 0;
    for (int64_t d = 0; d < tensor.dim() - 1; ++d) {
      const int64_t size = tensor.size(d), stride = tensor.stride(d);
      if (size == 1) continue;
      if (found > 0 && strides[found - 1] == size * stride) {
        sizes[found - 1] *= size;
        strides[found - 1] = stride;
      } else if (found == 2) {
        return false;
      } else {
        sizes[found] = size;
        strides[found++] = stride;
      }
    }
    if (found < 2) std::swap(sizes[0], sizes[1]), std::swap(strides[0], strides[1]);
    rows.data = tensor.const_data_ptr();
    rows.inner = sizes[1] > 0 ? sizes[1] : 1;
    rows.stride_outer = strides[0];
    rows.stride_row = strides[1];
    rows.stride_column = tensor.stride(-1);
    return true;
  }
};

int64_t row_count(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d < x.dim() - 1; ++d) rows *= x.size(d);
  return rows;
}

Criterion criterion_of(const std::string& name) {
  const std::optional<Criterion> criterion = criterion_named(name);
  STD_TORCH_CHECK(criterion.has_value(), "criterion is '", name,
                  "', expected one of those of reference.sampling.CRITERIA");
  return *criterion;
}

// int64 values on the device, one or one a row; null for none.
const int64_t* numbers(OptionalTensor& x, int64_t rows, const Tensor& like, const char* name) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Long, name, " is not int64");
  STD_TORCH_CHECK(x->is_cuda() && x->get_device() == like.get_device(), name, " is not on the device of logits");
  STD_TORCH_CHECK(x->numel() == 1 || x->numel() == rows, name, " has ", x->numel(), " elements, expected ", rows);
  check_storage(*x, name);
  x = torch::stable::contiguous(*x);
  return static_cast<const int64_t*>(x->const_data_ptr());
}

template <typename T>
T* pointer_to(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> extrapolated_sample_cuda(
    Tensor logits, Tensor base_logits, OptionalTensor row_id, int64_t seed, int64_t step, OptionalTensor seed_tensor,
    OptionalTensor step_tensor, int64_t first_token, double gamma, std::string criterion,
    std::optional<double> threshold, std::string draft, double temperature, int64_t top_k, double top_p, double min_p,
    int64_t workspace) {
  const Rows rows(logits, "logits"), base_rows(base_logits, "base_logits");
  const int64_t count = row_count(logits), vocabulary = logits.size(-1);
  STD_TORCH_CHECK(row_count(base_logits) == count && base_logits.size(-1) == vocabulary,
                  "base_logits has other sizes than logits");
  STD_TORCH_CHECK(base_logits.get_device() == logits.get_device(), "base_logits is on another device than logits");
  STD_TORCH_CHECK(vocabulary > 0 && vocabulary <= kMostTokens, "logits has ", vocabulary, " columns, expected 1 to ",
                  kMostTokens);
  STD_TORCH_CHECK(!row_id.has_value() || row_id->numel() == count, "row_id has another number of rows than logits");
  STD_TORCH_CHECK(first_token >= 0 && first_token % 4 == 0, "first_token is ", first_token,
                  ", expected a multiple of 4");
  const auto empty = [&](ScalarType type) { return torch::stable::new_empty(logits, {count}, type); };
  const Tensor token = empty(ScalarType::Long), draft_token = empty(ScalarType::Long);
  const Tensor selected = empty(ScalarType::Bool), delta_logp = empty(ScalarType::Float);
  const Tensor logp = empty(ScalarType::Float), base_logp = empty(ScalarType::Float);
  if (count > 0) {
    SampleArguments arguments;
    arguments.logits = rows.rows;
    arguments.base_logits = base_rows.rows;
    arguments.rows = count;
    arguments.vocabulary = vocabulary;
    arguments.options = {gamma,       criterion_of(criterion), threshold.value_or(0), draft == "base",
                         temperature, {top_k, top_p, min_p},   uint64_t(seed)};
    arguments.identities = {numbers(row_id, count, logits, "row_id"),
                            numbers(step_tensor, count, logits, "step_tensor"),
                            step_tensor.has_value() && step_tensor->numel() > 1 ? 1 : 0, step, first_token};
    arguments.seed = numbers(seed_tensor, 1, logits, "seed_tensor");
    arguments.token = pointer_to<int64_t>(token);
    arguments.draft_token = pointer_to<int64_t>(draft_token);
    arguments.selected = pointer_to<bool>(selected);
    arguments.delta_logp = pointer_to<float>(delta_logp);
    arguments.logp = pointer_to<float>(logp);
    arguments.base_logp = pointer_to<float>(base_logp);
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
    const cudaError_t error = launch_extrapolated_sample(arguments, current_stream(logits));
    STD_TORCH_CHECK(error == cudaSuccess, "extrapolated_sample: ", cudaGetErrorString(error));
  }
  return {token, draft_token, selected, delta_logp, logp, base_logp};
}

}  // namespace
}  // namespace dlogp

STABLE_TORCH_LIBRARY_IMPL(dlogp, CUDA, library) {
  library.impl("_cuda_extrapolated_sample", TORCH_BOX(&dlogp::extrapolated_sample_cuda));
}
