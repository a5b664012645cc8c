// linear_extrapolated_sample on the CPU: tiles of both models' logits, each folded at once into the softmax state of
// its row and into the winners of its draws.
//
// A batch that decodes has few rows, so the time is that of reading the weights, which therefore are read where they
// are: packing a tile of them, as linear_logp.h does for many rows, would take longer than its product.
//
// Whether a row is to be replaced is known only when its last tile was seen, so both draws run along. So does the
// stand-in for z_B = −inf, the row's least finite z_B: tokens of this kind, which it shifts all alike, have a winner of
// their own. Winners, the least z_B and what makes a row bad do not depend on the order of tiles; a thread keeps them
// from part to part, so that a good score soon rules most blocks out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/sampling.h"
#include "extrapolated_sample.h"
#include "linear_logp.h"
#include "winner.h"

namespace dlogp {

// A winner with its logits at temperature 1.
template <typename Real>
struct DrawnToken {
  Winner winner;
  Real z = 0, base_z = 0;
};

// What a thread has seen of a row, besides the states.
template <typename Real>
struct RowDraws {
  DrawnToken<Real> draft, replacement;
  // Of the tokens with z_B = −inf, scored without the stand-in, if γ > 0.
  DrawnToken<Real> unlikely;
  Real least = std::numeric_limits<Real>::infinity();
  bool bad = false;  // NaN or +inf in a logit
};

// Hidden states of one model, converted: row by row, or of bfloat16 in blocks of kRowBlock rows, each packed (matrix.h)
// as the right operand (inner, padded_columns).
template <typename T>
struct PackedHidden {
  int64_t inner = 0, rows = 0;
  std::vector<T> data;

  int64_t block_rows(int64_t first) const { return std::min(kRowBlock, rows - first); }
  const T* block(int64_t first) const { return data.data() + first * inner; }
};

// Rows [first, first + count) of `hidden`.
template <typename T>
void pack_hidden(const Matrix& hidden, int64_t first, int64_t count, PackedHidden<T>& packed);

// What one thread needs besides.
template <typename T>
struct DrawScratch {
  std::vector<T> weight;
  std::vector<Accumulator<T>> product, logits[2], bias;
};

// Folds part `part` of the vocabulary for the packed rows, whose noise is `noise`, into states[row · parts + part] and
// draws[row].
template <typename T>
void linear_extrapolated_sample(const Head* heads, const PackedHidden<T>* hidden, const RowNoise* noise,
                                const SampleOptions& options, const Tiling& tiling, int64_t part,
                                DrawScratch<T>& scratch, PairState<Accumulator<T>>* states,
                                RowDraws<Accumulator<T>>* draws);

// The row of `parts` states, merged in their order, and of the draws of `threads` threads, `stride` apart.
template <typename Real>
SampledRow<Real> finish_sample(const PairState<Real>* states, int64_t parts, const RowDraws<Real>* draws,
                               int64_t threads, int64_t stride, const RowNoise& noise, const SampleOptions& options);

}  // namespace dlogp
