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

// The logit of a token that can not be drawn.
template <typename Acc>
constexpr Acc kMaskedLogit = -std::numeric_limits<Acc>::infinity();

template <typename Acc>
struct SoftmaxState {
  Acc max = kMaskedLogit<Acc>;
  double sum = 0;
  double weighted = 0;

  DLOGP_HOST_DEVICE bool empty() const { return sum == 0; }
  DLOGP_HOST_DEVICE double log_sum() const { return std::log(sum); }
  DLOGP_HOST_DEVICE double lse() const { return max + log_sum(); }
  DLOGP_HOST_DEVICE double entropy() const { return log_sum() - weighted / sum; }
  DLOGP_HOST_DEVICE double logp(Acc z) const { return (double(z) - double(max)) - log_sum(); }
};

template <typename Acc>
struct PairState {
  SoftmaxState<Acc> model, base;
  double cross = 0, base_cross = 0;
  // Some token is possible for one model and impossible (z = −inf) for the other; then the cross sum leaves it out.
  bool model_unsupported = false, base_unsupported = false;

  DLOGP_HOST_DEVICE double kl() const { return divergence(model, base, cross, model_unsupported); }
  DLOGP_HOST_DEVICE double reverse_kl() const { return divergence(base, model, base_cross, base_unsupported); }

 private:
  DLOGP_HOST_DEVICE static double divergence(const SoftmaxState<Acc>& p, const SoftmaxState<Acc>& q, double cross,
                                             bool unsupported) {
    if (unsupported) return std::numeric_limits<double>::infinity();
    const double kl = cross / p.sum - p.log_sum() + q.log_sum();
    return kl < 0 ? 0 : kl;  // keeps NaN
  }
};

// e^shift and shift for moving a state's maximum up to `max`; an empty state has nothing to move.
template <typename Acc>
DLOGP_HOST_DEVICE inline double shift_to(const SoftmaxState<Acc>& state, Acc max) {
  return state.empty() ? 0 : double(state.max) - double(max);
}

template <typename Acc>
DLOGP_HOST_DEVICE inline void rebase(SoftmaxState<Acc>& state, Acc max) {
  const double shift = shift_to(state, max);
  if (shift != 0) {
    const double factor = std::exp(shift);
    state.weighted = factor * (state.weighted + shift * state.sum);
    state.sum *= factor;
  }
  state.max = max;
}

template <typename Acc>
DLOGP_HOST_DEVICE inline void rebase(PairState<Acc>& state, Acc max, Acc base_max) {
  const double shift = shift_to(state.model, max);
  const double base_shift = shift_to(state.base, base_max);
  if (shift != 0 || base_shift != 0) {
    state.cross = std::exp(shift) * (state.cross + (shift - base_shift) * state.model.sum);
    state.base_cross = std::exp(base_shift) * (state.base_cross + (base_shift - shift) * state.base.sum);
  }
  rebase(state.model, max);
  rebase(state.base, base_max);
}

template <typename Acc>
DLOGP_HOST_DEVICE inline Acc larger(Acc a, Acc b) {
  return a > b ? a : b;
}

template <typename Acc>
DLOGP_HOST_DEVICE inline void merge(SoftmaxState<Acc>& into, SoftmaxState<Acc> other) {
  const Acc max = larger(into.max, other.max);
  rebase(into, max);
  rebase(other, max);
  into.sum += other.sum;
  into.weighted += other.weighted;
}

template <typename Acc>
DLOGP_HOST_DEVICE inline void merge(PairState<Acc>& into, PairState<Acc> other) {
  const Acc max = larger(into.model.max, other.model.max);
  const Acc base_max = larger(into.base.max, other.base.max);
  rebase(into, max, base_max);
  rebase(other, max, base_max);
  into.model.sum += other.model.sum;
  into.model.weighted += other.model.weighted;
  into.base.sum += other.base.sum;
  into.base.weighted += other.base.weighted;
  into.cross += other.cross;
  into.base_cross += other.base_cross;
  into.model_unsupported |= other.model_unsupported;
  into.base_unsupported |= other.base_unsupported;
}

}  // namespace dlogp
