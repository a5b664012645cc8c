// policy_loss and linear_policy_loss on the CPU, as implementations of the private schemas `_cpu_*`.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../csrc/cpu/linear_policy.h"
#include "heads.h"
#include "policy_checks.h"

namespace dlogp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

at::TensorOptions accumulated(bool use_double) {
  return at::TensorOptions().dtype(use_double ? at::kDouble : at::kFloat);
}

// Null where a gradient is not wanted.
template <typename Acc>
Acc* pointer_if(bool wanted, const Tensor& x) {
  return wanted ? x.mutable_data_ptr<Acc>() : nullptr;
}

// One number a token, zero where no sequence reaches; empty unless it is wanted.
Tensor allocate_tokens(const Sequences& sequences, at::IntArrayRef sizes, const at::TensorOptions& options,
                       bool wanted) {
  if (!wanted) return at::empty({0}, options);
  return sequences.packed() ? at::zeros(sizes, options) : at::empty(sizes, options);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_fwd(
    const Tensor& logp, const Tensor& old_logp, const Tensor& advantage, const Tensor& mask,
    const OptionalTensor& offsets, const OptionalTensor& group, const OptionalTensor& ref_logp,
    const OptionalTensor& entropy, const OptionalTensor& kl, const OptionalTensor& token_weight,
    const OptionalTensor& denominator, const std::vector<std::string>& str_options, at::ArrayRef<double> float_options,
    std::optional<int64_t> max_length, bool with_gradient, int64_t workspace) {
  const PolicyOptions options = policy_options(str_options, float_options);
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
  const Tensor groups =
      options.reweight == PolicyReweight::kPerplexity ? checked_group(group, sequences.count) : Tensor();
  const PolicyDivisor divisor = {number_of(denominator), max_length.value_or(sequences.columns)};
  const auto like = accumulated(use_double);
  const Tensor loss = at::empty({}, like), metrics = at::empty({kPolicyMetrics}, like);
  const Tensor grad_logp_unscaled = allocate_tokens(sequences, sizes, like, with_gradient);
  const Tensor scale = at::empty({sequences.count}, like);
  dispatch_accumulator(use_double, [&](auto type) {
    using Acc = decltype(type);
    PolicySums sums;
    *loss.mutable_data_ptr<Acc>() = Acc(policy_forward<Acc>(
        options, inputs, sequences.spans(), groups.defined() ? groups.const_data_ptr<int64_t>() : nullptr, divisor,
        sums, pointer_if<Acc>(grad_logp_unscaled.numel() > 0, grad_logp_unscaled), scale.mutable_data_ptr<Acc>()));
    write_metrics<Acc>(sums, metrics);
  });
  return {loss, metrics, grad_logp_unscaled, scale};
}

std::tuple<Tensor, Tensor, Tensor> policy_loss_bwd(const Tensor& grad_loss, const Tensor& grad_logp_unscaled,
                                                   const Tensor& scale, const Tensor& mask,
                                                   const OptionalTensor& offsets, double entropy_coef, double kl_beta,
                                                   std::array<bool, 3> output_mask, int64_t workspace) {
  const Sequences sequences(mask, offsets, "mask");
  const auto sizes = mask.sizes();
  const BoolMatrix counted = sequences.mask(mask, sizes);
  TORCH_CHECK_VALUE(!output_mask[0] || (grad_logp_unscaled.sizes() == sizes && grad_logp_unscaled.is_contiguous()),
                    "grad_logp_unscaled has shape ", grad_logp_unscaled.sizes(), ", expected ", sizes, ", contiguous");
  checked(grad_logp_unscaled, "grad_logp_unscaled");
  TORCH_CHECK_TYPE(grad_logp_unscaled.scalar_type() == scale.scalar_type(), "grad_logp_unscaled has dtype ",
                   grad_logp_unscaled.scalar_type(), ", expected ", scale.scalar_type());
  std::array<Tensor, 3> gradients;
  for (size_t i = 0; i < gradients.size(); ++i)
    gradients[i] = allocate_tokens(sequences, sizes, scale.options(), output_mask[i]);
  const double upstream = checked(grad_loss, "grad_loss").item<double>();
  dispatch_accumulator(scale.scalar_type() == at::kDouble, [&](auto type) {
    using Acc = decltype(type);
    const Values<Acc> scales(scale, {sequences.count}, "scale");
    policy_backward<Acc>(sequences.spans(), counted, grad_logp_unscaled.const_data_ptr<Acc>(), scales.get(), upstream,
                         entropy_coef, kl_beta,
                         {pointer_if<Acc>(output_mask[0], gradients[0]), pointer_if<Acc>(output_mask[1], gradients[1]),
                          pointer_if<Acc>(output_mask[2], gradients[2])});
  });
  return {gradients[0], gradients[1], gradients[2]};
}

// The rows of linear_policy_loss's schema.
struct PolicyRowArguments {
  const Tensor &old_logp, &advantage, &scale;
  const OptionalTensor &score, &ref_logp, &token_weight;
};

// The same, kept alive.
template <typename Acc>
struct PolicyRowValues {
  Values<Acc> old_logp, advantage, scale, score, ref_logp, token_weight;

  PolicyRowValues(int64_t rows, const PolicyRowArguments& given)
      : old_logp(given.old_logp, {rows}, "old_logp"),
        advantage(given.advantage, {rows}, "advantage"),
        scale(given.scale, {rows}, "scale"),
        score(given.score, {rows}, "score"),
        ref_logp(given.ref_logp, {rows}, "ref_logp"),
        token_weight(given.token_weight, {rows}, "token_weight") {}

  PolicyRows<Acc> get() const {
    return {old_logp.get(), advantage.get(), scale.get(), score.get(), ref_logp.get(), token_weight.get()};
  }
};

using LinearPolicyOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <int Models>
LinearPolicyOutputs linear_policy_of(const std::array<HeadArguments, Models>& given, const Tensor& target,
                                     int64_t ignore_index, const PolicyRowArguments& rows, const PolicyOptions& options,
                                     std::array<bool, 3> output_mask, int64_t workspace) {
  const CheckedHeads<Models> heads(given);
  const KeptRows kept = keep_rows(target, heads.rows(), heads.vocabulary(), ignore_index);
  const bool use_double = heads.any_double() || rows.scale.scalar_type() == at::kDouble;
  const auto like = accumulated(use_double);
  const auto& [hidden, weight, bias, transform] = given[0];
  const std::array<bool, 3> wanted = {output_mask[0], output_mask[1], output_mask[2] && bias.has_value()};
  const Tensor loss = at::empty({}, like), metrics = at::empty({kPolicyMetrics}, like);
  // Rows that do not count have no gradient.
  const Tensor grad_hidden = at::zeros(sizes_if(wanted[0], hidden.sizes()), like);
  const Tensor grad_weight = at::empty(sizes_if(wanted[1], weight.sizes()), like);
  const Tensor grad_bias = at::empty(sizes_if(wanted[2], weight.sizes().slice(0, 1)), like);
  heads.dispatch_product(use_double, [&](auto type) {
    using T = decltype(type);
    using Acc = Accumulator<T>;
    const PolicyRowValues<Acc> values(heads.rows(), rows);
    const HeadAccumulators<Acc> gradients = {pointer_if<Acc>(wanted[0], grad_hidden),
                                             pointer_if<Acc>(wanted[1], grad_weight),
                                             pointer_if<Acc>(wanted[2], grad_bias)};
    PolicySums sums;
    *loss.mutable_data_ptr<Acc>() =
        Acc(linear_policy<T, Models>(heads.heads, kept, options, values.get(), workspace, gradients, sums));
    write_metrics<Acc>(sums, metrics);
  });
  return {loss, metrics, grad_hidden, grad_weight, grad_bias};
}

LinearPolicyOutputs linear_policy_loss_fwd(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, at::ArrayRef<double> transform,
    const OptionalTensor& base_hidden, const OptionalTensor& base_weight, const OptionalTensor& base_bias,
    at::ArrayRef<double> base_transform, const Tensor& target, int64_t ignore_index, const Tensor& old_logp,
    const Tensor& advantage, const Tensor& scale, const OptionalTensor& score, const OptionalTensor& ref_logp,
    const OptionalTensor& token_weight, const std::vector<std::string>& str_options, at::ArrayRef<double> float_options,
    std::array<bool, 3> output_mask, int64_t workspace) {
  const PolicyOptions options = policy_options(str_options, float_options);
  TORCH_CHECK_VALUE(options.importance == PolicyImportance::kToken, "importance is '", str_options[3],
                    "', expected 'token'");
  TORCH_CHECK_VALUE(options.reweight != PolicyReweight::kPerplexity || score.has_value(),
                    "score is missing, expected [N] for reweight 'ppl'");
  TORCH_CHECK_VALUE(base_hidden.has_value() == base_weight.has_value(),
                    "base_hidden and base_weight are expected together");
  TORCH_CHECK_VALUE(target.dim() == 2 && target.size(1) == 1, "target has shape ", target.sizes(), ", expected [N, 1]");
  const HeadArguments model = {hidden, weight, bias, transform_of(transform)};
  const PolicyRowArguments rows = {old_logp, advantage, scale, score, ref_logp, token_weight};
  if (!base_hidden.has_value())
    return linear_policy_of<1>({model}, target, ignore_index, rows, options, output_mask, workspace);
  const HeadArguments base = {*base_hidden, *base_weight, base_bias, transform_of(base_transform)};
  return linear_policy_of<2>({model, base}, target, ignore_index, rows, options, output_mask, workspace);
}

// gradient · factor, in `dtype`; empty unless wanted.
Tensor scaled(const Tensor& gradient, double factor, at::ScalarType dtype, bool wanted) {
  TORCH_CHECK_TYPE(gradient.scalar_type() == at::kFloat || gradient.scalar_type() == at::kDouble,
                   "a gradient has dtype ", gradient.scalar_type(), ", expected float32 or float64");
  const Tensor result = at::empty(sizes_if(wanted, gradient.sizes()), gradient.options().dtype(dtype));
  if (!wanted) return result;
  const Tensor from = checked(gradient, "a gradient").contiguous();
  if (result.numel() == 0) return result;
  dispatch_accumulator(gradient.scalar_type() == at::kDouble, [&](auto type) {
    scale_gradient(from.numel(), factor, from.const_data_ptr<decltype(type)>(), output_of(result, 0));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> linear_policy_loss_bwd(const Tensor& grad_loss, const Tensor& grad_hidden,
                                                          const Tensor& grad_weight, const Tensor& grad_bias,
                                                          at::ScalarType hidden_dtype, at::ScalarType weight_dtype,
                                                          at::ScalarType bias_dtype, std::array<bool, 3> output_mask,
                                                          int64_t workspace) {
  const double factor = checked(grad_loss, "grad_loss").item<double>();
  return {scaled(grad_hidden, factor, hidden_dtype, output_mask[0]),
          scaled(grad_weight, factor, weight_dtype, output_mask[1]),
          scaled(grad_bias, factor, bias_dtype, output_mask[2])};
}

}  // namespace

void register_policy(torch::Library& library) {
  library.impl("_cpu_policy_loss_fwd", &policy_loss_fwd);
  library.impl("_cpu_policy_loss_bwd", &policy_loss_bwd);
  library.impl("_cpu_linear_policy_loss_fwd", &linear_policy_loss_fwd);
  library.impl("_cpu_linear_policy_loss_bwd", &linear_policy_loss_bwd);
}

}  // namespace dlogp
