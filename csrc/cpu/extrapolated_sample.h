// extrapolated_sample on the CPU, one row at a time: the draft, the criterion, the replacement.
//
// A row is read once for its maxima and softmax statistics, and in parts again by a filter and by a draw, which skip
// blocks of tokens that are cut off or can not win. Acc is float or double; sums are in double; a row's result depends
// on nothing but its logits, its row_id and step, and the options.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/sampling.h"
#include "fold.h"
#include "scaled_logits.h"

namespace dlogp {

template <typename Acc>
struct SampledRow {
  int64_t token = -1, draft_token = -1;
  bool selected = false;
  Acc delta_logp = NAN, logp = NAN, base_logp = NAN;
};

// Where the results go, one a row.
template <typename Acc>
struct SampleOutputs {
  int64_t *token, *draft_token;
  bool* selected;
  Acc *delta_logp, *logp, *base_logp;

  void set(int64_t row, const SampledRow<Acc>& sampled) const {
    token[row] = sampled.token;
    draft_token[row] = sampled.draft_token;
    selected[row] = sampled.selected;
    delta_logp[row] = sampled.delta_logp;
    logp[row] = sampled.logp;
    base_logp[row] = sampled.base_logp;
  }
};

// Adds logits of both models to their state, in as many sums as the criterion needs.
template <typename Acc>
void fold_for(Criterion criterion, int64_t count, const Acc* z, const Acc* base_z, PairState<Acc>& state) {
  if (needs_divergence(criterion)) return fold_row(count, z, base_z, state);
  if (needs_all_sums(criterion)) {
    fold_row(count, z, state.model);
    fold_row(count, base_z, state.base);
  } else {
    fold_sum(count, z, state.model);
    fold_sum(count, base_z, state.base);
  }
}

template <typename Acc>
void extrapolated_sample(const Matrix& logits, const Matrix& base_logits, const RowIdentities& identities,
                         const SampleOptions& options, const SampleOutputs<Acc>& outputs);

}  // namespace dlogp
