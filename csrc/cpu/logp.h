// logp and delta_logp on the CPU: statistics of given logits, each read once, and their gradients.
//
// A row is cut into parts of fixed size whose states merge in their order, so that the result does not depend on how
// rows and parts are handed to threads. `Models` is 1, or 2 for a pair (the model, then its base). Real is float or
// double.
#pragma once

#include <cstdint>

#include "gradient.h"
#include "linear_logp.h"

namespace dlogp {

struct Logits {
  Matrix values;
  LogitTransform transform;
};

constexpr int64_t kLogitsChunk = 1024;
constexpr int64_t kChunksPerPart = 16;

// How a row of logits is cut.
inline Tiling tile_logits_row(int64_t vocabulary) {
  const int64_t chunks = (vocabulary + kLogitsChunk - 1) / kLogitsChunk;
  return {vocabulary, kLogitsChunk, (chunks + kChunksPerPart - 1) / kChunksPerPart};
}

// Folds part `part` of row `row`, and notes the transformed logit of each of its targets that lies there.
template <typename Real, int Models>
State<Real, Models> logp_fwd(const Logits* logits, int64_t row, const Tiling& tiling, int64_t part,
                             const int64_t* target, int64_t candidates, Real* const* target_logits);

// Writes the gradients of part `part` of row `row` where `outputs` has data; both models' of a pair.
template <typename Real, int Models>
void logp_bwd(const Logits* logits, int64_t row, const Tiling& tiling, int64_t part, const int64_t* target,
              const Upstream<Real>& upstream, const Output* outputs);

}  // namespace dlogp
