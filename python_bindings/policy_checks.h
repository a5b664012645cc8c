// What the ops of the policy loss have in common: their options, and tokens as the kernels take them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "../csrc/cpu/policy_loss.h"
#include "checks.h"

namespace dlogp {

template <typename Choice, size_t count>
Choice choice_of(const std::pair<std::string_view, Choice> (&choices)[count], std::string_view name, const char* what) {
  for (const auto& [known, choice] : choices)
    if (name == known) return choice;
  TORCH_CHECK_VALUE(false, what, " is '", name, "', expected one of those of reference/policy.py");
}

// The arguments that reference.policy.PolicyOptions makes of itself.
inline PolicyOptions policy_options(const std::vector<std::string>& str_options, at::ArrayRef<double> float_options) {
  TORCH_CHECK_VALUE(str_options.size() == 4 && float_options.size() == 8, "str_options and float_options have ",
                    str_options.size(), " and ", float_options.size(), " elements, expected 4 and 8");
  using Loss = std::pair<PolicySurrogate, PolicyDenominator>;
  constexpr std::pair<std::string_view, Loss> losses[] = {
      {"dapo", {PolicySurrogate::kClipped, PolicyDenominator::kTokens}},
      {"bnpo", {PolicySurrogate::kClipped, PolicyDenominator::kTokens}},
      {"grpo", {PolicySurrogate::kClipped, PolicyDenominator::kSequences}},
      {"dr_grpo", {PolicySurrogate::kClipped, PolicyDenominator::kMaxLength}},
      {"cispo", {PolicySurrogate::kCispo, PolicyDenominator::kTokens}},
      {"sapo", {PolicySurrogate::kSapo, PolicyDenominator::kSequences}}};
  constexpr std::pair<std::string_view, PolicyReweight> reweights[] = {{"none", PolicyReweight::kNone},
                                                                       {"low_prob", PolicyReweight::kLowProb},
                                                                       {"dominate", PolicyReweight::kDominate},
                                                                       {"ppl", PolicyReweight::kPerplexity}};
  constexpr std::pair<std::string_view, PolicySign> signs[] = {
      {"both", PolicySign::kBoth}, {"positive", PolicySign::kPositive}, {"negative", PolicySign::kNegative}};
  constexpr std::pair<std::string_view, PolicyImportance> importances[] = {
      {"token", PolicyImportance::kToken},
      {"sequence", PolicyImportance::kSequence},
      {"sequence_token", PolicyImportance::kSequenceToken}};
  PolicyOptions options;
  std::tie(options.surrogate, options.denominator) = choice_of(losses, str_options[0], "loss_type");
  options.reweight = choice_of(reweights, str_options[1], "reweight");
  options.reweight_sign = choice_of(signs, str_options[2], "reweight_sign");
  options.importance = choice_of(importances, str_options[3], "importance");
  auto number = float_options.begin();
  for (double* to : {&options.alpha, &options.clip_low, &options.clip_high, &options.dual_clip, &options.kl_beta,
                     &options.entropy_coef, &options.sapo_temperature_pos, &options.sapo_temperature_neg})
    *to = *number++;
  return options;
}

// Sequences (B, T), or packed (N,) with offsets (B + 1,) within [0, N].
struct Sequences {
  at::Tensor offsets;
  int64_t count, columns;

  Sequences(const at::Tensor& tokens, const std::optional<at::Tensor>& given_offsets, const char* name) {
    TORCH_CHECK_VALUE(tokens.device().is_cpu(), name, " is on ", tokens.device(), ", expected cpu");
    if (!given_offsets.has_value()) {
      TORCH_CHECK_VALUE(tokens.dim() == 2, name, " has ", tokens.dim(), " dimensions, expected 2");
      count = tokens.size(0);
      columns = tokens.size(1);
      return;
    }
    TORCH_CHECK_VALUE(tokens.dim() == 1, name, " has ", tokens.dim(), " dimensions, expected 1");
    TORCH_CHECK_VALUE(given_offsets->dim() == 1 && given_offsets->size(0) > 0 && given_offsets->device().is_cpu(),
                      "offsets has shape ", given_offsets->sizes(), ", expected [B + 1], on the CPU");
    TORCH_CHECK_TYPE(given_offsets->scalar_type() == at::kLong, "offsets has dtype ", given_offsets->scalar_type(),
                     ", expected int64");
    offsets = checked(*given_offsets, "offsets").contiguous();
    count = offsets.size(0) - 1;
    columns = tokens.size(0);
    for (int64_t b = 0; b <= count; ++b) {
      const int64_t low = b == 0 ? 0 : begin_of(b - 1);
      TORCH_CHECK_VALUE(low <= begin_of(b) && begin_of(b) <= columns, "offsets[", b, "] is ", begin_of(b),
                        ", expected a number in [", low, ", ", columns, "]");
    }
  }

  bool packed() const { return offsets.defined(); }
  const int64_t* begins() const { return packed() ? offsets.const_data_ptr<int64_t>() : nullptr; }
  int64_t begin_of(int64_t sequence) const { return begins()[sequence]; }
  PolicySpans spans() const { return policy_spans(count, columns, begins()); }

  // One number a token.
  Matrix tokens(const std::optional<at::Tensor>& x, at::IntArrayRef sizes, const char* name) const {
    if (!x.has_value()) return {};
    check(*x, sizes, name);
    const int64_t row_stride = packed() ? 0 : x->stride(0);
    return {x->const_data_ptr(), dtype_of(*x), count, columns, row_stride, x->stride(-1)};
  }

  // One number a sequence, or a token.
  Matrix advantages(const at::Tensor& x, at::IntArrayRef sizes) const {
    if (x.dim() != 1 || x.size(0) != count) return tokens(x, sizes, "advantage");
    check(x, {count}, "advantage");
    return {x.const_data_ptr(), dtype_of(x), count, columns, x.stride(0), 0};
  }

  BoolMatrix mask(const at::Tensor& x, at::IntArrayRef sizes) const {
    check(x, sizes, "mask");
    TORCH_CHECK_TYPE(x.scalar_type() == at::kBool, "mask has dtype ", x.scalar_type(), ", expected bool");
    return {static_cast<const uint8_t*>(x.const_data_ptr()), packed() ? 0 : x.stride(0), x.stride(-1)};
  }

 private:
  static void check(const at::Tensor& x, at::IntArrayRef sizes, const char* name) {
    TORCH_CHECK_VALUE(x.sizes() == sizes, name, " has shape ", x.sizes(), ", expected ", sizes);
    checked(x, name);
  }
};

inline double number_of(const std::optional<at::Tensor>& denominator) {
  if (!denominator.has_value()) return -1;
  TORCH_CHECK_VALUE(denominator->numel() == 1 && denominator->device().is_cpu(), "denominator has shape ",
                    denominator->sizes(), ", expected one number on the CPU");
  const double number = checked(*denominator, "denominator").item<double>();
  TORCH_CHECK_VALUE(number >= 0 && std::isfinite(number), "denominator is ", number, ", expected a number in [0, ∞)");
  return number;
}

// `group` of each sequence, contiguous.
inline at::Tensor checked_group(const std::optional<at::Tensor>& group, int64_t sequences) {
  TORCH_CHECK_VALUE(group.has_value(), "group is missing, expected [B] for reweight 'ppl'");
  TORCH_CHECK_VALUE(group->dim() == 1 && group->size(0) == sequences && group->device().is_cpu(), "group has shape ",
                    group->sizes(), ", expected [", sequences, "]");
  TORCH_CHECK_TYPE(group->scalar_type() == at::kLong, "group has dtype ", group->scalar_type(), ", expected int64");
  return checked(*group, "group").contiguous();
}

#define DLOGP_ONE(name) +1
constexpr int64_t kPolicyMetrics = 0 DLOGP_POLICY_METRICS(DLOGP_ONE, DLOGP_ONE);
#undef DLOGP_ONE

template <typename Acc>
void write_metrics(const PolicySums& sums, const at::Tensor& metrics) {
  const double scale = sums.count > 0 ? 1 / sums.count : 0;
  Acc* to = metrics.mutable_data_ptr<Acc>();
#define DLOGP_WRITE_MEAN(name) *to++ = Acc(sums.name * scale);
#define DLOGP_WRITE_MAX(name) *to++ = Acc(sums.name);
  DLOGP_POLICY_METRICS(DLOGP_WRITE_MEAN, DLOGP_WRITE_MAX)
#undef DLOGP_WRITE_MEAN
#undef DLOGP_WRITE_MAX
}

}  // namespace dlogp
