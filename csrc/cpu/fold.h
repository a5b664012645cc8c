// One row of a tile of logits: into transformed logits, into the running softmax state, into gradients.
// float: vectorised, in float32 within a tile and in float64 between tiles. double: the same in float64.
#pragma once

#include <cstdint>

#include "../common/logit_transform.h"
#include "../common/online_softmax.h"

namespace dlogp {

// z[i] = transform(z[i] + bias[i]) in place; `bias` may be null.
template <typename Acc>
void transform_row(const LogitTransform& transform, int64_t count, const Acc* bias, Acc* z);

// Add `count` transformed logits to a state, which is to be settled after the last.
template <typename Acc>
void fold_row(int64_t count, const Acc* z, SoftmaxState<Acc>& state);
// The same for a state whose entropy nobody asks for: `weighted` then means nothing.
template <typename Acc>
void fold_sum(int64_t count, const Acc* z, SoftmaxState<Acc>& state);
template <typename Acc>
void fold_row(int64_t count, const Acc* z, const Acc* base_z, PairState<Acc>& state);
// The same of each model's logits.
template <typename Acc>
void fold_row(int64_t count, const Acc* const (&z)[1], SoftmaxState<Acc>& state) {
  fold_row(count, z[0], state);
}
template <typename Acc>
void fold_row(int64_t count, const Acc* const (&z)[2], PairState<Acc>& state) {
  fold_row(count, z[0], z[1], state);
}

// The gradient of a model's statistics with respect to its own logits, with p its distribution, q that of the other:
//   dz = p·(constant + log_term·log p + ratio_term·(log p − log q)) + other_term·q  (+ g_logp at the targets)
// The terms hold the upstream gradients, already times `derivative` of the model's transform:
//   constant = g_lse − Σ_k g_logp − g_entropy·H − g_kl·kl + g_reverse_kl,  log_term = −g_entropy,
//   ratio_term = g_kl,  other_term = −g_reverse_kl
// where kl is the divergence from p to q and reverse_kl that from q to p.
template <typename Acc>
struct GradientTerms {
  Acc max, log_sum, other_max, other_log_sum;  // log p = (z − max) − log_sum: exact for large z too
  Acc constant, log_term, ratio_term, other_term;
};

template <typename Acc>
void gradient_row(const GradientTerms<Acc>& terms, int64_t count, const Acc* z, Acc* grad);
// `other_z` are the other model's logits.
template <typename Acc>
void gradient_row(const GradientTerms<Acc>& terms, int64_t count, const Acc* z, const Acc* other_z, Acc* grad);

// grad[i] *= 1 − tanh², the softcap's derivative, out of the transformed z[i].
template <typename Acc>
void softcap_gradient_row(const LogitTransform& transform, int64_t count, const Acc* z, Acc* grad);

// sums[i] += values[i]
template <typename Acc>
void add_row(int64_t count, const Acc* values, Acc* sums);

// Rounds to the nearest bfloat16, ties to even.
void round_row(int64_t count, const float* from, uint16_t* to);

}  // namespace dlogp
