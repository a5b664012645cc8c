// The running state of a softmax over a vocabulary that is seen in pieces, and how two pieces merge.
//
// With z the logits of a model, m their maximum so far and d = z − m:
//   rest = Σ e^d over all tokens but one of those with z = m        sum = 1 + rest        weighted = Σ e^d·d
// and for a pair, with the base model's d_B = z_B − m_B:
//   cross = Σ e^d·(d − d_B)        base_cross = Σ e^{d_B}·(d_B − d)
// Centring on both maxima keeps the sums small, so that a common offset of the logits costs no accuracy. From them
//   log sum = log1p(rest),   log p = d − log sum,   lse = m + log sum,
//   entropy = log sum − weighted / sum,   kl = cross / sum − log sum + log base_sum.
// A rest far below the precision of 1 is kept: where one token has nearly all the mass, its log p is about −rest.
// Until `settle` m may also be a logit a little below the largest: all of this holds about that one too.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "host_device.h"

namespace dlogp {

// The logit of a token that can not be drawn.
template <typename Acc>
constexpr Acc kMaskedLogit = -std::numeric_limits<Acc>::infinity();

template <typename Acc>
struct SoftmaxState {
  Acc max = kMaskedLogit<Acc>;
  Acc largest = kMaskedLogit<Acc>;  // that which `settle` makes the maximum
  double rest = -1;                 // there is no maximum to leave out yet
  double weighted = 0;
  int64_t top = -1;  // the first token with z = largest, where that is asked for

  DLOGP_HOST_DEVICE bool empty() const { return rest == -1; }
  DLOGP_HOST_DEVICE double sum() const { return 1 + rest; }
  DLOGP_HOST_DEVICE double log_sum() const {
#ifdef __CUDA_ARCH__
    return std::log(sum());  // of float32 sums, and log1p takes more registers than there are
#else
    return std::log1p(rest);
#endif
  }
  DLOGP_HOST_DEVICE double lse() const { return max + log_sum(); }
  DLOGP_HOST_DEVICE double entropy() const { return log_sum() - weighted / sum(); }
  DLOGP_HOST_DEVICE double logp(Acc z) const { return (double(z) - double(max)) - log_sum(); }
  // The most likely token, −1 where there are no numbers, and its log p.
  DLOGP_HOST_DEVICE int64_t top_token() const { return std::isnan(rest) ? -1 : top; }
  DLOGP_HOST_DEVICE double top_logp() const { return top_token() < 0 ? NAN : logp(max); }
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
    const double kl = cross / p.sum() - p.log_sum() + q.log_sum();
    return kl < 0 ? 0 : kl;  // keeps NaN
  }
};

// How far a state's maximum is from `max`; an empty state has nothing to move.
template <typename Acc>
DLOGP_HOST_DEVICE inline double shift_to(const SoftmaxState<Acc>& state, Acc max) {
  return state.empty() ? 0 : double(state.max) - double(max);
}

template <typename Acc>
DLOGP_HOST_DEVICE inline Acc larger(Acc a, Acc b) {
  return a > b ? a : b;
}

// Moves the maximum up to `max`, that of a token that is not in the state yet: all that are become the rest.
template <typename Acc>
DLOGP_HOST_DEVICE inline void rebase(SoftmaxState<Acc>& state, Acc max) {
  const double shift = shift_to(state, max), factor = std::exp(shift);
  state.weighted = factor * (state.weighted + shift * state.sum());
  state.rest = factor * state.sum();
  state.max = max;
  state.largest = larger(state.largest, max);
}

// Moves the sums over both models to other maxima, before the models' own follow.
template <typename Acc>
DLOGP_HOST_DEVICE inline void move_cross(PairState<Acc>& state, Acc max, Acc base_max) {
  const double shift = shift_to(state.model, max);
  const double base_shift = shift_to(state.base, base_max);
  if (shift == 0 && base_shift == 0) return;
  state.cross = std::exp(shift) * (state.cross + (shift - base_shift) * state.model.sum());
  state.base_cross = std::exp(base_shift) * (state.base_cross + (base_shift - shift) * state.base.sum());
}

// Moves the maximum up to the largest logit, which is in the state already: before states are merged or their maxima
// are read.
template <typename Acc>
DLOGP_HOST_DEVICE inline void settle(SoftmaxState<Acc>& state) {
  if (state.max == state.largest) return;
  rebase(state, state.largest);
  state.rest -= 1;
}

template <typename Acc>
DLOGP_HOST_DEVICE inline void settle(PairState<Acc>& state) {
  move_cross(state, state.model.largest, state.base.largest);
  settle(state.model);
  settle(state.base);
}

template <typename Acc>
DLOGP_HOST_DEVICE inline void merge(SoftmaxState<Acc>& into, SoftmaxState<Acc> other) {
  if (other.max > into.max) std::swap(into, other);  // else the top of `into`, which comes first, stays
  rebase(other, into.max);                           // of equal maxima, the other one is rest
  into.rest += other.rest;
  into.weighted += other.weighted;
}

template <typename Acc>
DLOGP_HOST_DEVICE inline void merge(PairState<Acc>& into, PairState<Acc> other) {
  const Acc max = larger(into.model.max, other.model.max);
  const Acc base_max = larger(into.base.max, other.base.max);
  move_cross(into, max, base_max);
  move_cross(other, max, base_max);
  into.cross += other.cross;
  into.base_cross += other.base_cross;
  merge(into.model, other.model);
  merge(into.base, other.base);
  into.model_unsupported |= other.model_unsupported;
  into.base_unsupported |= other.base_unsupported;
}

}  // namespace dlogp
