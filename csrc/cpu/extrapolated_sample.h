// extrapolated_sample on the CPU, one row at a time: the draft, the criterion, the replacement.
//
// A row is read once for its maxima and softmax statistics, and in parts again by a filter and by a draw, which skip
// blocks of tokens that are cut off or can not win. Real is float or double; sums are in double; a row's result depends
// on nothing but its logits, its row_id and step, and the options.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/sampling.h"
#include "scaled_logits.h"

namespace dlogp {

template <typename Real>
struct SampledRow {
  int64_t token = -1, draft_token = -1;
  bool selected = false;
  Real delta_logp = NAN, logp = NAN, base_logp = NAN;
};

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
