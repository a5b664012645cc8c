// Every statistic that forward returns and what it is, in the order of the outputs: for C++ the table that LogpStats
// and DeltaLogpStats of results.py are for Python. Outputs, their pointers and what is written there derive from it.
//
// PER_TARGET(name, value) is one number for each target, (N, K), PER_ROW(name, value) one for each row, (N,). `value`
// is in terms of the row's states, `model` and of a pair also `pair` and `base` (online_softmax.h), and for each target
// of its `logp` and `base_logp`. The output `extra` (rows, N) has the rest of each row, in this order: EXTRA(name,
// value), what log p = (z − max) − log1p(rest) takes besides the logits z (lse, their sum, would be rounded where the
// logits are large), and ON_DEMAND(name, value), what is only there if it is asked for.
#pragma once

#include <cstdint>
#include <vector>

#include "online_softmax.h"

#define DLOGP_LOGP_STATS(PER_TARGET, PER_ROW, EXTRA, ON_DEMAND) \
  PER_TARGET(logp, logp)                                        \
  PER_ROW(entropy, model.entropy())                             \
  PER_ROW(lse, model.lse())                                     \
  EXTRA(max, model.max)                                         \
  EXTRA(rest, model.rest)                                       \
  ON_DEMAND(top_token, model.top_token())                       \
  ON_DEMAND(top_logp, model.top_logp())

#define DLOGP_DELTA_LOGP_STATS(PER_TARGET, PER_ROW, EXTRA, ON_DEMAND) \
  PER_TARGET(delta_logp, logp - base_logp)                            \
  PER_TARGET(logp, logp)                                              \
  PER_TARGET(base_logp, base_logp)                                    \
  PER_ROW(entropy, model.entropy())                                   \
  PER_ROW(base_entropy, base.entropy())                               \
  PER_ROW(kl, pair.kl())                                              \
  PER_ROW(reverse_kl, pair.reverse_kl())                              \
  PER_ROW(lse, model.lse())                                           \
  PER_ROW(base_lse, base.lse())                                       \
  EXTRA(max, model.max)                                               \
  EXTRA(rest, model.rest)                                             \
  EXTRA(base_max, base.max)                                           \
  EXTRA(base_rest, base.rest)                                         \
  ON_DEMAND(top_token, model.top_token())                             \
  ON_DEMAND(top_logp, model.top_logp())                               \
  ON_DEMAND(base_top_token, base.top_token())                         \
  ON_DEMAND(base_top_logp, base.top_logp())

// Those of so many models, within a template of their number.
#define DLOGP_STATS(models, PER_TARGET, PER_ROW, EXTRA, ON_DEMAND) \
  if constexpr (models == 1) {                                     \
    DLOGP_LOGP_STATS(PER_TARGET, PER_ROW, EXTRA, ON_DEMAND)        \
  } else {                                                         \
    DLOGP_DELTA_LOGP_STATS(PER_TARGET, PER_ROW, EXTRA, ON_DEMAND)  \
  }
#define DLOGP_NOTHING(name, value)

namespace dlogp {

// Where statistics go; those that one model does not have, or that are not asked for, are null.
template <typename Acc>
struct StatsOutputs {
#define DLOGP_FIELD(name, value) Acc* name = nullptr;
  DLOGP_DELTA_LOGP_STATS(DLOGP_FIELD, DLOGP_FIELD, DLOGP_FIELD, DLOGP_FIELD)
#undef DLOGP_FIELD
};

// Statistics of some rows with one target each, in memory, but for what is only on demand.
template <typename Acc, int Models>
struct StatsStorage {
#define DLOGP_FIELD(name, value) std::vector<Acc> name;
  DLOGP_DELTA_LOGP_STATS(DLOGP_FIELD, DLOGP_FIELD, DLOGP_FIELD, DLOGP_NOTHING)
#undef DLOGP_FIELD

  // Room for so many rows.
  StatsOutputs<Acc> outputs(int64_t rows) {
    StatsOutputs<Acc> outputs;
#define DLOGP_RESIZE(name, value) \
  name.resize(rows);              \
  outputs.name = name.data();
    DLOGP_STATS(Models, DLOGP_RESIZE, DLOGP_RESIZE, DLOGP_RESIZE, DLOGP_NOTHING)
#undef DLOGP_RESIZE
    return outputs;
  }
};

}  // namespace dlogp
