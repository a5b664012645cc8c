// Every statistic that forward returns and what it is, in the order of the outputs: for C++ the table that LogpStats
// and DeltaLogpStats of results.py are for Python. Outputs, their pointers and what is written there derive from it.
//
// PER_TARGET(name, value) is one number for each target, (N, K), PER_ROW(name, value) one for each row, (N,). `value`
// is in terms of the row's states, `model` and of a pair also `pair` and `base` (online_softmax.h), and for each target
// of its `logp` and `base_logp`. TOP_TOKEN and TOP_LOGP(name, state) are of each row the most likely token and its
// log p, only on demand. NORMALIZER(name, state) is what log p = (z − max) − log sum takes of each row besides its
// logits z, (2, N): the maxima, then the logarithms. lse, their sum, would be rounded where the logits are large.
#pragma once

#include <cstdint>
#include <vector>

#include "online_softmax.h"

#define DLOGP_LOGP_STATS(PER_TARGET, PER_ROW, TOP_TOKEN, TOP_LOGP, NORMALIZER) \
  PER_TARGET(logp, logp)                                                       \
  PER_ROW(entropy, model.entropy())                                            \
  PER_ROW(lse, model.lse())                                                    \
  TOP_TOKEN(top_token, model)                                                  \
  TOP_LOGP(top_logp, model)                                                    \
  NORMALIZER(normalizer, model)

#define DLOGP_DELTA_LOGP_STATS(PER_TARGET, PER_ROW, TOP_TOKEN, TOP_LOGP, NORMALIZER) \
  PER_TARGET(delta_logp, logp - base_logp)                                           \
  PER_TARGET(logp, logp)                                                             \
  PER_TARGET(base_logp, base_logp)                                                   \
  PER_ROW(entropy, model.entropy())                                                  \
  PER_ROW(base_entropy, base.entropy())                                              \
  PER_ROW(kl, pair.kl())                                                             \
  PER_ROW(reverse_kl, pair.reverse_kl())                                             \
  PER_ROW(lse, model.lse())                                                          \
  PER_ROW(base_lse, base.lse())                                                      \
  TOP_TOKEN(top_token, model)                                                        \
  TOP_LOGP(top_logp, model)                                                          \
  TOP_TOKEN(base_top_token, base)                                                    \
  TOP_LOGP(base_top_logp, base)                                                      \
  NORMALIZER(normalizer, model)                                                      \
  NORMALIZER(base_normalizer, base)

// Those of so many models, within a template of their number.
#define DLOGP_STATS(models, PER_TARGET, PER_ROW, TOP_TOKEN, TOP_LOGP, NORMALIZER) \
  if constexpr (models == 1) {                                                    \
    DLOGP_LOGP_STATS(PER_TARGET, PER_ROW, TOP_TOKEN, TOP_LOGP, NORMALIZER)        \
  } else {                                                                        \
    DLOGP_DELTA_LOGP_STATS(PER_TARGET, PER_ROW, TOP_TOKEN, TOP_LOGP, NORMALIZER)  \
  }
#define DLOGP_NOTHING(name, value)

namespace dlogp {

// Where statistics go; those that one model does not have, or that are not asked for, are null.
template <typename Acc>
struct StatsOutputs {
#define DLOGP_FIELD(name, value) Acc* name = nullptr;
#define DLOGP_TOKEN_FIELD(name, state) int64_t* name = nullptr;
  DLOGP_DELTA_LOGP_STATS(DLOGP_FIELD, DLOGP_FIELD, DLOGP_TOKEN_FIELD, DLOGP_FIELD, DLOGP_FIELD)
#undef DLOGP_FIELD
#undef DLOGP_TOKEN_FIELD
  int64_t rows = 0;  // N
};

// Statistics of some rows with one target each, in memory, but for what is only on demand.
template <typename Acc, int Models>
struct StatsStorage {
#define DLOGP_FIELD(name, value) std::vector<Acc> name;
  DLOGP_DELTA_LOGP_STATS(DLOGP_FIELD, DLOGP_FIELD, DLOGP_NOTHING, DLOGP_NOTHING, DLOGP_FIELD)
#undef DLOGP_FIELD

  // Room for so many rows.
  StatsOutputs<Acc> outputs(int64_t rows) {
    StatsOutputs<Acc> outputs;
    outputs.rows = rows;
#define DLOGP_RESIZE(name, value) \
  name.resize(rows);              \
  outputs.name = name.data();
#define DLOGP_RESIZE_TWO(name, state) \
  name.resize(2 * rows);              \
  outputs.name = name.data();
    DLOGP_STATS(Models, DLOGP_RESIZE, DLOGP_RESIZE, DLOGP_NOTHING, DLOGP_NOTHING, DLOGP_RESIZE_TWO)
#undef DLOGP_RESIZE
#undef DLOGP_RESIZE_TWO
    return outputs;
  }
};

}  // namespace dlogp
