// A tile of logits on the CPU, hidden · weightᵀ, and what its product needs: what the linear ops have in common.
//
// A vocabulary is cut into tiles of `Tiling::columns`, tiles into splits; a split's state depends on nothing but its
// row, so rows and splits may be handed to threads in any way. `Models` is 1, or 2 for a pair (the model, then its
// base). T is the type of the products: bfloat16, float or double.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/logit_transform.h"
#include "fold.h"
#include "matrix.h"
#include "multiply.h"
#include "threads.h"

namespace dlogp {

// One model's last layer; `bias` has one row, or no data.
struct Head {
  Matrix hidden, weight, bias;
  LogitTransform transform;

  int64_t width() const { return weight.columns; }
  int64_t vocabulary() const { return weight.rows; }
};

// How a vocabulary is cut; a function of the shapes of the weights alone.
struct Tiling {
  int64_t vocabulary, columns, splits;

  int64_t tiles() const { return (vocabulary + columns - 1) / columns; }
  int64_t split_begin(int64_t split) const { return split * tiles() / splits * columns; }
  int64_t split_end(int64_t split) const {
    const int64_t end = split_begin(split + 1);
    return end < vocabulary ? end : vocabulary;
  }
};

// What a tile has at most: columns, and bytes of packed weight.
struct TileSize {
  int64_t columns, bytes;
};
// Threads fold tiles on their own, so that a packed tile should stay in a core's second-level cache.
constexpr TileSize kForwardTile{256, 512 * 1024};
// Where gradients are formed, threads wait for one another three times a tile, so there should be few. Our own products
// read a tile panel by panel; those of bfloat16 take a whole one, and were measured with smaller ones only.
template <typename T>
constexpr TileSize kBackwardTile = sizeof(T) == 2 ? kForwardTile : TileSize{512, 2048 * 1024};

constexpr int64_t kMaxSplits = 64;

inline Tiling tile_vocabulary(int64_t vocabulary, int64_t width, int64_t element_size, TileSize most = kForwardTile) {
  int64_t columns = most.columns;
  while (columns > 64 && columns * width * element_size > most.bytes) columns /= 2;
  const int64_t tiles = (vocabulary + columns - 1) / columns;
  return {vocabulary, columns, std::min(tiles, kMaxSplits)};
}

constexpr int64_t kRowBlock = 64;
static_assert((kRowBlock & (kRowBlock - 1)) == 0, "padded_rows doubles up to it");
// Rows that a pass through the vocabulary takes at most.
constexpr int64_t kMaxRows = 1024;

// Rows that a block of rows is padded to, so that few distinct product kernels of bfloat16 are needed.
inline int64_t padded_rows(int64_t rows) {
  int64_t padded = 1;
  while (padded < rows && padded < kRowBlock) padded *= 2;
  return round_up(rows, padded);
}

// Row-major rows of hidden states, gathered, converted and padded with zeros: (padded rows, stride).
template <typename T>
struct PackedRows {
  int64_t stride = 0;
  T* data = nullptr;
};

template <typename T>
int64_t packed_width(int64_t width) {
  return round_up(width, kGroup<T>);
}

// Rows `rows` (count) of hidden states in `storage`, with zeros up to `padded` rows.
template <typename T>
PackedRows<T> pack_hidden(const Matrix& hidden, const int64_t* rows, int64_t count, int64_t padded,
                          std::vector<T>& storage) {
  const int64_t stride = packed_width<T>(hidden.columns);
  storage.resize(padded * stride);
  std::fill(storage.begin() + count * stride, storage.end(), T(0));
  for_each(count, 64, [&](int64_t i) {
    T* row = storage.data() + i * stride;
    read_row(hidden, rows[i], 0, hidden.columns, row);
    std::fill(row + hidden.columns, row + stride, T(0));
  });
  return {stride, storage.data()};
}

// What one thread needs besides the packed rows.
template <typename T>
struct TileScratch {
  std::vector<T> weight_copy, grad_columns;
  PackedStorage<T> packed_weight[2];
  std::vector<Accumulator<T>> logits[2], bias, grad;
};

// Rows of the weight, packed_width each: in place where they fit, else in a copy.
template <typename T>
struct WeightRows {
  const T* data;
  int64_t stride;
};

// Rows [begin, begin + padded) of the weight, with zeros for those past the vocabulary.
template <typename T>
WeightRows<T> weight_rows(const Matrix& weight, int64_t begin, int64_t padded, std::vector<T>& copy) {
  const int64_t width = packed_width<T>(weight.columns);
  const int64_t count = std::clamp<int64_t>(weight.rows - begin, 0, padded);
  if (count == padded && width == weight.columns) {
    const T* in_place = groups_in_place<T>(weight, begin);
    if (in_place != nullptr) return {in_place, weight.row_stride};
  }
  copy.resize(std::max<size_t>(copy.size(), padded * width));
  T* rows = copy.data();
  for (int64_t v = 0; v < count; ++v) {
    read_row(weight, begin + v, 0, weight.columns, rows + v * width);
    std::fill(rows + v * width + weight.columns, rows + (v + 1) * width, T(0));
  }
  std::fill(rows + count * width, rows + padded * width, T(0));
  return {rows, width};
}

// Elements [begin, begin + count) of the bias in `copy`; null if the head has none.
template <typename Acc>
const Acc* bias_of(const Head& head, int64_t begin, int64_t count, std::vector<Acc>& copy) {
  if (head.bias.data == nullptr) return nullptr;
  copy.resize(std::max<size_t>(copy.size(), count));
  read_row(head.bias, 0, begin, count, copy.data());
  return copy.data();
}

// logits (rows, tiling.columns) of one tile, transformed.
template <typename T>
void tile_logits(const Head& head, const PackedRows<T>& hidden, int64_t first_row, int64_t rows, const T* packed_weight,
                 int64_t begin, int64_t count, const Tiling& tiling, TileScratch<T>& scratch, Accumulator<T>* logits) {
  const int64_t multiplied = kGroup<T> == 1 ? rows : padded_rows(rows);
  const Product product{multiplied, tiling.columns, hidden.stride, hidden.stride, tiling.columns, tiling.columns};
  multiply(product, hidden.data + first_row * hidden.stride, packed_weight, logits, false);
  const Accumulator<T>* bias = bias_of(head, begin, count, scratch.bias);
  if (bias == nullptr && head.transform.is_identity()) return;
  for (int64_t r = 0; r < rows; ++r) transform_row(head.transform, count, bias, logits + r * tiling.columns);
}

}  // namespace dlogp
