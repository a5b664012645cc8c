// From the upstream gradients of a row's statistics to the gradient of its logits, a range of the vocabulary at a time.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/logit_transform.h"
#include "fold.h"

namespace dlogp {

// Of one model, over all N rows, max and rest as in statistics.h. Upstream gradients may be null, which counts as
// zero.
template <typename Acc>
struct ModelUpstream {
  const Acc *grad_logp, *grad_entropy, *grad_lse;
  const Acc *entropy, *max, *rest;
};

template <typename Acc>
double value_of(const Acc* values, int64_t row) {
  return values == nullptr ? 0 : double(values[row]);
}

// A divergence may be infinite; without a gradient it takes no part.
template <typename Acc>
double product_of(const Acc* grads, const Acc* values, int64_t row) {
  const double grad = value_of(grads, row);
  return grad == 0 ? 0 : grad * double(values[row]);
}

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
  GradientTerms<Acc> terms(int model, int64_t row, const int64_t* target, const LogitTransform& transform) const {
    const ModelUpstream<Acc>& own = models[model];
    const ModelUpstream<Acc>& other = models[1 - model];
    const Acc* own_grad_kl = model == 0 ? grad_kl : grad_reverse_kl;
    const Acc* other_grad_kl = model == 0 ? grad_reverse_kl : grad_kl;
    const Acc* own_kl = model == 0 ? kl : reverse_kl;
    double grad_logp_sum = 0;
    for (int64_t k = 0; k < candidates; ++k)
      if (target[k] != ignore_index) grad_logp_sum += value_of(own.grad_logp, row * candidates + k);
    const double derivative = transform.derivative();
    const double constant = value_of(own.grad_lse, row) - grad_logp_sum -
                            product_of(own.grad_entropy, own.entropy, row) - product_of(own_grad_kl, own_kl, row) +
                            value_of(other_grad_kl, row);
    return {own.max[row],
            Acc(std::log1p(value_of(own.rest, row))),
            Acc(value_of(other.max, row)),
            Acc(std::log1p(value_of(other.rest, row))),
            Acc(derivative * constant),
            Acc(-derivative * value_of(own.grad_entropy, row)),
            Acc(derivative * value_of(own_grad_kl, row)),
            Acc(-derivative * value_of(other_grad_kl, row))};
  }
};

// grad[i] of the raw logits begin + i, given the transformed z; `other_z` are the other model's logits, null for one
// model alone.
template <typename Acc>
void logits_gradient(const Upstream<Acc>& upstream, int model, int64_t row, const int64_t* target,
                     const LogitTransform& transform, const GradientTerms<Acc>& terms, int64_t begin, int64_t count,
                     const Acc* z, const Acc* other_z, Acc* grad) {
  // The other model's logits may be anything where no divergence has a gradient.
  if (other_z == nullptr || (terms.ratio_term == 0 && terms.other_term == 0))
    gradient_row(terms, count, z, grad);
  else
    gradient_row(terms, count, z, other_z, grad);
  const Acc* grad_logp = upstream.models[model].grad_logp;
  if (grad_logp != nullptr) {
    for (int64_t k = 0; k < upstream.candidates; ++k) {
      const int64_t column = target[k] - begin;
      if (target[k] != upstream.ignore_index && column >= 0 && column < count)
        grad[column] += Acc(transform.derivative() * double(grad_logp[row * upstream.candidates + k]));
    }
  }
  if (transform.has_softcap()) softcap_gradient_row(transform, count, z, grad);
}

}  // namespace dlogp
