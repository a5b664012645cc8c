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

// What the ratio contributes to the loss of a token, that by log r (of CISPO by log π), and which bound took it away.
template <typename Real>
struct PolicyTerm {
  Real loss, slope;
  bool low, high, dual;
};

// max(−A r, −A clip(r, low, high)), at most −A·dual where A < 0. NaN is kept.
template <typename Real>
DLOGP_HOST_DEVICE inline PolicyTerm<Real> clipped_term(Real ratio, Real advantage, Real low, Real high, Real dual) {
  const bool is_low = advantage < 0 && ratio < low, is_high = advantage > 0 && ratio > high;
  const bool is_dual = advantage < 0 && ratio > dual;
  const Real bound = is_low ? low : is_high ? high : is_dual ? dual : ratio;
  return {-advantage * bound, is_low || is_high || is_dual ? Real(0) : -advantage * ratio, is_low, is_high, is_dual};
}

// −A·min(r, high)·log π, the ratio a constant.
template <typename Real>
DLOGP_HOST_DEVICE inline PolicyTerm<Real> cispo_term(Real ratio, Real advantage, Real logp, Real high) {
  const Real slope = -advantage * (ratio > high ? high : ratio);
  return {slope * logp, slope, false, advantage > 0 && ratio > high, false};
}

// −A·4/τ·sigmoid(τ(r − 1)); `exponential` is e^{−τ(r − 1)}, so that 1 − sigmoid does not cancel.
template <typename Real>
DLOGP_HOST_DEVICE inline PolicyTerm<Real> sapo_term(Real ratio, Real advantage, Real temperature, Real exponential) {
  const Real sigmoid = 1 / (1 + exponential), four = -4 * advantage * sigmoid;
  return {four / temperature, four * (exponential * sigmoid) * ratio, false, false, false};
}

// k3(x) = eˣ − x − 1, `exponential` being eˣ; near 0, where that cancels, its series.
template <typename Real>
DLOGP_HOST_DEVICE inline Real k3_of(Real x, Real exponential) {
  Real series = Real(1) / 40320;
  series = series * x + Real(1) / 5040;
  series = series * x + Real(1) / 720;
  series = series * x + Real(1) / 120;
  series = series * x + Real(1) / 24;
  series = series * x + Real(1) / 6;
  series = series * x + Real(0.5);
  // The first term left out is x⁹ / 9!, 2e-9 of the result.
  const Real bound = sizeof(Real) == 4 ? Real(0.09) : Real(0);
  return x * x < bound ? series * x * x : exponential - x - 1;
}

}  // namespace dlogp
