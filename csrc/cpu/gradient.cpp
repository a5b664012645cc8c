#include "gradient.h"

namespace dlogp {
namespace {

template <typename Real>
double value_of(const Real* values, int64_t row) {
  return values == nullptr ? 0 : double(values[row]);
}

// A divergence may be infinite; without a gradient it takes no part.
template <typename Real>
double product_of(const Real* grads, const Real* values, int64_t row) {
  const double grad = value_of(grads, row);
  return grad == 0 ? 0 : grad * double(values[row]);
}

}  // namespace

template <typename Real>
GradientTerms<Real> Upstream<Real>::terms(int model, int64_t row, const int64_t* target,
                                          const LogitTransform& transform) const {
  const ModelUpstream<Real>& own = models[model];
  const Real* other_lse = models[1 - model].lse;
  const Real* own_grad_kl = model == 0 ? grad_kl : grad_reverse_kl;
  const Real* other_grad_kl = model == 0 ? grad_reverse_kl : grad_kl;
  const Real* own_kl = model == 0 ? kl : reverse_kl;
  double grad_logp_sum = 0;
  for (int64_t k = 0; k < candidates; ++k)
    if (target[k] != ignore_index) grad_logp_sum += value_of(own.grad_logp, row * candidates + k);
  const double slope = transform.slope();
  const double constant = value_of(own.grad_lse, row) - grad_logp_sum - product_of(own.grad_entropy, own.entropy, row) -
                          product_of(own_grad_kl, own_kl, row) + value_of(other_grad_kl, row);
  return {own.lse[row],
          other_lse == nullptr ? Real(0) : other_lse[row],
          Real(slope * constant),
          Real(-slope * value_of(own.grad_entropy, row)),
          Real(slope * value_of(own_grad_kl, row)),
          Real(-slope * value_of(other_grad_kl, row))};
}

template <typename Real>
void logits_gradient(const Upstream<Real>& upstream, int model, int64_t row, const int64_t* target,
                     const LogitTransform& transform, const GradientTerms<Real>& terms, int64_t begin, int64_t count,
                     const Real* z, const Real* other_z, Real* grad) {
  // The other model's logits may be anything where no divergence has a gradient.
  if (other_z == nullptr || (terms.ratio_term == 0 && terms.other_term == 0))
    gradient_row(terms, count, z, grad);
  else
    gradient_row(terms, count, z, other_z, grad);
  const Real* grad_logp = upstream.models[model].grad_logp;
  if (grad_logp != nullptr) {
    for (int64_t k = 0; k < upstream.candidates; ++k) {
      const int64_t column = target[k] - begin;
      if (target[k] != upstream.ignore_index && column >= 0 && column < count)
        grad[column] += Real(transform.slope() * double(grad_logp[row * upstream.candidates + k]));
    }
  }
  if (transform.has_softcap()) softcap_gradient_row(transform, count, z, grad);
}

#define DLOGP_INSTANTIATE(Real)                                                                                   \
  template struct Upstream<Real>;                                                                                 \
  template void logits_gradient<Real>(const Upstream<Real>&, int, int64_t, const int64_t*, const LogitTransform&, \
                                      const GradientTerms<Real>&, int64_t, int64_t, const Real*, const Real*, Real*);
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
