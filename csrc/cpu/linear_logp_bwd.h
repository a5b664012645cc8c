// The gradient of linear_logp and linear_delta_logp on the CPU: logits are recomputed tile by tile,
//   dz of a tile (gradient.h, rounded to T),  grad_hidden += dz · weight,  grad_weightᵀ += hiddenᵀ · dz,  grad_bias +=
//   Σ dz
// with the products accumulated in float32 (float64). For one block of rows and one tile of the vocabulary there are
// three steps, each of which may be shared among threads: pack the weight, then the rows, then the weight's gradient.
// Each accumulator has one writer at a time and a fixed order of additions, so the result is the same for any threads.
#pragma once

#include "gradient.h"
#include "linear_logp.h"

namespace dlogp {

// What one model needs for a block of rows: pointers into the caller's buffers; `columns` is that of the tiling and
// `inner` the rows padded to a whole number of row blocks.
template <typename T>
struct BackwardBuffers {
  using Real = Accumulator<T>;

  PackedRows<T> hidden;              // (inner, stride), zero in padding rows
  T* hidden_columns = nullptr;       // its transpose (stride, inner); null if grad_weight is not wanted
  T* packed_weight = nullptr;        // for hidden · weightᵀ: (stride, columns), packed; null where logits are given
  T* packed_weight_rows = nullptr;   // for dz · weight: (columns, stride), packed; null if grad_hidden is not wanted
  T* grad_logits = nullptr;          // (inner, columns)
  T* packed_grad_logits = nullptr;   // the same, packed
  Real* grad_hidden = nullptr;       // accumulators (inner, stride); null if not wanted
  Real* grad_weight = nullptr;       // accumulators of this tile (stride, columns); null if not wanted
  Real* grad_bias = nullptr;         // accumulators of this tile (columns); null if not wanted
  Real* grad_bias_blocks = nullptr;  // (row blocks, columns)

  bool wants_any() const { return grad_hidden != nullptr || grad_weight != nullptr || grad_bias != nullptr; }
};

// One tile of the vocabulary and one block of gathered rows.
struct BackwardTile {
  int64_t begin, width;  // of the tile
  int64_t count, inner;  // of the rows, and padded
  int64_t row_block;     // rows that one thread takes at a time
};

// Columns of a tile that one thread takes at a time when it packs the weight or writes its gradient.
constexpr int64_t kColumnBlock = 64;

// Packs columns [column, column + kColumnBlock) of a tile for the products that are wanted.
template <typename T>
void pack_backward_weight(const Head& head, const Tiling& tiling, const BackwardTile& tile, int64_t column,
                          TileScratch<T>& scratch, const BackwardBuffers<T>& buffers);

// Rows [first, first + row_block): dz of each model that wants a gradient, its grad_hidden, its part of grad_bias.
// `rows` and `target` (candidates) are the places in the batch and the targets of the gathered rows.
template <typename T, int Models>
void linear_logp_bwd_rows(const Head* heads, const Tiling& tiling, const BackwardTile& tile, int64_t first,
                          const int64_t* rows, const int64_t* target, const Upstream<Accumulator<T>>& upstream,
                          TileScratch<T>& scratch, const BackwardBuffers<T>* buffers);

// The same of given logits: logits[model] are those of row `first` on, transformed, `columns` apart.
template <typename T, int Models>
void linear_logp_bwd_logits(const Head* heads, const Tiling& tiling, const BackwardTile& tile, int64_t first,
                            const int64_t* rows, const int64_t* target, const Upstream<Accumulator<T>>& upstream,
                            const Accumulator<T>* const* logits, TileScratch<T>& scratch,
                            const BackwardBuffers<T>* buffers);

// Columns [begin, end) of grad_weight for this tile; starts from zero unless `accumulate`.
template <typename T>
void linear_logp_bwd_weight(const Tiling& tiling, const BackwardTile& tile, int64_t begin, int64_t end, bool accumulate,
                            const BackwardBuffers<T>& buffers);

template <typename T>
void linear_logp_bwd_bias(const Tiling& tiling, const BackwardTile& tile, const BackwardBuffers<T>& buffers);

// Writes columns [column, column + kColumnBlock) of the accumulators (stride, columns) of a tile of grad_weight that
// begins at `begin` to their rows of the output.
template <typename T>
void write_weight_gradient(const Accumulator<T>* accumulators, int64_t stride, const Tiling& tiling, int64_t begin,
                           int64_t column, TileScratch<T>& scratch, const Output& output);

}  // namespace dlogp
