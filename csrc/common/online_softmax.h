// The running state of a softmax over a vocabulary that is seen in pieces, and how two pieces merge.
//
// With z the logits of a model, m (nearly) their maximum so far and d = z − m:
//   sum = Σ e^d        weighted = Σ e^d·d
// and for a pair, with the base model's d_B = z_B − m_B:
//   cross = Σ e^d·(d − d_B)        base_cross = Σ e^{d_B}·(d_B − d)
// Centring on both maxima keeps the sums small, so that a common offset of the logits costs no accuracy. From them
//   lse = m + log sum,   entropy = log sum − weighted / sum,   kl = cross / sum − log sum + log base_sum.
#pragma once

#include <cmath>
#include <limits>

#include "host_device.h"

namespace dlogp {

template <typename Real>
struct SoftmaxState {
  Real max = -std::numeric_limits<Real>::infinity();
  double sum = 0;
  double weighted = 0;

  DLOGP_HOST_DEVICE bool empty() const { return sum == 0; }
  DLOGP_HOST_DEVICE double log_sum() const { return std::log(sum); }
  DLOGP_HOST_DEVICE double lse() const { return max + log_sum(); }
  DLOGP_HOST_DEVICE double entropy() const { return log_sum() - weighted / sum; }
  DLOGP_HOST_DEVICE double logp(Real z) const { return (double(z) - double(max)) - log_sum(); }
};

template <typename Real>
struct PairState {
  SoftmaxState<Real> model, base;
  double cross = 0, base_cross = 0;
  // Some token is possible for one model and impossible (z = −inf) for the other; then the cross sum leaves it out.
  bool model_alone = false, base_alone = false;

  DLOGP_HOST_DEVICE double kl() const { return divergence(model, base, cross, model_alone); }
  DLOGP_HOST_DEVICE double reverse_kl() const { return divergence(base, model, base_cross, base_alone); }

 private:
  DLOGP_HOST_DEVICE static double divergence(const SoftmaxState<Real>& p, const SoftmaxState<Real>& q, double cross,
                                             bool alone) {
    if (alone) return std::numeric_limits<double>::infinity();
    const double kl = cross / p.sum - p.log_sum() + q.log_sum();
    return kl < 0 ? 0 : kl;  // keeps NaN
  }
};

// e^shift and shift for moving a state's maximum up to `max`; an empty state has nothing to move.
template <typename Real>
DLOGP_HOST_DEVICE inline double shift_to(const SoftmaxState<Real>& state, Real max) {
  return state.empty() ? 0 : double(state.max) - double(max);
}

template <typename Real>
DLOGP_HOST_DEVICE inline void rebase(SoftmaxState<Real>& state, Real max) {
  const double shift = shift_to(state, max);
  if (shift != 0) {
    const double factor = std::exp(shift);
    state.weighted = factor * (state.weighted + shift * state.sum);
    state.sum *= factor;
  }
  state.max = max;
}

template <typename Real>
DLOGP_HOST_DEVICE inline void rebase(PairState<Real>& state, Real max, Real base_max) {
  const double shift = shift_to(state.model, max);
  const double base_shift = shift_to(state.base, base_max);
  if (shift != 0 || base_shift != 0) {
    state.cross = std::exp(shift) * (state.cross + (shift - base_shift) * state.model.sum);
    state.base_cross = std::exp(base_shift) * (state.base_cross + (base_shift - shift) * state.base.sum);
  }
  rebase(state.model, max);
  rebase(state.base, base_max);
}

template <typename Real>
DLOGP_HOST_DEVICE inline Real larger(Real a, Real b) {
  return a > b ? a : b;
}

template <typename Real>
DLOGP_HOST_DEVICE inline void merge(SoftmaxState<Real>& into, SoftmaxState<Real> other) {
  const Real max = larger(into.max, other.max);
  rebase(into, max);
  rebase(other, max);
  into.sum += other.sum;
  into.weighted += other.weighted;
}

template <typename Real>
DLOGP_HOST_DEVICE inline void merge(PairState<Real>& into, PairState<Real> other) {
  const Real max = larger(into.model.max, other.model.max);
  const Real base_max = larger(into.base.max, other.base.max);
  rebase(into, max, base_max);
  rebase(other, max, base_max);
  into.model.sum += other.model.sum;
  into.model.weighted += other.model.weighted;
  into.base.sum += other.base.sum;
  into.base.weighted += other.base.weighted;
  into.cross += other.cross;
  into.base_cross += other.base_cross;
  into.model_alone |= other.model_alone;
  into.base_alone |= other.base_alone;
}

}  // namespace dlogp
