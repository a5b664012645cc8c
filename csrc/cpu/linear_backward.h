// The gradient of linear_logp and linear_delta_logp on the CPU: logits are recomputed tile by tile (linear_tile.h), and
// their gradient (backward_tile.h) goes to accumulators of some tiles or of some rows, whichever the workspace holds.
#pragma once

#include <algorithm>
#include <vector>

#include "backward_tile.h"

namespace dlogp {

// Where a head's gradients go; an output without data is not wanted.
struct HeadOutputs {
  Output hidden, weight, bias;

  bool any() const { return hidden || weight || bias; }
};

template <typename T, int Models>
class LinearBackward {
  using Acc = Accumulator<T>;

 public:
  LinearBackward(const Head* heads, const KeptRows& kept, const Upstream<Acc>& upstream, int64_t workspace,
                 const HeadOutputs* outputs)
      : heads_(heads),
        kept_(kept),
        upstream_(upstream),
        workspace_(workspace),
        row_block_(backward_row_block(kept.count())),
        tiling_(tile_vocabulary(heads[0].vocabulary(), std::max(heads[0].width(), heads[Models - 1].width()), sizeof(T),
                                kBackwardTile<T>)),
        block_(heads, tiling_) {
    for (int model = 0; model < Models; ++model) {
      HeadStorage& own = storage_[model];
      own.stride = packed_width<T>(heads[model].width());
      own.out = outputs[model];
      if (own.out.bias) own.bias.resize(tiling_.tiles() * tiling_.columns);
      if (own.out.hidden) hidden_width_ += own.stride;
      if (own.out.weight || own.out.bias) weight_width_ += own.stride;
    }
    const int64_t row_bytes =
        sizeof(T) * 2 * (storage_[0].stride + storage_[Models - 1].stride + Models * tiling_.columns);
    max_rows_ = std::clamp(workspace / 8 / row_bytes / kRowBlock * kRowBlock, kRowBlock, kMaxRows);
  }

  void run() {
    // Accumulators for all rows of grad_hidden and for some tiles of grad_weight serve both with one recomputation of
    // the logits. Where the former do not fit, each is formed in a pass of its own.
    const int64_t hidden_bytes = kept_.count() * int64_t(sizeof(Acc)) * hidden_width_;
    if (hidden_width_ > 0 && weight_width_ > 0 && hidden_bytes > workspace_ / 2) {
      pass(true, false);
      pass(false, true);
    } else {
      pass(hidden_width_ > 0, weight_width_ > 0);
    }
  }

 private:
  struct HeadStorage {
    int64_t stride = 0;
    HeadOutputs out;
    std::vector<T> hidden_rows;
    std::vector<Acc> hidden, weight, bias;
  };

  void pass(bool with_hidden, bool with_weight) {
    with_hidden_ = with_hidden;
    with_weight_ = with_weight;
    const int64_t blocks = (kept_.count() + max_rows_ - 1) / max_rows_;
    const int64_t accumulated_rows = padded(with_weight ? kept_.count() : std::min(max_rows_, kept_.count()));
    const int64_t tiles_at_once = with_weight ? accumulated_tiles(blocks) : tiling_.tiles();
    for (HeadStorage& own : storage_) {
      if (with_hidden && own.out.hidden) own.hidden.assign(accumulated_rows * own.stride, Acc(0));
      if (with_weight && own.out.weight) own.weight.resize(tiles_at_once * tiling_.columns * own.stride);
    }
    for (int64_t first_tile = 0; first_tile < tiling_.tiles(); first_tile += tiles_at_once) {
      const int64_t end_tile = std::min(first_tile + tiles_at_once, tiling_.tiles());
      for (int64_t first = 0; first < kept_.count(); first += max_rows_) {
        const RowBlock rows = kept_.block(first, max_rows_);
        if (blocks > 1 || first_tile == 0) gather(rows);
        for (int64_t tile = first_tile; tile < end_tile; ++tile) add_tile(tile, tile - first_tile, first);
        if (!with_weight) finish_hidden(rows);
      }
      if (with_weight) finish_weight(first_tile, end_tile);
    }
    if (with_weight && with_hidden) finish_hidden(kept_.block(0, kept_.count()));
    if (!with_weight) return;
    for (HeadStorage& own : storage_)
      if (own.out.bias) write_row(own.out.bias, 0, 0, own.out.bias.columns, own.bias.data());
  }

  // How many tiles of grad_weight a quarter of the workspace holds; one where each tile sees all rows at once.
  int64_t accumulated_tiles(int64_t blocks) const {
    const int64_t tile_bytes = int64_t(sizeof(Acc)) * tiling_.columns * weight_width_;
    return blocks == 1 ? 1 : std::clamp<int64_t>(workspace_ / 4 / tile_bytes, 1, tiling_.tiles());
  }

  int64_t padded(int64_t count) const { return round_up(count, row_block_); }

  void gather(const RowBlock& rows) {
    PackedRows<T> hidden[Models];
    bool with_weight[Models];
    for (int model = 0; model < Models; ++model) {
      HeadStorage& own = storage_[model];
      hidden[model] = pack_hidden(heads_[model].hidden, rows.rows, rows.count, padded(rows.count), own.hidden_rows);
      with_weight[model] = with_weight_ && own.out.weight;
    }
    block_.set_rows(rows, row_block_, hidden, with_weight);
  }

  // Tile `index` of the vocabulary, whose accumulators are at `place`, and the rows from `first` on.
  void add_tile(int64_t index, int64_t place, int64_t first) {
    HeadAccumulators<Acc> to[Models];
    for (int model = 0; model < Models; ++model) {
      HeadStorage& own = storage_[model];
      if (with_hidden_ && own.out.hidden)
        to[model].hidden = own.hidden.data() + (with_weight_ ? first * own.stride : 0);
      if (with_weight_ && own.out.weight)
        to[model].weight = own.weight.data() + place * tiling_.columns * heads_[model].width();
      if (with_weight_ && own.out.bias) to[model].bias = own.bias.data() + index * tiling_.columns;
    }
    block_.add_tile(index, upstream_, nullptr, first > 0, to);
  }

  // Writes the accumulated rows and clears them for the next block.
  void finish_hidden(const RowBlock& rows) {
    for (HeadStorage& own : storage_) {
      if (!own.out.hidden) continue;
      for_each(rows.count, 64, [&](int64_t i) {
        write_row(own.out.hidden, rows.rows[i], 0, own.out.hidden.columns, own.hidden.data() + i * own.stride);
      });
      std::fill(own.hidden.begin(), own.hidden.end(), Acc(0));
    }
  }

  // Writes the accumulated tiles [first_tile, end_tile) of grad_weight.
  void finish_weight(int64_t first_tile, int64_t end_tile) {
    const int64_t begin = first_tile * tiling_.columns;
    const int64_t count = std::min(end_tile * tiling_.columns, tiling_.vocabulary) - begin;
    for (HeadStorage& own : storage_) {
      if (!own.out.weight) continue;
      const int64_t width = own.out.weight.columns;
      for_each(count, 64,
               [&](int64_t v) { write_row(own.out.weight, begin + v, 0, width, own.weight.data() + v * width); });
    }
  }

  const Head* heads_;
  const KeptRows& kept_;
  const Upstream<Acc>& upstream_;
  const int64_t workspace_, row_block_;
  const Tiling tiling_;
  BackwardBlock<T, Models> block_;
  HeadStorage storage_[Models];
  int64_t max_rows_ = 0;
  int64_t hidden_width_ = 0, weight_width_ = 0;  // of the models with such a gradient
  bool with_hidden_ = false, with_weight_ = false;
};

// Writes the gradients of each model's head, of hidden those of the rows that count; nothing if none does. Blocks of
// rows and accumulators stay within the workspace.
template <typename T, int Models>
void linear_backward(const Head* heads, const KeptRows& kept, const Upstream<Accumulator<T>>& upstream,
                     int64_t workspace, const HeadOutputs* outputs) {
  if (kept.count() == 0 || !std::any_of(outputs, outputs + Models, [](const HeadOutputs& x) { return x.any(); }))
    return;
  if constexpr (Models == 2) {
    if (!upstream.has_divergence()) {  // then neither gradient needs the other model
      for (int model = 0; model < 2; ++model)
        linear_backward<T, 1>(heads + model, kept, upstream.of_model(model), workspace, outputs + model);
      return;
    }
  }
  LinearBackward<T, Models>(heads, kept, upstream, workspace, outputs).run();
}

}  // namespace dlogp
