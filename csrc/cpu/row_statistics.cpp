#include "row_statistics.h"

namespace dlogp {
namespace {

template <typename Acc>
const SoftmaxState<Acc>& model_of(const SoftmaxState<Acc>& state) {
  return state;
}
template <typename Acc>
const SoftmaxState<Acc>& model_of(const PairState<Acc>& state) {
  return state.model;
}

template <typename Acc>
const SoftmaxState<Acc>& base_of(const SoftmaxState<Acc>& state) {
  return state;
}
template <typename Acc>
const SoftmaxState<Acc>& base_of(const PairState<Acc>& state) {
  return state.base;
}

}  // namespace

template <typename Acc, int Models>
void write_statistics(const State<Acc, Models>* states, int64_t splits, const Acc* const* target_logits,
                      const RowBlock& block, const int64_t* places, int64_t begin, int64_t end,
                      const StatsOutputs<Acc>& outputs) {
#define DLOGP_WRITE_ROW(name, value) outputs.name[row] = Acc(value);
#define DLOGP_WRITE_TARGET(name, value) outputs.name[row * block.candidates + k] = Acc(value);
  for (int64_t i = begin; i < end; ++i) {
    State<Acc, Models> pair = states[i * splits];
    for (int64_t split = 1; split < splits; ++split) merge(pair, states[i * splits + split]);
    const SoftmaxState<Acc>&model = model_of(pair), &base = base_of(pair);
    const int64_t row = places[i];
    DLOGP_STATS(Models, DLOGP_NOTHING, DLOGP_WRITE_ROW)
    for (int64_t k = 0; k < block.candidates; ++k) {
      const int64_t place = i * block.candidates + k;
      if (block.target[place] == block.ignore_index) continue;
      const double logp = model.logp(target_logits[0][place]);
      const double base_logp = Models == 1 ? logp : base.logp(target_logits[Models - 1][place]);
      DLOGP_STATS(Models, DLOGP_WRITE_TARGET, DLOGP_NOTHING)
    }
  }
#undef DLOGP_WRITE_ROW
#undef DLOGP_WRITE_TARGET
}

#define DLOGP_INSTANTIATE(Acc, Models)                                                                                \
  template void write_statistics<Acc, Models>(const State<Acc, Models>*, int64_t, const Acc* const*, const RowBlock&, \
                                              const int64_t*, int64_t, int64_t, const StatsOutputs<Acc>&);
DLOGP_INSTANTIATE(float, 1)
DLOGP_INSTANTIATE(float, 2)
DLOGP_INSTANTIATE(double, 1)
DLOGP_INSTANTIATE(double, 2)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
