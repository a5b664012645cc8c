// The rows of a batch that count, and their statistics out of softmax states.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../common/statistics.h"
#include "fold.h"

namespace dlogp {

// Rows that are worked on together.
struct RowBlock {
  int64_t count;
  const int64_t* rows;    // (count,): their places in the batch
  const int64_t* target;  // (count, candidates)
  int64_t candidates, ignore_index;
  bool with_top;  // the most likely token is asked for
};

// The rows with a target that is not ignored, and the targets (count, candidates) of each.
struct KeptRows {
  std::vector<int64_t> rows, target;
  int64_t candidates = 1, ignore_index = -100;
  bool with_top = false;

  int64_t count() const { return int64_t(rows.size()); }
  // Rows from `first` on, `most` of them at most.
  RowBlock block(int64_t first, int64_t most) const {
    return {std::min(most, count() - first),
            rows.data() + first,
            target.data() + first * candidates,
            candidates,
            ignore_index,
            with_top};
  }
};

// Of one model, or of a pair.
template <typename Acc, int Models>
using State = std::conditional_t<Models == 1, SoftmaxState<Acc>, PairState<Acc>>;

// That of one of a pair's models, or of the only one.
template <typename State>
auto& state_of(State& state, int model) {
  if constexpr (requires { state.base; })
    return model == 0 ? state.model : state.base;
  else
    return state;
}

// The place of the first logit that is `max`; there is one.
template <typename Acc>
int64_t place_of(Acc max, int64_t count, const Acc* z) {
  constexpr int64_t kPiece = 64;  // compared without a branch, several at a time
  int64_t begin = 0;
  for (; begin + kPiece < count; begin += kPiece) {
    int found = 0;
    for (int64_t i = 0; i < kPiece; ++i) found |= int(z[begin + i] == max);
    if (found != 0) break;
  }
  return std::find(z + begin, z + count, max) - z;
}

// Folds logits z[model][0 … count), those of tokens from `begin` on, into the state of row `row` of a block, and notes
// the logit of each of its targets that lies there.
template <typename Acc, int Models>
void fold_tile(const RowBlock& block, int64_t row, int64_t begin, int64_t count, const Acc* const (&z)[Models],
               State<Acc, Models>& state, Acc* const* target_logits) {
  const Acc before = state_of(state, 0).largest, base_before = state_of(state, 1).largest;
  fold_row(count, z, state);
  if (block.with_top) {
    SoftmaxState<Acc>&model = state_of(state, 0), &base = state_of(state, 1);
    if (model.largest > before) model.top = begin + place_of(model.largest, count, z[0]);
    if (Models == 2 && base.largest > base_before) base.top = begin + place_of(base.largest, count, z[Models - 1]);
  }
  for (int64_t place = row * block.candidates; place < (row + 1) * block.candidates; ++place) {
    const int64_t column = block.target[place] - begin;
    if (column < 0 || column >= count) continue;
    for (int model = 0; model < Models; ++model) target_logits[model][place] = z[model][column];
  }
}

// Merges the states of rows [begin, end) of a block, `splits` of each, in their order, and writes their statistics to
// `places` in the outputs, but for those of ignored targets. `target_logits` (count, candidates) are of each model.
template <typename Acc, int Models>
void write_statistics(const State<Acc, Models>* states, int64_t splits, const Acc* const* target_logits,
                      const RowBlock& block, const int64_t* places, int64_t begin, int64_t end,
                      const StatsOutputs<Acc>& outputs) {
#define DLOGP_WRITE_ROW(name, value) outputs.name[row] = Acc(value);
#define DLOGP_WRITE_ON_DEMAND(name, value) \
  if (outputs.name != nullptr) outputs.name[row] = Acc(value);
#define DLOGP_WRITE_TARGET(name, value) outputs.name[row * block.candidates + k] = Acc(value);
  for (int64_t i = begin; i < end; ++i) {
    State<Acc, Models> pair = states[i * splits];
    for (int64_t split = 1; split < splits; ++split) merge(pair, states[i * splits + split]);
    const SoftmaxState<Acc>&model = state_of(pair, 0), &base = state_of(pair, 1);
    const int64_t row = places[i];
    DLOGP_STATS(Models, DLOGP_NOTHING, DLOGP_WRITE_ROW, DLOGP_WRITE_ROW, DLOGP_WRITE_ON_DEMAND)
    for (int64_t k = 0; k < block.candidates; ++k) {
      const int64_t place = i * block.candidates + k;
      if (block.target[place] == block.ignore_index) continue;
      const double logp = model.logp(target_logits[0][place]);
      const double base_logp = Models == 1 ? logp : base.logp(target_logits[Models - 1][place]);
      DLOGP_STATS(Models, DLOGP_WRITE_TARGET, DLOGP_NOTHING, DLOGP_NOTHING, DLOGP_NOTHING)
    }
  }
#undef DLOGP_WRITE_ROW
#undef DLOGP_WRITE_ON_DEMAND
#undef DLOGP_WRITE_TARGET
}

}  // namespace dlogp
