#include "logp.h"

#include <algorithm>

#include "fold.h"

namespace dlogp {
namespace {

// Transformed logits [begin, begin + count) of a row: in place where they need no change, else in `buffer`.
template <typename Real>
const Real* transformed(const Logits& logits, int64_t row, int64_t begin, int64_t count, Real* buffer) {
  if (logits.transform.is_identity()) {
    const Real* in_place = row_in_place<Real>(logits.values, row, begin);
    if (in_place != nullptr) return in_place;
  }
  read_row(logits.values, row, begin, count, buffer);
  transform_row(logits.transform, count, static_cast<const Real*>(nullptr), buffer);
  return buffer;
}

}  // namespace

template <typename Real, int Models>
State<Real, Models> logp_fwd(const Logits* logits, int64_t row, const Tiling& tiling, int64_t part,
                             const int64_t* target, int64_t candidates, Real* const* target_logits) {
  State<Real, Models> state;
  Real buffers[Models][kLogitsChunk];
  for (int64_t begin = tiling.part_begin(part); begin < tiling.part_end(part); begin += tiling.columns) {
    const int64_t count = std::min(tiling.columns, tiling.vocabulary - begin);
    const Real* z[Models];
    for (int model = 0; model < Models; ++model)
      z[model] = transformed(logits[model], row, begin, count, buffers[model]);
    if constexpr (Models == 1)
      fold_row(count, z[0], state);
    else
      fold_row(count, z[0], z[1], state);
    for (int64_t k = 0; k < candidates; ++k) {
      const int64_t column = target[k] - begin;
      if (column < 0 || column >= count) continue;
      for (int model = 0; model < Models; ++model) target_logits[model][k] = z[model][column];
    }
  }
  return state;
}

template <typename Real, int Models>
void logp_bwd(const Logits* logits, int64_t row, const Tiling& tiling, int64_t part, const int64_t* target,
              const Upstream<Real>& upstream, const Output* outputs) {
  Real buffers[Models][kLogitsChunk], grad[kLogitsChunk];
  GradientTerms<Real> terms[Models];
  for (int model = 0; model < Models; ++model)
    terms[model] = upstream.terms(model, row, target, logits[model].transform);
  for (int64_t begin = tiling.part_begin(part); begin < tiling.part_end(part); begin += tiling.columns) {
    const int64_t count = std::min(tiling.columns, tiling.vocabulary - begin);
    const Real* z[Models];
    for (int model = 0; model < Models; ++model)
      z[model] = transformed(logits[model], row, begin, count, buffers[model]);
    for (int model = 0; model < Models; ++model) {
      if (!outputs[model]) continue;
      const Real* other_z = Models == 1 ? nullptr : z[Models - 1 - model];
      logits_gradient(upstream, model, row, target, logits[model].transform, terms[model], begin, count, z[model],
                      other_z, grad);
      write_row(outputs[model], row, begin, count, grad);
    }
  }
}

#define DLOGP_INSTANTIATE(Real, Models)                                                                               \
  template State<Real, Models> logp_fwd<Real, Models>(const Logits*, int64_t, const Tiling&, int64_t, const int64_t*, \
                                                      int64_t, Real* const*);                                         \
  template void logp_bwd<Real, Models>(const Logits*, int64_t, const Tiling&, int64_t, const int64_t*,                \
                                       const Upstream<Real>&, const Output*);
DLOGP_INSTANTIATE(float, 1)
DLOGP_INSTANTIATE(float, 2)
DLOGP_INSTANTIATE(double, 1)
DLOGP_INSTANTIATE(double, 2)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
