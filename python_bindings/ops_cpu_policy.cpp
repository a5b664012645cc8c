#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "policy_checks.h"

namespace dlogp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Spans that one thread takes at the least: a few microseconds of work.
constexpr int64_t kGrain = 1;

template <typename Use>
void for_spans(const PolicySpans& spans, Use use) {
  at::parallel_for(0, int64_t(spans.spans.size()), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) use(i, spans.spans[i]);
  });
}

template <typename Real>
std::vector<PolicySequence> first_pass(const PolicyInputs& inputs, const PolicySpans& spans) {
  std::vector<PolicySequence> parts(spans.spans.size()), sequences(spans.first.size() - 1);
  for_spans(spans, [&](int64_t i, const PolicySpan& span) { sum_span<Real>(inputs, span, parts[i]); });
  for (size_t i = 0; i < parts.size(); ++i) {
    PolicySequence& sequence = sequences[spans.spans[i].sequence];
    sequence.count += parts[i].count;
    sequence.old_logp += parts[i].old_logp;
    sequence.log_ratio += parts[i].log_ratio;
  }
  return sequences;
}

template <typename Real>
void policy_forward(const PolicyOptions& options, const PolicyInputs& inputs, const PolicySpans& spans,
                    const OptionalTensor& group, double denominator, int64_t max_length, const Tensor& loss,
                    const Tensor& metrics, const Tensor& coefficient, const Tensor& scale) {
  const int64_t sequences = int64_t(spans.first.size()) - 1;
  std::vector<PolicySequence> common(sequences);
  if (options.importance != PolicyImportance::kToken || options.reweight == PolicyReweight::kPerplexity)
    common = first_pass<Real>(inputs, spans);
  if (options.reweight == PolicyReweight::kPerplexity) normalize_in_groups(group, common);
  Real* gradient = coefficient.numel() > 0 ? coefficient.mutable_data_ptr<Real>() : nullptr;
  std::vector<PolicySums> parts(spans.spans.size()), sums(sequences);
  for_spans(spans, [&](int64_t i, const PolicySpan& span) {
    policy_span<Real>(options, inputs, span, common[span.sequence], parts[i], gradient);
  });
  PolicySums all;
  for (int64_t b = 0; b < sequences; ++b) {
    for (int64_t i = spans.first[b]; i < spans.first[b + 1]; ++i) sums[b].add(parts[i]);
    all.add(sums[b]);
  }
  if (gradient != nullptr && options.importance == PolicyImportance::kSequence) {
    for_spans(spans, [&](int64_t, const PolicySpan& span) {
      const PolicySequence& own = common[span.sequence];
      const double slope = slope_of_sequence(options, own.mean_log_ratio(), sums[span.sequence]);
      if (slope != 0) add_slope<Real>(inputs.mask, span, slope, gradient);
    });
  }
  double total = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    const double own = policy_scale(options, sums[b].count, all.count, denominator, sequences, max_length);
    scale.mutable_data_ptr<Real>()[b] = Real(own);
    total += own == 0 ? 0 : own * sums[b].loss;
  }
  *loss.mutable_data_ptr<Real>() = Real(total);
  write_metrics<Real>(all, metrics);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_fwd_cpu(
    const Tensor& logp, const Tensor& old_logp, const Tensor& advantage, const Tensor& mask,
    const OptionalTensor& offsets, const OptionalTensor& group, const OptionalTensor& ref_logp,
    const OptionalTensor& entropy, const OptionalTensor& kl, const OptionalTensor& token_weight,
    const OptionalTensor& denominator, const std::vector<std::string>& choices, at::ArrayRef<double> numbers,
    std::optional<int64_t> max_length, bool with_gradient, int64_t workspace) {
  const PolicyOptions options = policy_options(choices, numbers);
  const Sequences sequences(logp, offsets, "logp");
  const auto sizes = logp.sizes();
  const PolicyInputs inputs = {sequences.tokens(logp, sizes, "logp"),
                               sequences.tokens(old_logp, sizes, "old_logp"),
                               sequences.advantages(advantage, sizes),
                               sequences.tokens(ref_logp, sizes, "ref_logp"),
                               sequences.tokens(entropy, sizes, "entropy"),
                               sequences.tokens(kl, sizes, "kl"),
                               sequences.tokens(token_weight, sizes, "token_weight"),
                               sequences.mask(mask, sizes)};
  bool use_double = denominator.has_value() && denominator->scalar_type() == at::kDouble;
  for (const Matrix* x : {&inputs.logp, &inputs.old_logp, &inputs.advantage, &inputs.ref_logp, &inputs.entropy,
                          &inputs.kl, &inputs.token_weight})
    use_double |= x->data != nullptr && x->dtype == Dtype::kDouble;
  const auto like = at::TensorOptions().dtype(use_double ? at::kDouble : at::kFloat);
  const Tensor loss = at::empty({}, like), metrics = at::empty({kPolicyMetrics}, like);
  // Zero where no sequence reaches.
  const Tensor coefficient = !with_gradient       ? at::empty({0}, like)
                             : sequences.packed() ? at::zeros(sizes, like)
                                                  : at::empty(sizes, like);
  const Tensor scale = at::empty({sequences.count}, like);
  const auto run = [&](auto type) {
    policy_forward<decltype(type)>(options, inputs, sequences.spans(), group, number_of(denominator),
                                   max_length.value_or(sequences.columns), loss, metrics, coefficient, scale);
  };
  use_double ? run(double()) : run(float());
  return {loss, metrics, coefficient, scale};
}

std::tuple<Tensor, Tensor, Tensor> policy_loss_bwd_cpu(const Tensor& grad_loss, const Tensor& coefficient,
                                                       const Tensor& scale, const Tensor& mask,
                                                       const OptionalTensor& offsets, double entropy_coef,
                                                       double kl_beta, std::array<bool, 3> output_mask,
                                                       int64_t workspace) {
  const Sequences sequences(mask, offsets, "mask");
  const auto sizes = mask.sizes();
  const BoolMatrix counted = sequences.mask(mask, sizes);
  TORCH_CHECK_VALUE(!output_mask[0] || (coefficient.sizes() == sizes && coefficient.is_contiguous()),
                    "coefficient has shape ", coefficient.sizes(), ", expected ", sizes, ", contiguous");
  checked(coefficient, "coefficient");
  TORCH_CHECK_TYPE(coefficient.scalar_type() == scale.scalar_type(), "coefficient has dtype ",
                   coefficient.scalar_type(), ", expected ", scale.scalar_type());
  const auto allocate = [&](bool wanted) {
    if (!wanted) return at::empty({0}, scale.options());
    return sequences.packed() ? at::zeros(sizes, scale.options()) : at::empty(sizes, scale.options());
  };
  const Tensor grad_logp = allocate(output_mask[0]), grad_entropy = allocate(output_mask[1]),
               grad_kl = allocate(output_mask[2]);
  const double upstream = checked(grad_loss, "grad_loss").item<double>();
  const PolicySpans spans = sequences.spans();
  const auto run = [&](auto type) {
    using Real = decltype(type);
    const Values<Real> scales(scale, {sequences.count}, "scale");
    for_spans(spans, [&](int64_t, const PolicySpan& span) {
      const double factor = double(scales.get()[span.sequence]) * upstream;
      if (output_mask[0])
        scale_span<Real>(span, factor, coefficient.const_data_ptr<Real>(), grad_logp.mutable_data_ptr<Real>());
      if (output_mask[1]) fill_span<Real>(counted, span, -entropy_coef * factor, grad_entropy.mutable_data_ptr<Real>());
      if (output_mask[2]) fill_span<Real>(counted, span, kl_beta * factor, grad_kl.mutable_data_ptr<Real>());
    });
  };
  scale.scalar_type() == at::kDouble ? run(double()) : run(float());
  return {grad_logp, grad_entropy, grad_kl};
}

}  // namespace
}  // namespace dlogp

TORCH_LIBRARY_IMPL(dlogp, CPU, library) {
  library.impl("_cpu_policy_loss_fwd", &dlogp::policy_loss_fwd_cpu);
  library.impl("_cpu_policy_loss_bwd", &dlogp::policy_loss_bwd_cpu);
}
