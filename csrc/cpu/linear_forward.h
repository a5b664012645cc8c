// linear_logp and linear_delta_logp on the CPU: logits tile by tile (linear_tile.h), folded at once into running
// states.
#pragma once

#include <algorithm>
#include <vector>

#include "fold.h"
#include "linear_tile.h"
#include "row_statistics.h"

namespace dlogp {

// A block of rows on its way to its statistics; one object serves block after block.
template <typename T, int Models>
struct ForwardBlock {
  using Acc = Accumulator<T>;

  PackedRows<T> hidden[Models];
  std::vector<T> hidden_storage[Models];
  std::vector<Acc> target_logits[Models];
  std::vector<State<Acc, Models>> states;

  // Writes the statistics of `rows` to `places` in the outputs. Hidden states are padded to `padded` rows. If
  // `kept_logits` is not null, each model's transformed logits go there: (tiles, padded_rows(rows.count), columns).
  void run(const Head* heads, const Tiling& tiling, const RowBlock& rows, int64_t padded, const int64_t* places,
           Acc* const* kept_logits, PerThread<TileScratch<T>>& scratch, const StatsOutputs<Acc>& outputs) {
    const Acc* of_targets[Models];
    for (int model = 0; model < Models; ++model) {
      hidden[model] = pack_hidden(heads[model].hidden, rows.rows, rows.count, padded, hidden_storage[model]);
      target_logits[model].resize(rows.count * rows.candidates);
      of_targets[model] = target_logits[model].data();
    }
    states.resize(rows.count * tiling.splits);
    for_each(tiling.splits, 1,
             [&](int64_t split) { fold_split(heads, tiling, rows, split, kept_logits, scratch.own()); });
    at::parallel_for(0, rows.count, 64, [&](int64_t begin, int64_t end) {
      write_statistics<Acc, Models>(states.data(), tiling.splits, of_targets, rows, places, begin, end, outputs);
    });
  }

 private:
  void fold_split(const Head* heads, const Tiling& tiling, const RowBlock& rows, int64_t split, Acc* const* kept_logits,
                  TileScratch<T>& scratch) {
    Acc* of_targets[Models];
    for (int model = 0; model < Models; ++model) {
      of_targets[model] = target_logits[model].data();
      scratch.packed_weight[model].resize(Packed<T>::size(hidden[model].stride, tiling.columns));
      scratch.logits[model].resize(kRowBlock * tiling.columns);
    }
    for (int64_t r = 0; r < rows.count; ++r) states[r * tiling.splits + split] = {};
    for (int64_t begin = tiling.split_begin(split); begin < tiling.split_end(split); begin += tiling.columns) {
      const int64_t width = std::min(tiling.columns, tiling.vocabulary - begin);
      for (int model = 0; model < Models; ++model) {
        const auto weight = weight_rows(heads[model].weight, begin, tiling.columns, scratch.weight_copy);
        pack_columns<T>(0, tiling.columns, weight.data, weight.stride,
                        {scratch.packed_weight[model].data(), hidden[model].stride, tiling.columns});
      }
      for (int64_t first = 0; first < rows.count; first += kRowBlock) {
        const int64_t count = std::min(kRowBlock, rows.count - first);
        Acc* logits[Models];
        for (int model = 0; model < Models; ++model) {
          logits[model] = kept_logits == nullptr
                              ? scratch.logits[model].data()
                              : kept_logits[model] + begin * padded_rows(rows.count) + first * tiling.columns;
          tile_logits(heads[model], hidden[model], first, count, scratch.packed_weight[model].data(), begin, width,
                      tiling, scratch, logits[model]);
        }
        for (int64_t row = first; row < first + count; ++row) {
          const Acc* z[Models];
          for (int model = 0; model < Models; ++model) z[model] = logits[model] + (row - first) * tiling.columns;
          fold_tile<Acc, Models>(rows, row, begin, width, z, states[row * tiling.splits + split], of_targets);
        }
      }
    }
    for (int64_t r = 0; r < rows.count; ++r) settle(states[r * tiling.splits + split]);
    release_products<T>();
  }
};

// Statistics of all rows that count, in blocks of rows that the workspace holds.
template <typename T, int Models>
void linear_forward(const Head* heads, const KeptRows& kept, int64_t workspace,
                    const StatsOutputs<Accumulator<T>>& outputs) {
  using Acc = Accumulator<T>;
  int64_t width = 0;
  for (int model = 0; model < Models; ++model) width += heads[model].width();
  const Tiling tiling = tile_vocabulary(heads[0].vocabulary(), width, sizeof(T));
  const int64_t row_bytes = width * int64_t(sizeof(T)) + Models * kept.candidates * int64_t(sizeof(Acc)) +
                            tiling.splits * int64_t(sizeof(State<Acc, Models>));
  const int64_t max_rows = std::clamp(workspace / 8 / row_bytes / kRowBlock * kRowBlock, kRowBlock, kMaxRows);
  PerThread<TileScratch<T>> scratch;
  ForwardBlock<T, Models> block;
  for (int64_t first = 0; first < kept.count(); first += max_rows) {
    const RowBlock rows = kept.block(first, max_rows);
    block.run(heads, tiling, rows, padded_rows(rows.count), rows.rows, nullptr, scratch, outputs);
  }
}

}  // namespace dlogp
