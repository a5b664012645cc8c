#include "linear_forward.h"

#include <algorithm>

#include "fold.h"

namespace dlogp {

template <typename T, int Models>
void ForwardBlock<T, Models>::fold_split(const Head* heads, const Tiling& tiling, const RowBlock& rows, int64_t split,
                                         Acc* const* kept_logits, TileScratch<T>& scratch) {
  Acc* of_targets[Models];
  for (int model = 0; model < Models; ++model) of_targets[model] = target_logits[model].data();
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
  release_products<T>();
}

template <typename T, int Models>
void ForwardBlock<T, Models>::run(const Head* heads, const Tiling& tiling, const RowBlock& rows, int64_t padded,
                                  const int64_t* places, Acc* const* kept_logits, PerThread<TileScratch<T>>& scratch,
                                  const StatsOutputs<Acc>& outputs) {
  const Acc* of_targets[Models];
  for (int model = 0; model < Models; ++model) {
    hidden[model] = pack_hidden(heads[model].hidden, rows.rows, rows.count, padded, hidden_storage[model]);
    target_logits[model].resize(rows.count * rows.candidates);
    of_targets[model] = target_logits[model].data();
  }
  states.resize(rows.count * tiling.splits);
  for_each(tiling.splits, 1, [&](int64_t split) {
    TileScratch<T>& own = scratch.own();
    own.reserve(heads, Models, tiling, kRowBlock);
    fold_split(heads, tiling, rows, split, kept_logits, own);
  });
  at::parallel_for(0, rows.count, 64, [&](int64_t begin, int64_t end) {
    write_statistics<Acc, Models>(states.data(), tiling.splits, of_targets, rows, places, begin, end, outputs);
  });
}

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

#define DLOGP_INSTANTIATE(T)                                                                                      \
  template struct ForwardBlock<T, 1>;                                                                             \
  template struct ForwardBlock<T, 2>;                                                                             \
  template void linear_forward<T, 1>(const Head*, const KeptRows&, int64_t, const StatsOutputs<Accumulator<T>>&); \
  template void linear_forward<T, 2>(const Head*, const KeptRows&, int64_t, const StatsOutputs<Accumulator<T>>&);
DLOGP_INSTANTIATE(c10::BFloat16)
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
