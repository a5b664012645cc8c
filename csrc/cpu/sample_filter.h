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
template <typename Acc>
constexpr Acc kKeepAll = std::numeric_limits<Acc>::lowest();

// The least logit / T that top-k, then top-p of what is left, then min-p keep. `softmax` is that of the same logits; it
// is looked at for top-p without top-k only. `scratch` is room for values.
template <typename Acc>
Acc least_kept(const ScaledLogits<Acc>& logits, const BlockMaxima<Acc>& maxima, const Filters& filters,
               const SoftmaxState<Acc>& softmax, std::vector<Acc>& scratch);

}  // namespace dlogp
