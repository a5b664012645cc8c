// From the upstream gradients of a row's statistics to the gradient of its logits, a range of the vocabulary at a time.
#pragma once

#include <cstdint>

#include "../common/logit_transform.h"
#include "fold.h"

namespace dlogp {

// Of one model, over all N rows. Upstream gradients may be null, which counts as zero.
template <typename Real>
struct ModelUpstream {
  const Real *grad_logp, *grad_entropy, *grad_lse;
  const Real *entropy, *lse;
};

// Of one model, or of a pair: then models[1] is the base model.
template <typename Real>
struct Upstream {
  ModelUpstream<Real> models[2];
  const Real *grad_kl = nullptr, *grad_reverse_kl = nullptr;
  const Real *kl = nullptr, *reverse_kl = nullptr;
  int64_t candidates = 1, ignore_index = -100;

  // The terms of row `row` for `model`; `target` (candidates) are its targets.
  GradientTerms<Real> terms(int model, int64_t row, const int64_t* target, const LogitTransform& transform) const;
};

// grad[i] of the raw logits begin + i, given the transformed z; `other_z` are the other model's logits, null for one
// model alone.
template <typename Real>
void logits_gradient(const Upstream<Real>& upstream, int model, int64_t row, const int64_t* target,
                     const LogitTransform& transform, const GradientTerms<Real>& terms, int64_t begin, int64_t count,
                     const Real* z, const Real* other_z, Real* grad);

}  // namespace dlogp
