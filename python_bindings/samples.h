// What the sampling ops take and return besides logits or hidden states.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../csrc/cpu/extrapolated_sample.h"
#include "checks.h"

namespace dlogp {

inline Criterion criterion_of(std::string_view name) {
  const std::optional<Criterion> criterion = criterion_named(name);
  TORCH_CHECK_VALUE(criterion.has_value(), "criterion is '", name,
                    "', expected one of those of reference_sample.CRITERIA");
  return *criterion;
}

// int64 values, one for all rows or one a row; none where the tensor is.
class RowNumbers {
 public:
  RowNumbers(const std::optional<at::Tensor>& x, int64_t rows, const char* name) {
    if (!x.has_value()) return;
    TORCH_CHECK_VALUE(x->numel() == 1 || x->numel() == rows, name, " has ", x->numel(), " elements, expected ", rows);
    TORCH_CHECK_TYPE(x->scalar_type() == at::kLong, name, " has dtype ", x->scalar_type(), ", expected int64");
    tensor_ = checked(*x, name).contiguous();
    stride_ = x->numel() == 1 ? 0 : 1;
  }

  int64_t at(int64_t row, int64_t otherwise) const {
    return tensor_.defined() ? tensor_.const_data_ptr<int64_t>()[row * stride_] : otherwise;
  }

 private:
  at::Tensor tensor_;
  int64_t stride_ = 0;
};

struct SampleOutputs {
  at::Tensor token, draft_token, selected, delta_logp, logp, base_logp;

  SampleOutputs(int64_t rows, at::ScalarType dtype) {
    const at::TensorOptions integers = at::TensorOptions().dtype(at::kLong), values = integers.dtype(dtype);
    token = at::empty({rows}, integers);
    draft_token = at::empty({rows}, integers);
    selected = at::empty({rows}, integers.dtype(at::kBool));
    delta_logp = at::empty({rows}, values);
    logp = at::empty({rows}, values);
    base_logp = at::empty({rows}, values);
  }

  auto all() const { return std::make_tuple(token, draft_token, selected, delta_logp, logp, base_logp); }

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

inline Identities identities_of(const std::optional<at::Tensor>& row_id, int64_t step,
                                const std::optional<at::Tensor>& step_tensor, int64_t rows) {
  TORCH_CHECK_VALUE(!row_id.has_value() || row_id->numel() == rows, "row_id has ", row_id->numel(),
                    " elements, expected ", rows);
  return {{row_id, rows, "row_id"}, {step_tensor, rows, "step_tensor"}, step};
}

inline SampleOptions sample_options(int64_t seed, const std::optional<at::Tensor>& seed_tensor, double gamma,
                                    std::string_view criterion, std::optional<double> threshold, std::string_view draft,
                                    double temperature, const Filters& filters) {
  return {gamma,
          criterion_of(criterion),
          threshold.value_or(0),
          draft == "base",
          temperature,
          filters,
          uint64_t(RowNumbers(seed_tensor, 1, "seed_tensor").at(0, seed))};
}

}  // namespace dlogp
