// linear_policy_loss on the CPU, of ratios of tokens. The logits of a block of rows are kept (linear_forward.h); out of
// their statistics come loss and gradients of each row, and out of the logits, tile by tile, theirs (backward_tile.h):
//   grad_hidden += dz · weight,  grad_weight += dzᵀ · hidden
// both accumulated in float32 (float64): the former over the tiles, the latter over the blocks, in its output.
#pragma once

#include "linear_tile.h"
#include "policy_tokens.h"
#include "row_statistics.h"

namespace dlogp {

// What is known of all N rows before their logits are; null where an argument is missing.
template <typename Acc>
struct PolicyRows {
  const Acc *old_logp, *advantage, *scale, *score, *ref_logp, *token_weight;
};

// Where gradients go, in the type that accumulates; null: not wanted.
template <typename Acc>
struct PolicyGradients {
  Acc *hidden = nullptr, *weight = nullptr, *bias = nullptr;

  bool any() const { return hidden != nullptr || weight != nullptr || bias != nullptr; }
};

// Returns the loss of the rows that count, each times its scale, and adds them to `sums`. Writes the gradients of the
// first head, of hidden those of the rows that count. Of a pair, the second head is the reference model's.
template <typename T, int Models>
double linear_policy(const Head* heads, const KeptRows& kept, const PolicyOptions& options,
                     const PolicyRows<Accumulator<T>>& known, int64_t workspace,
                     const PolicyGradients<Accumulator<T>>& gradients, PolicySums& sums);

// Writes factor · from.
template <typename Acc>
void scale_gradient(int64_t count, double factor, const Acc* from, const Output& to);

}  // namespace dlogp
