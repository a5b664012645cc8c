// The gradient of one tile of logits on the CPU: dz (gradient.h, rounded to T) and what is formed of it at once,
//   grad_hidden += dz · weight,  grad_bias += Σ dz
// accumulated in float32 (float64). Each accumulator has one writer at a time and a fixed order of additions, so the
// result is the same for any threads.
#pragma once

#include "gradient.h"
#include "linear_tile.h"
#include "row_statistics.h"

namespace dlogp {

// What one model needs for a block of rows: pointers into the caller's buffers; `columns` is that of the tiling and
// `inner` the rows padded to a whole number of row blocks.
template <typename T>
struct BackwardBuffers {
  using Acc = Accumulator<T>;

  PackedRows<T> hidden;             // (inner, stride), zero in padding rows
  T* hidden_columns = nullptr;      // its transpose (stride, inner); null if grad_weight is not wanted
  T* packed_weight = nullptr;       // for hidden · weightᵀ: (stride, columns), packed; null where logits are given
  T* packed_weight_rows = nullptr;  // for dz · weight: (columns, stride), packed; null if grad_hidden is not wanted
  T* grad_logits = nullptr;         // (inner, columns)
  T* packed_grad_logits = nullptr;  // the same, packed
  Acc* grad_hidden = nullptr;       // accumulators (inner, stride); null if not wanted
  Acc* grad_weight = nullptr;       // accumulators of this tile (stride, columns); null if not wanted
  Acc* grad_bias = nullptr;         // accumulators of this tile (columns); null if not wanted
  Acc* grad_bias_blocks = nullptr;  // (row blocks, columns)

  bool wants_any() const { return grad_hidden != nullptr || grad_weight != nullptr || grad_bias != nullptr; }
};

// One tile of the vocabulary and one block of gathered rows.
struct BackwardTile {
  int64_t begin, width;  // of the tile
  int64_t count, inner;  // of the rows, and padded
  int64_t row_block;     // rows that one thread takes at a time

  int64_t row_blocks() const { return inner / row_block; }
};

// Rows that one thread takes at a time, out of so many.
inline int64_t backward_row_block(int64_t rows) {
  return std::clamp<int64_t>(padded_rows((rows + 7) / 8), 8, kRowBlock);
}

// Columns of a tile that one thread takes at a time when it packs the weight or writes its gradient.
constexpr int64_t kColumnBlock = 64;

// Packs columns [column, column + kColumnBlock) of a tile for the products that are wanted.
template <typename T>
void pack_backward_weight(const Head& head, const Tiling& tiling, const BackwardTile& tile, int64_t column,
                          TileScratch<T>& scratch, const BackwardBuffers<T>& buffers);

// Rows [first, first + row_block): dz of each model that wants a gradient, its grad_hidden, its part of grad_bias.
// logits[model] are those of row `first` on, transformed, `columns` apart; rows.rows are places in what `upstream`
// holds.
template <typename T, int Models>
void backward_rows(const Head* heads, const Tiling& tiling, const BackwardTile& tile, int64_t first,
                   const RowBlock& rows, const Upstream<Accumulator<T>>& upstream, const Accumulator<T>* const* logits,
                   TileScratch<T>& scratch, const BackwardBuffers<T>* buffers);

// Adds the parts of grad_bias, in their order.
template <typename T>
void backward_bias(const Tiling& tiling, const BackwardTile& tile, const BackwardBuffers<T>& buffers);

}  // namespace dlogp
