// linear_logp and linear_delta_logp on the CPU: logits tile by tile (linear_tile.h), folded at once into running
// states.
#pragma once

#include <vector>

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
           Acc* const* kept_logits, PerThread<TileScratch<T>>& scratch, const StatsOutputs<Acc>& outputs);

 private:
  void fold_split(const Head* heads, const Tiling& tiling, const RowBlock& rows, int64_t split, Acc* const* kept_logits,
                  TileScratch<T>& scratch);
};

// Statistics of all rows that count, in blocks of rows that the workspace holds.
template <typename T, int Models>
void linear_forward(const Head* heads, const KeptRows& kept, int64_t workspace,
                    const StatsOutputs<Accumulator<T>>& outputs);

}  // namespace dlogp
