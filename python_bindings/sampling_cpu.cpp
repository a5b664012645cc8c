// extrapolated_sample and linear_extrapolated_sample on the CPU, as implementations of the private schemas `_cpu_*`.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../csrc/cpu/extrapolated_sample.h"
#include "../csrc/cpu/linear_extrapolated_sample.h"
#include "checks.h"
#include "heads.h"

namespace dlogp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// int64 values, `count` of them, or one for all; null where there is no tensor.
struct Integers {
  Tensor kept;
  const int64_t* data = nullptr;
  int64_t stride = 0;

  Integers(const OptionalTensor& x, int64_t count, const char* name) {
    if (!x.has_value()) return;
    TORCH_CHECK_VALUE(x->numel() == 1 || x->numel() == count, name, " has ", x->numel(), " elements, expected ", count);
    TORCH_CHECK_TYPE(x->scalar_type() == at::kLong, name, " has dtype ", x->scalar_type(), ", expected int64");
    kept = checked(*x, name).contiguous();
    data = kept.const_data_ptr<int64_t>();
    stride = x->numel() == 1 ? 0 : 1;
  }
};

// The options of the schemas, checked for so many rows of a vocabulary.
struct SampleArguments {
  Integers row_id, steps;
  RowIdentities identities;
  SampleOptions options;

  SampleArguments(int64_t rows, const OptionalTensor& given_row_id, int64_t seed, int64_t step,
                  const OptionalTensor& seed_tensor, const OptionalTensor& step_tensor, int64_t first_token,
                  double gamma, std::string_view criterion, std::optional<double> threshold, std::string_view draft,
                  double temperature, const Filters& filters)
      : row_id(given_row_id, rows, "row_id"), steps(step_tensor, rows, "step_tensor") {
    TORCH_CHECK_VALUE(!given_row_id.has_value() || given_row_id->numel() == rows, "row_id has ", given_row_id->numel(),
                      " elements, expected ", rows);
    const std::optional<Criterion> known = criterion_named(criterion);
    TORCH_CHECK_VALUE(known.has_value(), "criterion is '", criterion,
                      "', expected one of those of reference.sampling.CRITERIA");
    const Integers seeds(seed_tensor, 1, "seed_tensor");
    TORCH_CHECK_VALUE(first_token >= 0 && first_token % 4 == 0, "first_token is ", first_token,
                      ", expected a multiple of 4");
    identities = {row_id.data, steps.data, steps.stride, step, first_token};
    options = {gamma,
               *known,
               threshold.value_or(0),
               draft == "base",
               temperature,
               filters,
               uint64_t(seeds.data != nullptr ? *seeds.data : seed)};
  }
};

struct SampleTensors {
  Tensor token, draft_token, selected, delta_logp, logp, base_logp;

  SampleTensors(int64_t rows, bool use_double) {
    const at::TensorOptions integers = at::TensorOptions().dtype(at::kLong);
    const at::TensorOptions values = integers.dtype(use_double ? at::kDouble : at::kFloat);
    token = at::empty({rows}, integers);
    draft_token = at::empty({rows}, integers);
    selected = at::empty({rows}, integers.dtype(at::kBool));
    for (Tensor* x : {&delta_logp, &logp, &base_logp}) *x = at::empty({rows}, values);
  }

  template <typename Acc>
  SampleOutputs<Acc> outputs() const {
    return {token.mutable_data_ptr<int64_t>(), draft_token.mutable_data_ptr<int64_t>(),
            selected.mutable_data_ptr<bool>(), delta_logp.mutable_data_ptr<Acc>(),
            logp.mutable_data_ptr<Acc>(),      base_logp.mutable_data_ptr<Acc>()};
  }
  auto all() const { return std::make_tuple(token, draft_token, selected, delta_logp, logp, base_logp); }
};

auto extrapolated_sample_cpu(const Tensor& logits, const Tensor& base_logits, const OptionalTensor& row_id,
                             int64_t seed, int64_t step, const OptionalTensor& seed_tensor,
                             const OptionalTensor& step_tensor, int64_t first_token, double gamma,
                             std::string_view criterion, std::optional<double> threshold, std::string_view draft,
                             double temperature, int64_t top_k, double top_p, double min_p, int64_t workspace) {
  TORCH_CHECK_VALUE(base_logits.sizes() == logits.sizes(), "base_logits has shape ", base_logits.sizes(), ", expected ",
                    logits.sizes());
  const Rows rows(logits, "logits"), base_rows(base_logits, "base_logits");
  TORCH_CHECK_VALUE(rows.matrix.columns > 0, "logits has no columns, expected the vocabulary");
  const SampleArguments given(rows.matrix.rows, row_id, seed, step, seed_tensor, step_tensor, first_token, gamma,
                              criterion, threshold, draft, temperature, {top_k, top_p, min_p});
  const bool use_double = logits.scalar_type() == at::kDouble || base_logits.scalar_type() == at::kDouble;
  const SampleTensors sample(rows.matrix.rows, use_double);
  dispatch_accumulator(use_double, [&](auto type) {
    extrapolated_sample(rows.matrix, base_rows.matrix, given.identities, given.options,
                        sample.outputs<decltype(type)>());
  });
  return sample.all();
}

auto linear_extrapolated_sample_cpu(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                                    at::ArrayRef<double> transform, const Tensor& base_hidden,
                                    const Tensor& base_weight, const OptionalTensor& base_bias,
                                    at::ArrayRef<double> base_transform, const OptionalTensor& row_id, int64_t seed,
                                    int64_t step, const OptionalTensor& seed_tensor, const OptionalTensor& step_tensor,
                                    int64_t first_token, double gamma, std::string_view criterion,
                                    std::optional<double> threshold, std::string_view draft, double temperature,
                                    int64_t top_k, double top_p, double min_p, int64_t workspace) {
  const CheckedHeads<2> heads({{{hidden, weight, bias, transform_of(transform)},
                                {base_hidden, base_weight, base_bias, transform_of(base_transform)}}});
  const SampleArguments given(heads.rows(), row_id, seed, step, seed_tensor, step_tensor, first_token, gamma, criterion,
                              threshold, draft, temperature, {top_k, top_p, min_p});
  const SampleTensors sample(heads.rows(), heads.any_double());
  heads.dispatch_product(heads.any_double(), [&](auto type) {
    using T = decltype(type);
    linear_extrapolated_sample<T>(heads.heads, given.identities, given.options, workspace,
                                  sample.outputs<Accumulator<T>>());
  });
  return sample.all();
}

}  // namespace

void register_sampling(torch::Library& library) {
  library.impl("_cpu_extrapolated_sample", &extrapolated_sample_cpu);
  library.impl("_cpu_linear_extrapolated_sample", &linear_extrapolated_sample_cpu);
}

}  // namespace dlogp
