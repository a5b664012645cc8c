// The gradient of linear_logp and linear_delta_logp on the CPU: logits are recomputed tile by tile (linear_tile.h), and
// of their gradient (backward_tile.h) are formed
//   grad_hidden += dz · weight,  grad_weightᵀ += hiddenᵀ · dz,  grad_bias += Σ dz
// with the products accumulated in float32 (float64). For one block of rows and one tile of the vocabulary there are
// three steps, each shared among threads: pack the weight, then the rows, then the weight's gradient.
#pragma once

#include "backward_tile.h"

namespace dlogp {

// Where a head's gradients go; an output without data is not wanted.
struct HeadOutputs {
  Output hidden, weight, bias;

  bool any() const { return hidden || weight || bias; }
};

// Writes the gradients of each model's head, of hidden those of the rows that count; nothing if none does. Blocks of
// rows and accumulators stay within the workspace.
template <typename T, int Models>
void linear_backward(const Head* heads, const KeptRows& kept, const Upstream<Accumulator<T>>& upstream,
                     int64_t workspace, const HeadOutputs* outputs);

}  // namespace dlogp
