// extrapolated_sample on the CPU, one row at a time: the draft, the criterion, the replacement.
//
// A row is read once for its maxima and softmax statistics, and in parts again by a filter and by a draw, which skip
// blocks of tokens that are cut off or can not win. Real is float or double; sums are in double; a row's result depends
// on nothing but its logits, its row_id and step, and the options.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/sampling.h"
#include "fold.h"
#include "scaled_logits.h"

namespace dlogp {

template <typename Real>
struct SampledRow {
  int64_t token = -1, draft_token = -1;
  bool selected = false;
  Real delta_logp = NAN, logp = NAN, base_logp = NAN;
};

// Adds logits of both models to their state, in as many sums as the criterion needs.
template <typename Real>
void fold_for(Criterion criterion, int64_t count, const Real* z, const Real* base_z, PairState<Real>& state) {
  if (needs_divergence(criterion)) return fold_row(count, z, base_z, state);
  if (needs_all_sums(criterion)) {
    fold_row(count, z, state.model);
    fold_row(count, base_z, state.base);
  } else {
    fold_sum(count, z, state.model);
    fold_sum(count, base_z, state.base);
  }
}

// Room that the rows of a thread share.
template <typename Real>
struct SampleScratch {
  BlockMaxima<Real> maxima, base_maxima, drawn_maxima;
  std::vector<Real> values;
};

template <typename Real>
SampledRow<Real> extrapolated_sample(const Matrix& logits, const Matrix& base_logits, int64_t row,
                                     const RowNoise& noise, const SampleOptions& options, SampleScratch<Real>& scratch);

}  // namespace dlogp
