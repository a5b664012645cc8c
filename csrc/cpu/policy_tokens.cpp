#include "policy_tokens.h"

#include <algorithm>
#include <cmath>

#include "vector_math.h"

namespace dlogp {
namespace {

template <typename Real>
DLOGP_INLINE Real clamped(Real x) {
  const Real limit = Real(kLogRatioLimit);
  return x < -limit ? -limit : x > limit ? limit : x;  // keeps NaN
}

template <PolicyReweight kind, typename Real>
DLOGP_INLINE void weigh_as(const PolicyOptions& options, int64_t count, PolicyTokens<Real>& t) {
  const Real alpha = Real(options.alpha);
  const bool everywhere = options.reweight_sign == PolicySign::kBoth;
  const Real sign = options.reweight_sign == PolicySign::kNegative ? Real(-1) : Real(1);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    Real weight = 1;
    if constexpr (kind == PolicyReweight::kPerplexity) {
      weight = 1 - alpha * t.score[i];
    } else if constexpr (kind != PolicyReweight::kNone) {
      const Real p = exp_of(t.old_logp[i] > 0 ? Real(0) : t.old_logp[i]);
      weight = kind == PolicyReweight::kLowProb ? 1 + alpha * (1 - p) : alpha * p + (1 - alpha);
    }
    weight = everywhere || sign * t.advantage[i] > 0 ? weight : Real(1);
    t.weight[i] = weight;
    t.advantage[i] *= weight;
  }
}

template <typename Real>
DLOGP_INLINE void weigh(const PolicyOptions& options, int64_t count, PolicyTokens<Real>& t) {
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

template <typename Real>
DLOGP_INLINE void set_ratios(const PolicyOptions& options, int64_t count, PolicyTokens<Real>& t) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) t.log_ratio[i] = t.logp[i] - t.old_logp[i];
  const Real* raw = options.of_sequences ? t.raw_ratio : t.log_ratio;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) t.ratio[i] = exp_of(clamped(raw[i]));
}

template <typename Real>
DLOGP_INLINE void set_term(const PolicyTerm<Real>& term, int64_t i, PolicyTokens<Real>& t) {
  t.loss[i] = term.loss;
  t.slope[i] = term.slope;
  t.low[i] = term.low ? Real(1) : Real(0);
  t.high[i] = term.high ? Real(1) : Real(0);
  t.dual[i] = term.dual ? Real(1) : Real(0);
}

template <typename Real>
DLOGP_INLINE void set_terms(const PolicyOptions& options, int64_t count, PolicyTokens<Real>& t) {
  const Real high = Real(options.clip_high);
  if (options.surrogate == PolicySurrogate::kCispo) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) set_term(cispo_term(t.ratio[i], t.advantage[i], t.logp[i], high), i, t);
    return;
  }
  if (options.surrogate == PolicySurrogate::kSapo) {
    const Real positive = Real(options.sapo_temperature_pos), other = Real(options.sapo_temperature_neg);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Real temperature = t.advantage[i] > 0 ? positive : other;
      const Real x = -temperature * (t.ratio[i] - 1);
      set_term(sapo_term(t.ratio[i], t.advantage[i], temperature, exp_of(x > Real(80) ? Real(80) : x)), i, t);
    }
  } else {
    const Real lower = Real(1 - options.clip_low), upper = Real(1 + options.clip_high), dual = Real(options.dual_clip);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) set_term(clipped_term(t.ratio[i], t.advantage[i], lower, upper, dual), i, t);
  }
  if (options.of_sequences) return;
  const Real limit = Real(kLogRatioLimit);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) t.slope[i] = std::fabs(t.log_ratio[i]) > limit ? Real(0) : t.slope[i];
}

// Σ of values that count: four at a time, then in float64.
template <typename Real>
DLOGP_INLINE double masked_sum(int64_t count, const Real* values, const Real* mask) {
  const int64_t quarter = count / 4;
  const Real *v = values, *m = mask;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < quarter; ++i) {
    const int64_t j = i + quarter, k = j + quarter, l = k + quarter;
    sum += double((v[i] * m[i] + v[j] * m[j]) + (v[k] * m[k] + v[l] * m[l]));
  }
  for (int64_t i = 4 * quarter; i < count; ++i) sum += double(v[i] * m[i]);
  return sum;
}

// Of a sequence's ratio the slopes are summed up, and the coefficients get no part of them yet.
template <typename Real>
DLOGP_INLINE void finish_slopes(bool summed, int64_t count, PolicyTokens<Real>& t, PolicySums& sums) {
  if (t.has_token_weight) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      t.loss[i] *= t.token_weight[i];
      t.slope[i] *= t.token_weight[i];
    }
  }
  if (summed) {
    sums.slope += masked_sum(count, t.slope, t.mask);
    std::fill_n(t.coefficient, count, Real(0));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) t.coefficient[i] = t.slope[i] * t.mask[i];
}

// Values may be infinite where their factor is 0.
template <typename Real>
DLOGP_INLINE void add_to_loss(double factor, int64_t count, const Real* values, PolicyTokens<Real>& t) {
  if (factor == 0) return;
  const Real f = Real(factor);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) t.loss[i] += f * values[i];
}

template <typename Real>
DLOGP_INLINE void add_reference(const PolicyOptions& options, int64_t count, PolicyTokens<Real>& t, PolicySums& sums) {
  const Real limit = Real(kLogRatioLimit), beta = Real(options.kl_beta);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Real full = t.ref_logp[i] - t.logp[i];
    const Real x = full > limit ? limit : full;
    const Real exponential = exp_of(x);
    const Real divergence = k3_of(x, exponential);
    const Real slope = std::fabs(x) < Real(0.3) ? divergence + x : exponential - 1;  // eˣ − 1
    t.divergence[i] = divergence;
    t.coefficient[i] -= full > limit ? Real(0) : beta * slope * t.mask[i];
  }
  sums.ref_kl += masked_sum(count, t.divergence, t.mask);
  add_to_loss(options.kl_beta, count, t.divergence, t);
}

template <typename Real>
DLOGP_INLINE void add_entropy(const PolicyOptions& options, int64_t count, PolicyTokens<Real>& t, PolicySums& sums) {
  sums.entropy += masked_sum(count, t.entropy, t.mask);
  add_to_loss(-options.entropy_coef, count, t.entropy, t);
}

template <typename Real>
DLOGP_INLINE void add_kl(const PolicyOptions& options, int64_t count, PolicyTokens<Real>& t, PolicySums& sums) {
  sums.ref_kl += masked_sum(count, t.kl, t.mask);
  add_to_loss(options.kl_beta, count, t.kl, t);
}

template <typename Real>
DLOGP_INLINE void add_sums(bool of_sequences, int64_t count, PolicyTokens<Real>& t, PolicySums& sums) {
  Real tokens = 0, low = 0, high = 0, dual = 0, largest = 0;  // exact: they count up to kPolicyTokens
#pragma omp simd reduction(+ : tokens, low, high, dual) reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const Real ratio = t.ratio[i] * t.mask[i];
    tokens += t.mask[i];
    low += t.low[i] * t.mask[i];
    high += t.high[i] * t.mask[i];
    dual += t.dual[i] * t.mask[i];
    largest = ratio > largest ? ratio : largest;
  }
  if (of_sequences) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Real x = clamped(t.log_ratio[i]);
      t.divergence[i] = k3_of(x, exp_of(x));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) t.divergence[i] = k3_of(clamped(t.log_ratio[i]), t.ratio[i]);
  }
  sums.count += double(tokens);
  sums.clip_low += double(low);
  sums.clip_high += double(high);
  sums.clip_dual += double(dual);
  sums.max_ratio = std::max(sums.max_ratio, double(largest));
  sums.loss += masked_sum(count, t.loss, t.mask);
  sums.approx_kl += masked_sum(count, t.divergence, t.mask);
  sums.ratio += masked_sum(count, t.ratio, t.mask);
  sums.weight += masked_sum(count, t.weight, t.mask);
}

template <typename Real>
DLOGP_INLINE void policy_body(const PolicyOptions& options, int64_t count, PolicyTokens<Real>& t, PolicySums& sums) {
  weigh(options, count, t);
  set_ratios(options, count, t);
  set_terms(options, count, t);
  finish_slopes(options.of_sequences && options.surrogate != PolicySurrogate::kCispo, count, t, sums);
  if (t.has_ref_logp) add_reference(options, count, t, sums);
  if (t.has_kl) add_kl(options, count, t, sums);
  if (t.has_entropy) add_entropy(options, count, t, sums);
  add_sums(options.of_sequences, count, t, sums);
}

}  // namespace

void PolicySums::add(const PolicySums& other) {
  count += other.count;
  loss += other.loss;
  slope += other.slope;
  clip_low += other.clip_low;
  clip_high += other.clip_high;
  clip_dual += other.clip_dual;
  approx_kl += other.approx_kl;
  ratio += other.ratio;
  max_ratio = std::max(max_ratio, other.max_ratio);
  weight += other.weight;
  ref_kl += other.ref_kl;
  entropy += other.entropy;
}

double slope_of_sequence(const PolicyOptions& options, double raw_ratio, const PolicySums& sums) {
  if (!options.of_sequences || options.surrogate == PolicySurrogate::kCispo || sums.count == 0) return 0;
  return std::fabs(raw_ratio) > kLogRatioLimit ? 0 : sums.slope / sums.count;
}

DLOGP_CLONES void policy_tokens(const PolicyOptions& options, int64_t count, PolicyTokens<float>& tokens,
                                PolicySums& sums) {
  policy_body(options, count, tokens, sums);
}
void policy_tokens(const PolicyOptions& options, int64_t count, PolicyTokens<double>& tokens, PolicySums& sums) {
  policy_body(options, count, tokens, sums);
}

}  // namespace dlogp
