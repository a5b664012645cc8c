#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "../csrc/cpu/extrapolated_sample.h"
#include "checks.h"

namespace dlogp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Criterion criterion_of(std::string_view name) {
  constexpr std::pair<std::string_view, Criterion> criteria[] = {
      {"delta_logp", Criterion::kDeltaLogp}, {"kl", Criterion::kKl},           {"reverse_kl", Criterion::kReverseKl},
      {"avg_kl", Criterion::kAvgKl},         {"entropy", Criterion::kEntropy}, {"rl_entropy", Criterion::kRlEntropy},
      {"random", Criterion::kRandom},        {"all", Criterion::kAll},         {"none", Criterion::kNone}};
  for (const auto& [known, criterion] : criteria)
    if (name == known) return criterion;
  TORCH_CHECK_VALUE(false, "criterion is '", name, "', expected one of those of reference_sample.CRITERIA");
}

// int64 values, one for all rows or one a row; none where the tensor is.
class RowNumbers {
 public:
  RowNumbers(const OptionalTensor& x, int64_t rows, const char* name) {
    if (!x.has_value()) return;
    TORCH_CHECK_VALUE(x->numel() == 1 || x->numel() == rows, name, " has ", x->numel(), " elements, expected ", rows);
    TORCH_CHECK_TYPE(x->scalar_type() == at::kLong, name, " has dtype ", x->scalar_type(), ", expected int64");
    TORCH_CHECK_VALUE(x->device().is_cpu(), name, " is on ", x->device(), ", expected cpu");
    tensor_ = x->contiguous();
    stride_ = x->numel() == 1 ? 0 : 1;
  }

  int64_t at(int64_t row, int64_t otherwise) const {
    return tensor_.defined() ? tensor_.const_data_ptr<int64_t>()[row * stride_] : otherwise;
  }

 private:
  Tensor tensor_;
  int64_t stride_ = 0;
};

struct SampleOutputs {
  Tensor token, draft_token, selected, delta_logp, logp, base_logp;

  SampleOutputs(int64_t rows, at::ScalarType dtype) {
    const at::TensorOptions integers = at::TensorOptions().dtype(at::kLong), values = integers.dtype(dtype);
    token = at::empty({rows}, integers);
    draft_token = at::empty({rows}, integers);
    selected = at::empty({rows}, integers.dtype(at::kBool));
    delta_logp = at::empty({rows}, values);
    logp = at::empty({rows}, values);
    base_logp = at::empty({rows}, values);
  }

  template <typename Real>
  void set(int64_t row, const SampledRow<Real>& sampled) const {
    token.mutable_data_ptr<int64_t>()[row] = sampled.token;
    draft_token.mutable_data_ptr<int64_t>()[row] = sampled.draft_token;
    selected.mutable_data_ptr<bool>()[row] = sampled.selected;
    delta_logp.mutable_data_ptr<Real>()[row] = sampled.delta_logp;
    logp.mutable_data_ptr<Real>()[row] = sampled.logp;
    base_logp.mutable_data_ptr<Real>()[row] = sampled.base_logp;
  }
};

// What tells rows apart.
struct Identities {
  RowNumbers row_id, steps;
  int64_t step;

  RowNoise of(int64_t row) const { return {uint32_t(row_id.at(row, row)), uint32_t(steps.at(row, step))}; }
};

template <typename Real>
void sample_rows(const Matrix& logits, const Matrix& base_logits, const Identities& identities,
                 const SampleOptions& options, const SampleOutputs& outputs) {
  at::parallel_for(0, logits.rows, 1, [&](int64_t begin, int64_t end) {
    SampleScratch<Real> scratch;
    for (int64_t row = begin; row < end; ++row)
      outputs.set(row, extrapolated_sample<Real>(logits, base_logits, row, identities.of(row), options, scratch));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> extrapolated_sample_cpu(
    const Tensor& logits, const Tensor& base_logits, const OptionalTensor& row_id, int64_t seed, int64_t step,
    const OptionalTensor& seed_tensor, const OptionalTensor& step_tensor, double gamma, std::string_view criterion,
    std::optional<double> threshold, std::string_view draft, double temperature, int64_t top_k, double top_p,
    double min_p, int64_t workspace) {
  TORCH_CHECK_VALUE(base_logits.sizes() == logits.sizes(), "base_logits has shape ", base_logits.sizes(), ", expected ",
                    logits.sizes());
  const Rows rows(logits, "logits"), base_rows(base_logits, "base_logits");
  TORCH_CHECK_VALUE(rows.matrix.columns > 0, "logits has no columns, expected the vocabulary");
  const int64_t count = rows.matrix.rows;
  TORCH_CHECK_VALUE(!row_id.has_value() || row_id->numel() == count, "row_id has ", row_id->numel(),
                    " elements, expected ", count);
  const Identities identities = {{row_id, count, "row_id"}, {step_tensor, count, "step_tensor"}, step};
  const SampleOptions options = {gamma,
                                 criterion_of(criterion),
                                 threshold.value_or(0),
                                 draft == "base",
                                 temperature,
                                 {top_k, top_p, min_p},
                                 uint64_t(RowNumbers(seed_tensor, 1, "seed_tensor").at(0, seed))};
  const bool use_double = logits.scalar_type() == at::kDouble || base_logits.scalar_type() == at::kDouble;
  const SampleOutputs outputs(count, use_double ? at::kDouble : at::kFloat);
  if (use_double)
    sample_rows<double>(rows.matrix, base_rows.matrix, identities, options, outputs);
  else
    sample_rows<float>(rows.matrix, base_rows.matrix, identities, options, outputs);
  return {outputs.token, outputs.draft_token, outputs.selected, outputs.delta_logp, outputs.logp, outputs.base_logp};
}

}  // namespace
}  // namespace dlogp

TORCH_LIBRARY_IMPL(dlogp, CPU, library) { library.impl("_cpu_extrapolated_sample", &dlogp::extrapolated_sample_cpu); }
