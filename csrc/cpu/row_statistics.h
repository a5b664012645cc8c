// The rows of a batch that count, and their statistics out of softmax states.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../common/statistics.h"

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

// Folds logits z[model][0 … count), those of tokens from `begin` on, into the state of row `row` of a block, and notes
// the logit of each of its targets that lies there.
template <typename Acc, int Models>
void fold_tile(const RowBlock& block, int64_t row, int64_t begin, int64_t count, const Acc* const (&z)[Models],
               State<Acc, Models>& state, Acc* const* target_logits);

// Merges the states of rows [begin, end) of a block, `splits` of each, in their order, and writes their statistics to
// `places` in the outputs, but for those of ignored targets. `target_logits` (count, candidates) are of each model.
template <typename Acc, int Models>
void write_statistics(const State<Acc, Models>* states, int64_t splits, const Acc* const* target_logits,
                      const RowBlock& block, const int64_t* places, int64_t begin, int64_t end,
                      const StatsOutputs<Acc>& outputs);

}  // namespace dlogp
