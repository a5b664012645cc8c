#include "row_statistics.h"

#include <algorithm>

#include "fold.h"

namespace dlogp {
namespace {

template <typename Acc>
SoftmaxState<Acc>& model_of(SoftmaxState<Acc>& state) {
  return state;
}
template <typename Acc>
SoftmaxState<Acc>& model_of(PairState<Acc>& state) {
  return state.model;
}

template <typename Acc>
SoftmaxState<Acc>& base_of(SoftmaxState<Acc>& state) {
  return state;
}
template <typename Acc>
SoftmaxState<Acc>& base_of(PairState<Acc>& state) {
  return state.base;
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

}  // namespace

template <typename Acc, int Models>
void fold_tile(const RowBlock& block, int64_t row, int64_t begin, int64_t count, const Acc* const (&z)[Models],
               State<Acc, Models>& state, Acc* const* target_logits) {
  const Acc before = model_of(state).max, base_before = base_of(state).max;
  fold_row(count, z, state);
  if (block.with_top) {
    SoftmaxState<Acc>&model = model_of(state), &base = base_of(state);
    if (model.max > before) model.top = begin + place_of(model.max, count, z[0]);
    if (Models == 2 && base.max > base_before) base.top = begin + place_of(base.max, count, z[Models - 1]);
  }
  for (int64_t place = row * block.candidates; place < (row + 1) * block.candidates; ++place) {
    const int64_t column = block.target[place] - begin;
    if (column < 0 || column >= count) continue;
    for (int model = 0; model < Models; ++model) target_logits[model][place] = z[model][column];
  }
}

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
    const SoftmaxState<Acc>&model = model_of(pair), &base = base_of(pair);
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

#define DLOGP_INSTANTIATE(Acc, Models)                                                                                \
  template void fold_tile<Acc, Models>(const RowBlock&, int64_t, int64_t, int64_t, const Acc* const(&)[Models],       \
                                       State<Acc, Models>&, Acc* const*);                                             \
  template void write_statistics<Acc, Models>(const State<Acc, Models>*, int64_t, const Acc* const*, const RowBlock&, \
                                              const int64_t*, int64_t, int64_t, const StatsOutputs<Acc>&);
DLOGP_INSTANTIATE(float, 1)
DLOGP_INSTANTIATE(float, 2)
DLOGP_INSTANTIATE(double, 1)
DLOGP_INSTANTIATE(double, 2)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
