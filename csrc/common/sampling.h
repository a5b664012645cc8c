// Options of extrapolated_sample, its criteria and the extrapolation itself.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>
#include <utility>

#include "online_softmax.h"
#include "philox.h"

namespace dlogp {

enum class Criterion { kDeltaLogp, kKl, kReverseKl, kAvgKl, kEntropy, kRlEntropy, kRandom, kAll, kNone };

// As the schema and reference_sample.CRITERIA name them.
inline std::optional<Criterion> criterion_named(std::string_view name) {
  constexpr std::pair<std::string_view, Criterion> criteria[] = {
      {"delta_logp", Criterion::kDeltaLogp}, {"kl", Criterion::kKl},           {"reverse_kl", Criterion::kReverseKl},
      {"avg_kl", Criterion::kAvgKl},         {"entropy", Criterion::kEntropy}, {"rl_entropy", Criterion::kRlEntropy},
      {"random", Criterion::kRandom},        {"all", Criterion::kAll},         {"none", Criterion::kNone}};
  for (const auto& [known, criterion] : criteria)
    if (name == known) return criterion;
  return std::nullopt;
}

// Whether the sums over both models together (PairState::cross) are needed.
constexpr bool needs_divergence(Criterion criterion) {
  return criterion == Criterion::kKl || criterion == Criterion::kReverseKl || criterion == Criterion::kAvgKl;
}
// Whether Σ e^d alone is not enough.
constexpr bool needs_all_sums(Criterion criterion) {
  return needs_divergence(criterion) || criterion == Criterion::kEntropy || criterion == Criterion::kRlEntropy;
}

// Of logits / temperature, in this order; 0, 1 and 0 switch them off.
struct Filters {
  int64_t top_k = 0;
  double top_p = 1, min_p = 0;

  DLOGP_HOST_DEVICE bool limits_rank(int64_t vocabulary) const { return top_k > 0 && top_k < vocabulary; }
  DLOGP_HOST_DEVICE bool any(int64_t vocabulary) const { return limits_rank(vocabulary) || top_p < 1 || min_p > 0; }
  // Top-p alone needs the mass of all tokens.
  DLOGP_HOST_DEVICE bool needs_softmax(int64_t vocabulary) const { return top_p < 1 && !limits_rank(vocabulary); }
};

struct SampleOptions {
  double gamma = 0;
  Criterion criterion = Criterion::kAll;
  double threshold = 0;
  bool draft_from_base = true;
  double temperature = 1;
  Filters filters;
  uint64_t seed = 0;
};

// What a row's noise depends on besides the seed.
struct RowNoise {
  uint32_t row_id = 0, step = 0;

  DLOGP_HOST_DEVICE NoiseKey key(uint64_t seed, Stream stream) const { return {seed, row_id, step, stream}; }
};

// (1 + γ) z_R − γ z_B; −inf where z_R is, and `least`, the row's least finite z_B, stands in for z_B = −inf.
template <typename Real>
DLOGP_HOST_DEVICE inline Real extrapolated(Real z, Real base_z, Real gamma, Real least) {
  const Real impossible = -std::numeric_limits<Real>::infinity();
  const Real value = (1 + gamma) * z - gamma * (base_z == impossible ? least : base_z);
  return z == impossible ? impossible : value;
}

// Whether the draft is to be replaced. What is compared is rounded to Real, as in the outputs.
template <typename Real>
DLOGP_HOST_DEVICE inline bool is_selected(const SampleOptions& options, const PairState<Real>& state, Real delta_logp,
                                          const RowNoise& noise) {
  const Real threshold = Real(options.threshold);
  switch (options.criterion) {
    case Criterion::kDeltaLogp:
      return delta_logp < threshold;
    case Criterion::kKl:
      return Real(state.kl()) > threshold;
    case Criterion::kReverseKl:
      return Real(state.reverse_kl()) > threshold;
    case Criterion::kAvgKl:
      return Real((state.kl() + state.reverse_kl()) / 2) > threshold;
    case Criterion::kEntropy:
      return Real(state.base.entropy()) > threshold;
    case Criterion::kRlEntropy:
      return Real(state.model.entropy()) > threshold;
    case Criterion::kRandom:
      return uniform<double>(noise_bits(noise.key(options.seed, Stream::kRandom), 0)) < options.threshold;
    case Criterion::kAll:
      return true;
    case Criterion::kNone:
      break;
  }
  return false;
}

}  // namespace dlogp
