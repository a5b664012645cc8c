// One row of a tile of logits: into transformed logits, into the running softmax state, into gradients.
// float: vectorised, in float32 within a tile and in float64 between tiles. double: the same in float64.
#pragma once

#include <cstdint>

#include "../common/logit_transform.h"
#include "../common/online_softmax.h"

namespace dlogp {

// z[i] = transform(z[i] + bias[i]) in place; `bias` may be null.
void transform_row(const LogitTransform& transform, int64_t count, const float* bias, float* z);
void transform_row(const LogitTransform& transform, int64_t count, const double* bias, double* z);

// Add `count` transformed logits to a state.
void fold_row(int64_t count, const float* z, SoftmaxState<float>& state);
void fold_row(int64_t count, const double* z, SoftmaxState<double>& state);
// The same for a state whose entropy nobody asks for: `weighted` then means nothing.
void fold_sum(int64_t count, const float* z, SoftmaxState<float>& state);
void fold_sum(int64_t count, const double* z, SoftmaxState<double>& state);
void fold_row(int64_t count, const float* z, const float* base_z, PairState<float>& state);
void fold_row(int64_t count, const double* z, const double* base_z, PairState<double>& state);
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
// The terms hold the upstream gradients, already times `slope` of the model's transform:
//   constant = g_lse − Σ_k g_logp − g_entropy·H − g_kl·kl + g_reverse_kl,  log_term = −g_entropy,
//   ratio_term = g_kl,  other_term = −g_reverse_kl
// where kl is the divergence from p to q and reverse_kl that from q to p.
template <typename Acc>
struct GradientTerms {
  Acc lse, other_lse;
  Acc constant, log_term, ratio_term, other_term;
};

void gradient_row(const GradientTerms<float>& terms, int64_t count, const float* z, float* grad);
void gradient_row(const GradientTerms<double>& terms, int64_t count, const double* z, double* grad);
// `other_z` are the other model's logits.
void gradient_row(const GradientTerms<float>& terms, int64_t count, const float* z, const float* other_z, float* grad);
void gradient_row(const GradientTerms<double>& terms, int64_t count, const double* z, const double* other_z,
                  double* grad);

// grad[i] *= 1 − tanh², the softcap's derivative, out of the transformed z[i].
void softcap_gradient_row(const LogitTransform& transform, int64_t count, const float* z, float* grad);
void softcap_gradient_row(const LogitTransform& transform, int64_t count, const double* z, double* grad);

// sums[i] += values[i]
void add_row(int64_t count, const float* values, float* sums);
void add_row(int64_t count, const double* values, double* sums);

// Rounds to the nearest bfloat16, ties to even.
void round_row(int64_t count, const float* from, uint16_t* to);

}  // namespace dlogp
