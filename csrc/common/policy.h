// The formulas of the policy loss of one token (the definition: dlogp_kernels/reference/policy.py), with r the
// importance ratio, A the reweighted advantage.
#pragma once

#include <limits>

#include "host_device.h"

namespace dlogp {

enum class PolicySurrogate { kClipped, kCispo, kSapo };
enum class PolicyReweight { kNone, kLowProb, kDominate, kPerplexity };
enum class PolicySign { kBoth, kPositive, kNegative };
// Whose ratio counts. Through that of a sequence, a token's gradient is the mean over the sequence; of kSequenceToken
// it is the token's own.
enum class PolicyImportance { kToken, kSequence, kSequenceToken };
// What the sum of the token losses of a sequence is divided by.
enum class PolicyDenominator { kTokens, kSequences, kMaxLength };

constexpr double kLogRatioLimit = 20;
constexpr double kGroupEpsilon = 1e-6;

struct PolicyOptions {
  PolicySurrogate surrogate = PolicySurrogate::kClipped;
  PolicyDenominator denominator = PolicyDenominator::kTokens;
  PolicyReweight reweight = PolicyReweight::kLowProb;
  PolicySign reweight_sign = PolicySign::kBoth;
  PolicyImportance importance = PolicyImportance::kToken;
  double alpha = 0.1;
  double clip_low = 0.2, clip_high = 0.28;
  double dual_clip = std::numeric_limits<double>::infinity();
  double kl_beta = 0, entropy_coef = 0;
  double sapo_temperature_pos = 1, sapo_temperature_neg = 1.05;
};

// What forward reports of the tokens that count, in the order of PolicyMetrics of results.py: a mean, or a maximum.
#define DLOGP_POLICY_METRICS(MEAN, MAX) \
  MEAN(clip_low)                        \
  MEAN(clip_high)                       \
  MEAN(clip_dual)                       \
  MEAN(approx_kl)                       \
  MEAN(mean_ratio)                      \
  MAX(max_ratio)                        \
  MEAN(mean_weight)                     \
  MEAN(ref_kl)                          \
  MEAN(entropy)

// What the ratio contributes to the loss of a token, that by log r (of CISPO by log π), and which bound took it away.
template <typename Acc>
struct PolicyTerm {
  Acc loss, slope;
  bool low, high, dual;
};

// max(−A r, −A clip(r, low, high)), at most −A·dual where A < 0. NaN is kept.
template <typename Acc>
DLOGP_HOST_DEVICE inline PolicyTerm<Acc> clipped_term(Acc ratio, Acc advantage, Acc low, Acc high, Acc dual) {
  const bool is_low = advantage < 0 && ratio < low, is_high = advantage > 0 && ratio > high;
  const bool is_dual = advantage < 0 && ratio > dual;
  const Acc bound = is_low ? low : is_high ? high : is_dual ? dual : ratio;
  return {-advantage * bound, is_low || is_high || is_dual ? Acc(0) : -advantage * ratio, is_low, is_high, is_dual};
}

// −A·min(r, high)·log π, the ratio a constant.
template <typename Acc>
DLOGP_HOST_DEVICE inline PolicyTerm<Acc> cispo_term(Acc ratio, Acc advantage, Acc logp, Acc high) {
  const Acc slope = -advantage * (ratio > high ? high : ratio);
  return {slope * logp, slope, false, advantage > 0 && ratio > high, false};
}

// −A·4/τ·sigmoid(τ(r − 1)); `exponential` is e^{−τ(r − 1)}, so that 1 − sigmoid does not cancel.
template <typename Acc>
DLOGP_HOST_DEVICE inline PolicyTerm<Acc> sapo_term(Acc ratio, Acc advantage, Acc temperature, Acc exponential) {
  const Acc sigmoid = 1 / (1 + exponential), four = -4 * advantage * sigmoid;
  return {four / temperature, four * (exponential * sigmoid) * ratio, false, false, false};
}

// k3(x) = eˣ − x − 1, `exponential` being eˣ; near 0, where that cancels, its series.
template <typename Acc>
DLOGP_HOST_DEVICE inline Acc k3_of(Acc x, Acc exponential) {
  Acc series = Acc(1) / 40320;
  series = series * x + Acc(1) / 5040;
  series = series * x + Acc(1) / 720;
  series = series * x + Acc(1) / 120;
  series = series * x + Acc(1) / 24;
  series = series * x + Acc(1) / 6;
  series = series * x + Acc(0.5);
  // The first term left out is x⁹ / 9!, 2e-9 of the result.
  const Acc bound = sizeof(Acc) == 4 ? Acc(0.09) : Acc(0);
  return x * x < bound ? series * x * x : exponential - x - 1;
}

}  // namespace dlogp
