// linear_extrapolated_sample on the CPU: tiles of both models' logits, each folded at once into the softmax state of
// its row and into the winners of its draws.
//
// A batch that decodes has few rows, so the time is that of reading the weights, which therefore are read where they
// are: packing a tile of them, as linear_forward.h does for many rows, would take longer than its product.
//
// Whether a row is to be replaced is known only when its last tile was seen, so both draws run along. So does the
// stand-in for z_B = −inf, the row's least finite z_B: tokens of this kind, which it shifts all alike, have a winner of
// their own. Winners, the least z_B and what makes a row bad do not depend on the order of tiles; a thread keeps them
// from split to split, so that a good score soon rules most blocks out.
#pragma once

#include "extrapolated_sample.h"
#include "linear_tile.h"

namespace dlogp {

// Of both heads, in blocks of rows that the workspace holds; the vocabulary is shared out among the threads. Without
// filters, which need a row of logits.
template <typename T>
void linear_extrapolated_sample(const Head* heads, const RowIdentities& identities, const SampleOptions& options,
                                int64_t workspace, const SampleOutputs<Accumulator<T>>& outputs);

}  // namespace dlogp
