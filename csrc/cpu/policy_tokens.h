// The policy loss of a few tokens next to each other: losses, the gradient by logp, sums for the metrics.
// float: vectorised, in float32 within a call and in float64 between calls. double: the same in float64.
#pragma once

#include <cstdint>

#include "../common/policy.h"

namespace dlogp {

// So few that their numbers stay in the first cache.
constexpr int64_t kPolicyTokens = 256;

// Over the tokens of a sequence or of all; the definition of each: PolicyMetrics.
struct PolicySums {
  double count = 0, loss = 0, slope = 0;
  double clip_low = 0, clip_high = 0, clip_dual = 0, approx_kl = 0, ratio = 0, max_ratio = 0, weight = 0, ref_kl = 0,
         entropy = 0;

  void add(const PolicySums& other);
};

// The caller fills what is above the line, with finite numbers where `mask` is 0; `log_ratio` only where it is that
// of their sequence, `score` only to reweight by perplexity.
template <typename Real>
struct PolicyTokens {
  Real mask[kPolicyTokens], logp[kPolicyTokens], old_logp[kPolicyTokens], advantage[kPolicyTokens];
  Real score[kPolicyTokens];
  Real ref_logp[kPolicyTokens], entropy[kPolicyTokens], kl[kPolicyTokens], token_weight[kPolicyTokens];
  Real log_ratio = 0;
  bool has_ref_logp = false, has_entropy = false, has_kl = false, has_token_weight = false;
  // ----
  Real weight[kPolicyTokens], loss[kPolicyTokens], coefficient[kPolicyTokens];
};

// Sets `loss`, and `coefficient`: the gradient of the unscaled loss by logp; both are 0 where `mask` is. Where a ratio
// is that of a sequence (kSequence), the latter lacks ∂/∂ log r, whose sum goes to sums.slope (`add_slope` puts it in),
// but for CISPO. Adds to `sums`.
void policy_tokens(const PolicyOptions& options, int64_t count, PolicyTokens<float>& tokens, PolicySums& sums);
void policy_tokens(const PolicyOptions& options, int64_t count, PolicyTokens<double>& tokens, PolicySums& sums);

// What a token's coefficient gets of a sequence's ratio: ∂/∂ log r of the sequence, out of sums over it.
double slope_of_sequence(const PolicyOptions& options, double log_ratio, const PolicySums& sums);

}  // namespace dlogp
