// Top-k, top-p and min-p without a sort. Each keeps the tokens from some logit on (equal logits fall together), so all
// that is needed is the least logit that is kept.
#pragma once

#include <limits>
#include <vector>

#include "../common/online_softmax.h"
#include "../common/sampling.h"
#include "scaled_logits.h"

namespace dlogp {

// Where nothing is cut off: every logit but −inf is kept.
template <typename Real>
constexpr Real kKeepAll = std::numeric_limits<Real>::lowest();

// The least logit / T that top-k, then top-p of what is left, then min-p keep. `softmax` is that of the same logits; it
// is looked at for top-p without top-k only. `scratch` is room for values.
template <typename Real>
Real least_kept(const ScaledLogits<Real>& logits, const BlockMaxima<Real>& maxima, const Filters& filters,
                const SoftmaxState<Real>& softmax, std::vector<Real>& scratch);

}  // namespace dlogp
