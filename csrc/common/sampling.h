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

// As the schema and reference.sampling.CRITERIA name them.
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

// What a row's noise depends on besides the seed, and the block of four tokens that its vocabulary begins with.
struct RowNoise {
  uint32_t row_id = 0, step = 0, first_block = 0;

  // What is drawn for the row itself has the noise of token 0, whatever part of a vocabulary this is.
  DLOGP_HOST_DEVICE NoiseKey key(uint64_t seed, Stream stream) const {
    return {seed, row_id, step, stream, stream == Stream::kRandom ? 0 : first_block};
  }
};

// What tells the rows of a call apart: pointers may be null. Row n has the identity n without row_id; `steps` holds one
// step, or with steps_stride = 1 one a row, and counts instead of `step`. first_token is a multiple of 4.
struct RowIdentities {
  const int64_t *row_id = nullptr, *steps = nullptr;
  int64_t steps_stride = 0, step = 0, first_token = 0;

  DLOGP_HOST_DEVICE RowNoise of(int64_t row) const {
    return {uint32_t(row_id != nullptr ? row_id[row] : row),
            uint32_t(steps != nullptr ? steps[row * steps_stride] : step), uint32_t(first_token / 4)};
  }
};

// (1 + γ) z_R − γ z_B; −inf where z_R is, and `least`, the row's least finite z_B, stands in for z_B = −inf.
template <typename Acc>
DLOGP_HOST_DEVICE inline Acc extrapolated(Acc z, Acc base_z, Acc gamma, Acc least) {
  const Acc value = (1 + gamma) * z - gamma * (base_z == kMaskedLogit<Acc> ? least : base_z);
  return z == kMaskedLogit<Acc> ? kMaskedLogit<Acc> : value;
}

// Whether the draft is to be replaced. What is compared is rounded to Acc, as in the outputs.
template <typename Acc>
DLOGP_HOST_DEVICE inline bool is_selected(const SampleOptions& options, const PairState<Acc>& state, Acc delta_logp,
                                          const RowNoise& noise) {
  const Acc threshold = Acc(options.threshold);
  switch (options.criterion) {
    case Criterion::kDeltaLogp:
      return delta_logp < threshold;
    case Criterion::kKl:
      return Acc(state.kl()) > threshold;
    case Criterion::kReverseKl:
      return Acc(state.reverse_kl()) > threshold;
    case Criterion::kAvgKl:
      return Acc((state.kl() + state.reverse_kl()) / 2) > threshold;
    case Criterion::kEntropy:
      return Acc(state.base.entropy()) > threshold;
    case Criterion::kRlEntropy:
      return Acc(state.model.entropy()) > threshold;
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
