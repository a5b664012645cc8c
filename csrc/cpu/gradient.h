// From the upstream gradients of a row's statistics to the gradient of its logits, a range of the vocabulary at a time.
#pragma once

#include <cstdint>

#include "../common/logit_transform.h"
#include "fold.h"

namespace dlogp {

// Of one model, over all N rows, max and log_sum as in statistics.h. Upstream gradients may be null, which counts as
// zero.
template <typename Acc>
struct ModelUpstream {
  const Acc *grad_logp, *grad_entropy, *grad_lse;
  const Acc *entropy, *max, *log_sum;
};

// Of one model, or of a pair: then models[1] is the base model.
template <typename Acc>
struct Upstream {
  ModelUpstream<Acc> models[2];
  const Acc *grad_kl = nullptr, *grad_reverse_kl = nullptr;
  const Acc *kl = nullptr, *reverse_kl = nullptr;
  int64_t candidates = 1, ignore_index = -100;

  bool has_divergence() const { return grad_kl != nullptr || grad_reverse_kl != nullptr; }
  // Of one of the pair's models, if there is no divergence.
  Upstream of_model(int model) const {
    return {{models[model], {}}, nullptr, nullptr, nullptr, nullptr, candidates, ignore_index};
  }
  // The terms of row `row` for `model`; `target` (candidates) are its targets.
  GradientTerms<Acc> terms(int model, int64_t row, const int64_t* target, const LogitTransform& transform) const;
};

// grad[i] of the raw logits begin + i, given the transformed z; `other_z` are the other model's logits, null for one
// model alone.
template <typename Acc>
void logits_gradient(const Upstream<Acc>& upstream, int model, int64_t row, const int64_t* target,
                     const LogitTransform& transform, const GradientTerms<Acc>& terms, int64_t begin, int64_t count,
                     const Acc* z, const Acc* other_z, Acc* grad);

}  // namespace dlogp
