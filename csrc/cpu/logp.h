// logp and delta_logp on the CPU: statistics of given logits, each read once, and their gradients.
//
// A row is cut into splits of fixed size whose states merge in their order, so that the result does not depend on how
// rows and splits are handed to threads. `Models` is 1, or 2 for a pair (the model, then its base). Acc is float or
// double.
#pragma once

#include "gradient.h"
#include "matrix.h"
#include "row_statistics.h"

namespace dlogp {

struct Logits {
  Matrix values;
  LogitTransform transform;
};

template <typename Acc, int Models>
void logp_forward(const Logits* logits, const KeptRows& kept, const StatsOutputs<Acc>& outputs);

// Writes the gradients of the rows that count where `outputs` has data.
template <typename Acc, int Models>
void logp_backward(const Logits* logits, const KeptRows& kept, const Upstream<Acc>& upstream, const Output* outputs);

}  // namespace dlogp
