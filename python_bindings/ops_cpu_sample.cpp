#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "../csrc/cpu/extrapolated_sample.h"
#include "checks.h"
#include "samples.h"

namespace dlogp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

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
  const Identities identities = identities_of(row_id, step, step_tensor, count);
  const SampleOptions options =
      sample_options(seed, seed_tensor, gamma, criterion, threshold, draft, temperature, {top_k, top_p, min_p});
  const bool use_double = logits.scalar_type() == at::kDouble || base_logits.scalar_type() == at::kDouble;
  const SampleOutputs outputs(count, use_double ? at::kDouble : at::kFloat);
  if (use_double)
    sample_rows<double>(rows.matrix, base_rows.matrix, identities, options, outputs);
  else
    sample_rows<float>(rows.matrix, base_rows.matrix, identities, options, outputs);
  return outputs.all();
}

}  // namespace
}  // namespace dlogp

TORCH_LIBRARY_IMPL(dlogp, CPU, library) { library.impl("_cpu_extrapolated_sample", &dlogp::extrapolated_sample_cpu); }
