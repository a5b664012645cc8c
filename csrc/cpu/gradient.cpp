#include "gradient.h"

namespace dlogp {
namespace {

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

}  // namespace

template <typename Acc>
GradientTerms<Acc> Upstream<Acc>::terms(int model, int64_t row, const int64_t* target,
                                        const LogitTransform& transform) const {
  const ModelUpstream<Acc>& own = models[model];
  const ModelUpstream<Acc>& other = models[1 - model];
  const Acc* own_grad_kl = model == 0 ? grad_kl : grad_reverse_kl;
  const Acc* other_grad_kl = model == 0 ? grad_reverse_kl : grad_kl;
  const Acc* own_kl = model == 0 ? kl : reverse_kl;
  double grad_logp_sum = 0;
  for (int64_t k = 0; k < candidates; ++k)
    if (target[k] != ignore_index) grad_logp_sum += value_of(own.grad_logp, row * candidates + k);
  const double derivative = transform.derivative();
  const double constant = value_of(own.grad_lse, row) - grad_logp_sum - product_of(own.grad_entropy, own.entropy, row) -
                          product_of(own_grad_kl, own_kl, row) + value_of(other_grad_kl, row);
  return {own.max[row],
          own.log_sum[row],
          Acc(value_of(other.max, row)),
          Acc(value_of(other.log_sum, row)),
          Acc(derivative * constant),
          Acc(-derivative * value_of(own.grad_entropy, row)),
          Acc(derivative * value_of(own_grad_kl, row)),
          Acc(-derivative * value_of(other_grad_kl, row))};
}

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

#define DLOGP_INSTANTIATE(Acc)                                                                                  \
  template struct Upstream<Acc>;                                                                                \
  template void logits_gradient<Acc>(const Upstream<Acc>&, int, int64_t, const int64_t*, const LogitTransform&, \
                                     const GradientTerms<Acc>&, int64_t, int64_t, const Acc*, const Acc*, Acc*);
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
