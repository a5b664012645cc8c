// The policy loss of a few tokens next to each other: losses, the gradient by logp, sums for the metrics.
// float: vectorised, in float32 within a call and in float64 between calls. double: the same in float64.
#pragma once

#include <cstdint>

#include "../common/policy.h"

namespace dlogp {

// So few that their numbers stay in the first cache.
constexpr int64_t kTokensPerBlock = 256;

// Over the tokens of a sequence or of all: sums, and maxima, of what is to become the metrics.
struct PolicySums {
  double count = 0, loss = 0, slope = 0;
#define DLOGP_FIELD(name) double name = 0;
  DLOGP_POLICY_METRICS(DLOGP_FIELD, DLOGP_FIELD)
#undef DLOGP_FIELD

  void add(const PolicySums& other);
};

// The caller fills what is above the line, with finite numbers where `mask` is 0; `log_ratio` only where it is that
// of their sequence, `score` only to reweight by perplexity.
template <typename Acc>
struct PolicyTokens {
  Acc mask[kTokensPerBlock], logp[kTokensPerBlock], old_logp[kTokensPerBlock], advantage[kTokensPerBlock];
  Acc score[kTokensPerBlock];
  Acc ref_logp[kTokensPerBlock], entropy[kTokensPerBlock], kl[kTokensPerBlock], token_weight[kTokensPerBlock];
  Acc log_ratio = 0;
  bool has_ref_logp = false, has_entropy = false, has_kl = false, has_token_weight = false;
  // ----
  Acc weight[kTokensPerBlock], loss[kTokensPerBlock], grad_logp_unscaled[kTokensPerBlock];
};

// Sets `loss`, and `grad_logp_unscaled`: the gradient of the unscaled loss by logp; both are 0 where `mask` is. Where a
// ratio is that of a sequence (kSequence), the latter lacks ∂/∂ log r, whose sum goes to sums.slope (`add_slope` puts
// it in), but for CISPO. Adds to `sums`.
template <typename Acc>
void policy_tokens(const PolicyOptions& options, int64_t count, PolicyTokens<Acc>& tokens, PolicySums& sums);

// What a token's grad_logp_unscaled gets of a sequence's ratio: ∂/∂ log r of the sequence, out of sums over it.
double slope_of_sequence(const PolicyOptions& options, double log_ratio, const PolicySums& sums);

}  // namespace dlogp
