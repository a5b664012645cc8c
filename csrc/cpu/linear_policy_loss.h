// linear_policy_loss on the CPU, of ratios of tokens. The logits of a block of rows are kept (linear_logp.h); out of
// their statistics come loss and gradients of each row, and out of the logits, tile by tile, theirs
// (linear_logp_bwd.h):
//   grad_hidden += dz · weight,  grad_weight += dzᵀ · hidden
// both accumulated in float32 (float64): the former over the tiles, the latter over the blocks, in its output.
#pragma once

#include <cstdint>
#include <vector>

#include "linear_logp_bwd.h"
#include "policy_tokens.h"

namespace dlogp {

// What is known of all N rows before their logits are; null where an argument is missing.
template <typename Real>
struct PolicyRows {
  const Real *old_logp, *advantage, *scale, *score, *ref_logp, *token_weight;
};

// Statistics and upstream gradients of one block of rows; `kl` is empty without a reference model.
template <typename Real>
struct PolicyBlock {
  std::vector<Real> logp, entropy, lse, delta_logp, base_logp, base_entropy, base_lse, kl, reverse_kl;
  std::vector<Real> grad_logp, grad_entropy, grad_kl;

  void resize(int64_t count, int models);
  StatsOutputs<Real> outputs();
  Upstream<Real> upstream(int models, int64_t ignore_index) const;
};

// Sets the upstream gradients of the rows `rows` (count) out of their statistics, adds to `sums`; returns their loss,
// times their scale.
template <typename Real>
double policy_block(const PolicyOptions& options, const PolicyRows<Real>& known, const int64_t* rows, int64_t count,
                    PolicyBlock<Real>& block, PolicySums& sums);

// Rows [begin, end) of a tile of grad_weight (V, D), `out` being its first one; starts from zero unless `accumulate`.
// `packed_hidden` is that of the block (inner, stride), packed.
template <typename T>
void add_weight_gradient(const Tiling& tiling, const BackwardTile& tile, int64_t begin, int64_t end, int64_t width,
                         bool accumulate, const BackwardBuffers<T>& buffers, const T* packed_hidden,
                         std::vector<T>& transposed, Accumulator<T>* out);

}  // namespace dlogp
