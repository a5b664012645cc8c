// logp and delta_logp on the CPU: statistics of given logits, each read once, and their gradients.
//
// A row is cut into splits of fixed size whose states merge in their order, so that the result does not depend on how
// rows and splits are handed to threads. `Models` is 1, or 2 for a pair (the model, then its base). Acc is float or
// double.
#pragma once

#include <algorithm>
#include <vector>

#include "fold.h"
#include "gradient.h"
#include "linear_tile.h"
#include "matrix.h"
#include "row_statistics.h"

namespace dlogp {

struct Logits {
  Matrix values;
  LogitTransform transform;
};

constexpr int64_t kLogitsChunk = 1024;
constexpr int64_t kChunksPerSplit = 16;
// Rows whose states are held at once.
constexpr int64_t kLogitsRows = 256;

// How a row of logits is cut.
inline Tiling tile_logits_row(int64_t vocabulary) {
  const int64_t chunks = (vocabulary + kLogitsChunk - 1) / kLogitsChunk;
  return {vocabulary, kLogitsChunk, (chunks + kChunksPerSplit - 1) / kChunksPerSplit};
}

// Transformed logits [begin, begin + count) of a row: in place where they need no change, else in `buffer`.
template <typename Acc>
const Acc* transformed(const Logits& logits, int64_t row, int64_t begin, int64_t count, Acc* buffer) {
  if (logits.transform.is_identity()) {
    const Acc* in_place = row_in_place<Acc>(logits.values, row, begin);
    if (in_place != nullptr) return in_place;
  }
  read_row(logits.values, row, begin, count, buffer);
  transform_row(logits.transform, count, static_cast<const Acc*>(nullptr), buffer);
  return buffer;
}

// Folds one split of row `row` of a block.
template <typename Acc, int Models>
State<Acc, Models> fold_split(const Logits* logits, const RowBlock& rows, int64_t row, const Tiling& tiling,
                              int64_t split, Acc* const* target_logits) {
  State<Acc, Models> state;
  alignas(kLine) Acc buffers[Models][kLogitsChunk];
  for (int64_t begin = tiling.split_begin(split); begin < tiling.split_end(split); begin += tiling.columns) {
    const int64_t count = std::min(tiling.columns, tiling.vocabulary - begin);
    const Acc* z[Models];
    for (int model = 0; model < Models; ++model)
      z[model] = transformed(logits[model], rows.rows[row], begin, count, buffers[model]);
    fold_tile<Acc, Models>(rows, row, begin, count, z, state, target_logits);
  }
  settle(state);
  return state;
}

// Writes both models' gradients of one split of row `row`.
template <typename Acc, int Models>
void backward_split(const Logits* logits, int64_t row, const int64_t* target, const Tiling& tiling, int64_t split,
                    const Upstream<Acc>& upstream, const Output* outputs) {
  alignas(kLine) Acc buffers[Models][kLogitsChunk], grad[kLogitsChunk];
  GradientTerms<Acc> terms[Models];
  for (int model = 0; model < Models; ++model)
    terms[model] = upstream.terms(model, row, target, logits[model].transform);
  for (int64_t begin = tiling.split_begin(split); begin < tiling.split_end(split); begin += tiling.columns) {
    const int64_t count = std::min(tiling.columns, tiling.vocabulary - begin);
    const Acc* z[Models];
    for (int model = 0; model < Models; ++model)
      z[model] = transformed(logits[model], row, begin, count, buffers[model]);
    for (int model = 0; model < Models; ++model) {
      if (!outputs[model]) continue;
      const Acc* other_z = Models == 1 ? nullptr : z[Models - 1 - model];
      logits_gradient(upstream, model, row, target, logits[model].transform, terms[model], begin, count, z[model],
                      other_z, grad);
      write_row(outputs[model], row, begin, count, grad);
    }
  }
}

template <typename Acc, int Models>
void logp_forward(const Logits* logits, const KeptRows& kept, const StatsOutputs<Acc>& outputs) {
  const Tiling tiling = tile_logits_row(logits[0].values.columns);
  std::vector<State<Acc, Models>> states(kLogitsRows * tiling.splits);
  std::vector<Acc> storage[Models];
  Acc* target_logits[Models];
  for (int model = 0; model < Models; ++model) {
    storage[model].resize(kLogitsRows * kept.candidates);
    target_logits[model] = storage[model].data();
  }
  for (int64_t first = 0; first < kept.count(); first += kLogitsRows) {
    const RowBlock rows = kept.block(first, kLogitsRows);
    for_each(rows.count * tiling.splits, 1, [&](int64_t i) {
      states[i] = fold_split<Acc, Models>(logits, rows, i / tiling.splits, tiling, i % tiling.splits, target_logits);
    });
    write_statistics<Acc, Models>(states.data(), tiling.splits, target_logits, rows, rows.rows, 0, rows.count, outputs);
  }
}

// Writes the gradients of the rows that count where `outputs` has data.
template <typename Acc, int Models>
void logp_backward(const Logits* logits, const KeptRows& kept, const Upstream<Acc>& upstream, const Output* outputs) {
  const Tiling tiling = tile_logits_row(logits[0].values.columns);
  const RowBlock rows = kept.block(0, kept.count());
  for_each(rows.count * tiling.splits, 1, [&](int64_t i) {
    const int64_t row = i / tiling.splits;
    backward_split<Acc, Models>(logits, rows.rows[row], rows.target + row * rows.candidates, tiling, i % tiling.splits,
                                upstream, outputs);
  });
}

}  // namespace dlogp
