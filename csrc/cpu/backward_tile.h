// The gradient of one tile of logits on the CPU: dz (gradient.h, rounded to T) and what is formed of it at once,
//   grad_hidden += dz · weight,  grad_weight += dzᵀ · hidden,  grad_bias += Σ dz
// accumulated in float32 (float64). Each accumulator has one writer at a time and a fixed order of additions, so the
// result is the same for any threads.
#pragma once

#include <algorithm>
#include <vector>

#include "gradient.h"
#include "linear_tile.h"
#include "row_statistics.h"

namespace dlogp {

// Rows that one thread takes at a time, out of so many.
inline int64_t backward_row_block(int64_t rows) {
  return std::clamp<int64_t>(padded_rows((rows + 7) / 8), 8, kRowBlock);
}

// Columns of a tile that one thread takes at a time when it packs the weight or writes its gradient.
constexpr int64_t kColumnBlock = 64;
// Of a row of the weight's gradient likewise.
constexpr int64_t kWidthBlock = 256;

// Where a head's gradients are accumulated; null: not wanted.
template <typename Acc>
struct HeadAccumulators {
  Acc *hidden = nullptr, *weight = nullptr, *bias = nullptr;

  bool any() const { return hidden != nullptr || weight != nullptr || bias != nullptr; }
};

template <typename T>
void round_to(int64_t count, const Accumulator<T>* from, T* to) {
  if constexpr (sizeof(T) == 2)
    round_row(count, from, reinterpret_cast<uint16_t*>(to));
  else
    std::copy_n(from, count, to);
}

// Adds the gradients of tile after tile for a block of gathered rows. For each tile there are three steps, each shared
// among threads: pack the weight, then the rows, then the weight's gradient.
template <typename T, int Models>
class BackwardBlock {
  using Acc = Accumulator<T>;

 public:
  BackwardBlock(const Head* heads, const Tiling& tiling) : heads_(heads), tiling_(tiling) {}

  // The rows of the tiles that follow, in blocks of `row_block` that a thread takes at a time: `hidden` of each model
  // has a whole number of them, zero from rows.count on. rows.rows are places in what `upstream` holds. `with_weight`:
  // whether the gradient of each model's weight is wanted.
  void set_rows(const RowBlock& rows, int64_t row_block, const PackedRows<T>* hidden, const bool* with_weight) {
    rows_ = rows;
    row_block_ = row_block;
    inner_ = round_up(rows.count, row_block);
    for (int model = 0; model < Models; ++model) {
      Storage& own = storage_[model];
      own.hidden = hidden[model];
      if (!with_weight[model]) continue;
      own.packed_hidden.resize(Packed<T>::size(inner_, own.hidden.stride));
      pack_rows<T>(0, inner_, own.hidden.data, own.hidden.stride,
                   {own.packed_hidden.data(), inner_, own.hidden.stride});
    }
  }

  // Tile `index` of the vocabulary. Its logits, (padded rows, columns) of each model, are computed anew where
  // `kept_logits` is null. Of the accumulators, hidden (padded rows, stride) is of these rows, weight (columns, D) and
  // bias (columns) of this tile; unless `accumulate`, weight starts from zero.
  void add_tile(int64_t index, const Upstream<Acc>& upstream, const Acc* const* kept_logits, bool accumulate,
                const HeadAccumulators<Acc>* to) {
    const int64_t begin = index * tiling_.columns, width = std::min(tiling_.columns, tiling_.vocabulary - begin);
    const Tile tile{begin, width, kept_logits};
    for (int model = 0; model < Models; ++model) reserve(storage_[model], tile, to[model]);
    const int64_t column_blocks = tiling_.columns / kColumnBlock;
    for_each(Models * column_blocks, 1, [&](int64_t block) {
      const int64_t model = block / column_blocks;
      pack_weight(model, tile, block % column_blocks * kColumnBlock, to[model]);
    });
    at::parallel_for(0, inner_ / row_block_, 1, [&](int64_t begin_block, int64_t end_block) {
      for (int64_t block = begin_block; block < end_block; ++block) add_rows(block * row_block_, tile, upstream, to);
      release_products<T>();
    });
    for (int model = 0; model < Models; ++model) {
      if (to[model].bias != nullptr) add_bias(storage_[model], tile, to[model].bias);
      if (to[model].weight != nullptr) add_weight(model, tile, accumulate, to[model].weight);
    }
  }

 private:
  struct Tile {
    int64_t begin, width;
    const Acc* const* kept_logits;
  };

  // Of one model.
  struct Storage {
    PackedRows<T> hidden;
    PackedStorage<T> packed_hidden;       // for dzᵀ · hidden: (inner, stride)
    PackedStorage<T> packed_weight;       // for hidden · weightᵀ: (stride, columns)
    PackedStorage<T> packed_weight_rows;  // for dz · weight: (columns, stride)
    std::vector<T> grad_logits;           // (inner, columns)
    std::vector<Acc> bias_blocks;         // (row blocks, columns)
  };

  void reserve(Storage& own, const Tile& tile, const HeadAccumulators<Acc>& to) {
    if (tile.kept_logits == nullptr) own.packed_weight.resize(Packed<T>::size(own.hidden.stride, tiling_.columns));
    if (to.hidden != nullptr) own.packed_weight_rows.resize(Packed<T>::size(tiling_.columns, own.hidden.stride));
    if (to.bias != nullptr) own.bias_blocks.resize(inner_ / row_block_ * tiling_.columns);
    if (to.any()) own.grad_logits.resize(inner_ * tiling_.columns);
  }

  // Columns [column, column + kColumnBlock) of a tile, for the products that are wanted.
  void pack_weight(int64_t model, const Tile& tile, int64_t column, const HeadAccumulators<Acc>& to) {
    Storage& own = storage_[model];
    if (tile.kept_logits != nullptr && to.hidden == nullptr) return;
    const int64_t stride = own.hidden.stride;
    const auto rows = weight_rows(heads_[model].weight, tile.begin + column, kColumnBlock, own_scratch().weight_copy);
    if (tile.kept_logits == nullptr)
      pack_columns<T>(column, kColumnBlock, rows.data, rows.stride,
                      {own.packed_weight.data(), stride, tiling_.columns});
    if (to.hidden != nullptr)
      pack_rows<T>(column, kColumnBlock, rows.data, rows.stride,
                   {own.packed_weight_rows.data(), tiling_.columns, stride});
  }

  // Rows [first, first + row_block): dz of each model that wants a gradient, its grad_hidden, its part of grad_bias.
  void add_rows(int64_t first, const Tile& tile, const Upstream<Acc>& upstream, const HeadAccumulators<Acc>* to) {
    const int64_t columns = tiling_.columns, count = std::min(row_block_, rows_.count - first);
    TileScratch<T>& scratch = own_scratch();
    const Acc* logits[Models];
    for (int model = 0; model < Models; ++model) {
      Storage& own = storage_[model];
      logits[model] =
          tile.kept_logits == nullptr ? scratch.logits[model].data() : tile.kept_logits[model] + first * columns;
      if (tile.kept_logits == nullptr)
        tile_logits(heads_[model], own.hidden, first, count, own.packed_weight.data(), tile.begin, tile.width, tiling_,
                    scratch, scratch.logits[model].data());
    }
    for (int model = 0; model < Models; ++model) {
      if (!to[model].any()) continue;
      Storage& own = storage_[model];
      T* grad_logits = own.grad_logits.data() + first * columns;
      Acc* bias_sums = to[model].bias == nullptr ? nullptr : own.bias_blocks.data() + first / row_block_ * columns;
      if (bias_sums != nullptr) std::fill_n(bias_sums, columns, Acc(0));
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = rows_.rows[first + r];
        const int64_t* row_target = rows_.target + (first + r) * upstream.candidates;
        const Acc* other_z = Models == 1 ? nullptr : logits[Models - 1 - model] + r * columns;
        const auto terms = upstream.terms(model, row, row_target, heads_[model].transform);
        Acc* grad = scratch.grad.data();
        logits_gradient(upstream, model, row, row_target, heads_[model].transform, terms, tile.begin, tile.width,
                        logits[model] + r * columns, other_z, grad);
        if (bias_sums != nullptr) add_row(tile.width, grad, bias_sums);
        std::fill(grad + tile.width, grad + columns, Acc(0));
        round_to(columns, grad, grad_logits + r * columns);
      }
      std::fill(grad_logits + count * columns, grad_logits + row_block_ * columns, T(0));
      if (to[model].hidden == nullptr) continue;
      const int64_t stride = own.hidden.stride;
      multiply({row_block_, stride, columns, columns, stride, stride}, grad_logits, own.packed_weight_rows.data(),
               to[model].hidden + first * stride, true);
    }
  }

  // The parts of grad_bias, in their order.
  void add_bias(const Storage& own, const Tile& tile, Acc* to) {
    for (size_t begin = 0; begin < own.bias_blocks.size(); begin += tiling_.columns)
      add_row(tile.width, own.bias_blocks.data() + begin, to);
  }

  // Thread by thread some of its columns and of its width; dz is transposed once for those that follow one another.
  void add_weight(int model, const Tile& tile, bool accumulate, Acc* to) {
    Storage& own = storage_[model];
    const int64_t stride = own.hidden.stride, width = heads_[model].width();
    const Packed<T> packed{own.packed_hidden.data(), inner_, stride};
    const int64_t column_blocks = round_up(tile.width, kColumnBlock) / kColumnBlock;
    const int64_t width_blocks = round_up(width, kWidthBlock) / kWidthBlock;
    at::parallel_for(0, column_blocks * width_blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<T>& transposed = own_scratch().grad_columns;
      transposed.resize(kColumnBlock * inner_);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t column = block / width_blocks * kColumnBlock, first = block % width_blocks * kWidthBlock;
        const int64_t columns = std::min(tile.width - column, kColumnBlock);
        if (block == begin || first == 0)
          transpose(inner_, columns, own.grad_logits.data() + column, tiling_.columns, transposed.data(), inner_);
        multiply({columns, std::min(width - first, kWidthBlock), inner_, inner_, stride, width}, transposed.data(),
                 packed.at_column(first), to + column * width + first, accumulate);
      }
      release_products<T>();
    });
  }

  TileScratch<T>& own_scratch() {
    TileScratch<T>& own = scratch_.own();
    for (auto& logits : own.logits) logits.resize(row_block_ * tiling_.columns);
    own.grad.resize(tiling_.columns);
    return own;
  }

  const Head* heads_;
  const Tiling tiling_;
  RowBlock rows_ = {};
  int64_t row_block_ = 0, inner_ = 0;
  Storage storage_[Models];
  PerThread<TileScratch<T>> scratch_;
};

}  // namespace dlogp
