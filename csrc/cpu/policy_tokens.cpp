#include "policy_tokens.h"

#include <algorithm>
#include <cmath>

#include "vector_math.h"

namespace dlogp {
namespace {

template <typename Acc>
DLOGP_INLINE Acc clamped(Acc x) {
  const Acc limit = Acc(kLogRatioLimit);
  return x < -limit ? -limit : x > limit ? limit : x;  // keeps NaN
}

template <PolicyReweight kind, typename Acc>
DLOGP_INLINE void weigh_as(const PolicyOptions& options, int64_t count, PolicyTokens<Acc>& t) {
  const Acc alpha = Acc(options.alpha);
  const bool everywhere = options.reweight_sign == PolicySign::kBoth;
  const Acc sign = options.reweight_sign == PolicySign::kNegative ? Acc(-1) : Acc(1);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    Acc weight = 1;
    if constexpr (kind == PolicyReweight::kPerplexity) {
      weight = 1 - alpha * t.score[i];
    } else if constexpr (kind != PolicyReweight::kNone) {
      const Acc p = exp_of(t.old_logp[i] > 0 ? Acc(0) : t.old_logp[i]);
      weight = kind == PolicyReweight::kLowProb ? 1 + alpha * (1 - p) : alpha * p + (1 - alpha);
    }
    weight = everywhere || sign * t.advantage[i] > 0 ? weight : Acc(1);
    t.weight[i] = weight;
    t.advantage[i] *= weight;
  }
}

template <typename Acc>
DLOGP_INLINE void weigh(const PolicyOptions& options, int64_t count, PolicyTokens<Acc>& t) {
  switch (options.reweight) {
    case PolicyReweight::kNone:
      return weigh_as<PolicyReweight::kNone>(options, count, t);
    case PolicyReweight::kLowProb:
      return weigh_as<PolicyReweight::kLowProb>(options, count, t);
    case PolicyReweight::kDominate:
      return weigh_as<PolicyReweight::kDominate>(options, count, t);
    case PolicyReweight::kPerplexity:
      return weigh_as<PolicyReweight::kPerplexity>(options, count, t);
  }
}

// The numbers of PolicyOptions that a token's term needs.
template <typename Acc>
struct TermOptions {
  Acc lower, upper, dual, high;
  Acc temperature_pos, temperature_neg;
};

template <typename Acc>
TermOptions<Acc> term_options(const PolicyOptions& options) {
  return {Acc(1 - options.clip_low), Acc(1 + options.clip_high),        Acc(options.dual_clip),
          Acc(options.clip_high),    Acc(options.sapo_temperature_pos), Acc(options.sapo_temperature_neg)};
}

template <PolicySurrogate surrogate, typename Acc>
DLOGP_INLINE PolicyTerm<Acc> term_of(const TermOptions<Acc>& options, Acc ratio, Acc advantage, Acc logp) {
  if constexpr (surrogate == PolicySurrogate::kClipped) {
    return clipped_term(ratio, advantage, options.lower, options.upper, options.dual);
  } else if constexpr (surrogate == PolicySurrogate::kCispo) {
    return cispo_term(ratio, advantage, logp, options.high);
  } else {
    const Acc temperature = advantage > 0 ? options.temperature_pos : options.temperature_neg;
    const Acc x = -temperature * (ratio - 1);
    return sapo_term(ratio, advantage, temperature, exp_of(x > Acc(80) ? Acc(80) : x));
  }
}

// Whether the ratio of a sequence has no gradient, because its logarithm is that far.
bool is_clamped(const PolicyOptions& options, double log_ratio) {
  return options.surrogate != PolicySurrogate::kCispo && std::fabs(log_ratio) > kLogRatioLimit;
}

// The terms of the ratio and all sums but those of entropy and divergence, in one loop. Where the slopes of a
// sequence are summed up, the gradients get no part of them yet.
template <PolicySurrogate surrogate, PolicyImportance importance, bool weighted, typename Acc>
DLOGP_INLINE void set_terms(const PolicyOptions& options, int64_t count, PolicyTokens<Acc>& t, PolicySums& sums) {
  constexpr bool by_logp = surrogate == PolicySurrogate::kCispo,
                 sequence_level = importance != PolicyImportance::kToken;
  constexpr bool summed = importance == PolicyImportance::kSequence && !by_logp;
  const TermOptions<Acc> numbers = term_options<Acc>(options);
  const Acc limit = Acc(kLogRatioLimit);
  const Acc common_ratio = sequence_level ? exp_of(clamped(t.log_ratio)) : Acc(0);
  Acc tokens = 0, low = 0, high = 0, dual = 0;  // exact: they count up to kTokensPerBlock
  Acc loss = 0, slopes = 0, approx_kl = 0, ratios = 0, largest = 0, weights = 0;
#pragma omp simd reduction(+ : tokens, low, high, dual, loss, slopes, approx_kl, ratios, weights) \
    reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const Acc mask = t.mask[i], full = t.logp[i] - t.old_logp[i], log_ratio = clamped(full);
    const Acc own_ratio = exp_of(log_ratio), ratio = sequence_level ? common_ratio : own_ratio;
    const PolicyTerm<Acc> term = term_of<surrogate>(numbers, ratio, t.advantage[i], t.logp[i]);
    const Acc share = weighted ? mask * t.token_weight[i] : mask;
    const bool without = weighted && share == 0;  // a part; then it may be anything
    const Acc own_loss = without ? Acc(0) : term.loss * share;
    const bool limited = !sequence_level && !by_logp && std::fabs(full) > limit;
    const Acc slope = without || limited ? Acc(0) : term.slope * share;
    t.loss[i] = own_loss;
    t.grad_logp_unscaled[i] = summed ? Acc(0) : slope;
    tokens += mask;
    low += term.low ? mask : Acc(0);
    high += term.high ? mask : Acc(0);
    dual += term.dual ? mask : Acc(0);
    loss += own_loss;
    slopes += slope;
    approx_kl += k3_of(log_ratio, own_ratio) * mask;
    ratios += ratio * mask;
    weights += t.weight[i] * mask;
    largest = ratio * mask > largest ? ratio * mask : largest;
  }
  sums.count += double(tokens);
  sums.clip_low += double(low);
  sums.clip_high += double(high);
  sums.clip_dual += double(dual);
  sums.loss += double(loss);
  if (summed) sums.slope += double(slopes);
  sums.approx_kl += double(approx_kl);
  sums.mean_ratio += double(ratios);
  sums.max_ratio = std::max(sums.max_ratio, double(largest));
  sums.mean_weight += double(weights);
}

template <PolicySurrogate surrogate, PolicyImportance importance, typename Acc>
DLOGP_INLINE void set_terms(const PolicyOptions& options, int64_t count, PolicyTokens<Acc>& t, PolicySums& sums) {
  t.has_token_weight ? set_terms<surrogate, importance, true>(options, count, t, sums)
                     : set_terms<surrogate, importance, false>(options, count, t, sums);
  if (importance == PolicyImportance::kSequenceToken && is_clamped(options, double(t.log_ratio)))
    std::fill_n(t.grad_logp_unscaled, count, Acc(0));
}

template <PolicySurrogate surrogate, typename Acc>
DLOGP_INLINE void set_terms(const PolicyOptions& options, int64_t count, PolicyTokens<Acc>& t, PolicySums& sums) {
  switch (options.importance) {
    case PolicyImportance::kToken:
      return set_terms<surrogate, PolicyImportance::kToken>(options, count, t, sums);
    case PolicyImportance::kSequence:
      return set_terms<surrogate, PolicyImportance::kSequence>(options, count, t, sums);
    case PolicyImportance::kSequenceToken:
      return set_terms<surrogate, PolicyImportance::kSequenceToken>(options, count, t, sums);
  }
}

template <typename Acc>
DLOGP_INLINE void set_terms(const PolicyOptions& options, int64_t count, PolicyTokens<Acc>& t, PolicySums& sums) {
  switch (options.surrogate) {
    case PolicySurrogate::kClipped:
      return set_terms<PolicySurrogate::kClipped>(options, count, t, sums);
    case PolicySurrogate::kCispo:
      return set_terms<PolicySurrogate::kCispo>(options, count, t, sums);
    case PolicySurrogate::kSapo:
      return set_terms<PolicySurrogate::kSapo>(options, count, t, sums);
  }
}

// Adds factor · values to the losses; returns Σ values of the tokens that count, the same bits whatever the factor.
// Values may be infinite where their factor is 0.
template <typename Acc>
DLOGP_INLINE double add_to_loss(double factor, int64_t count, const Acc* values, PolicyTokens<Acc>& t,
                                PolicySums& sums) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += values[i] * t.mask[i];
  if (factor == 0) return double(sum);
  const Acc f = Acc(factor);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) t.loss[i] += f * (values[i] * t.mask[i]);
  sums.loss += factor * double(sum);
  return double(sum);
}

template <typename Acc>
DLOGP_INLINE void add_reference(const PolicyOptions& options, int64_t count, PolicyTokens<Acc>& t, PolicySums& sums) {
  const Acc limit = Acc(kLogRatioLimit), beta = Acc(options.kl_beta);
  Acc divergence[kTokensPerBlock];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Acc full = t.ref_logp[i] - t.logp[i];
    const Acc x = full > limit ? limit : full;
    const Acc exponential = exp_of(x);
    const Acc k3 = k3_of(x, exponential);
    const Acc slope = std::fabs(x) < Acc(0.3) ? k3 + x : exponential - 1;  // eˣ − 1
    divergence[i] = k3;
    // Without a part in the loss a divergence may be anything.
    t.grad_logp_unscaled[i] -= full > limit || beta == 0 ? Acc(0) : beta * slope * t.mask[i];
  }
  sums.ref_kl += add_to_loss(options.kl_beta, count, divergence, t, sums);
}

template <typename Acc>
DLOGP_INLINE void policy_body(const PolicyOptions& options, int64_t count, PolicyTokens<Acc>& t, PolicySums& sums) {
  weigh(options, count, t);
  set_terms(options, count, t, sums);
  if (t.has_ref_logp) add_reference(options, count, t, sums);
  if (t.has_kl) sums.ref_kl += add_to_loss(options.kl_beta, count, t.kl, t, sums);
  if (t.has_entropy) sums.entropy += add_to_loss(-options.entropy_coef, count, t.entropy, t, sums);
}

}  // namespace

void PolicySums::add(const PolicySums& other) {
  count += other.count;
  loss += other.loss;
  slope += other.slope;
#define DLOGP_ADD(name) name += other.name;
#define DLOGP_LARGER(name) name = std::max(name, other.name);
  DLOGP_POLICY_METRICS(DLOGP_ADD, DLOGP_LARGER)
#undef DLOGP_ADD
#undef DLOGP_LARGER
}

double slope_of_sequence(const PolicyOptions& options, double log_ratio, const PolicySums& sums) {
  if (options.importance != PolicyImportance::kSequence || options.surrogate == PolicySurrogate::kCispo) return 0;
  if (sums.count == 0) return 0;
  return is_clamped(options, log_ratio) ? 0 : sums.slope / sums.count;
}

#define DLOGP_DEFINE(attribute, Acc)                                                                   \
  template <>                                                                                          \
  attribute void policy_tokens(const PolicyOptions& options, int64_t count, PolicyTokens<Acc>& tokens, \
                               PolicySums& sums) {                                                     \
    policy_body(options, count, tokens, sums);                                                         \
  }
DLOGP_DEFINE(DLOGP_CLONES, float)
DLOGP_DEFINE(, double)
#undef DLOGP_DEFINE

}  // namespace dlogp
