#include "policy_loss.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "vector_math.h"

namespace dlogp {
namespace {

template <typename Real>
DLOGP_INLINE void clear_masked(int64_t count, const Real* mask, Real* values) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] = mask[i] != 0 ? values[i] : Real(0);
}

DLOGP_CLONES void clear(int64_t count, const float* mask, float* values) { clear_masked(count, mask, values); }
void clear(int64_t count, const double* mask, double* values) { clear_masked(count, mask, values); }

template <typename Real>
void read_mask(const BoolMatrix& mask, const PolicySpan& span, Real* to) {
  const bool* from = mask.data + span.sequence * mask.row_stride + span.begin * mask.column_stride;
  if (mask.column_stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < span.count; ++i) to[i] = from[i] ? Real(1) : Real(0);
  } else {
    for (int64_t i = 0; i < span.count; ++i) to[i] = from[i * mask.column_stride] ? Real(1) : Real(0);
  }
}

// 0 where masked, whatever stands there.
template <typename Real>
bool read_tokens(const Matrix& from, const PolicySpan& span, const Real* mask, Real* to) {
  if (from.data == nullptr) return false;
  read_row(from, span.sequence, span.begin, span.count, to);
  clear(span.count, mask, to);
  return true;
}

template <typename Real>
DLOGP_INLINE void multiply_body(int64_t count, Real factor, const Real* from, Real* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
}

DLOGP_CLONES void multiply_row(int64_t count, float factor, const float* from, float* to) {
  multiply_body(count, factor, from, to);
}
void multiply_row(int64_t count, double factor, const double* from, double* to) {
  multiply_body(count, factor, from, to);
}

double inverse(double x) { return x > 0 ? 1 / x : 0; }

}  // namespace

PolicySpans policy_spans(int64_t sequences, int64_t columns, const int64_t* offsets) {
  PolicySpans result;
  for (int64_t b = 0; b < sequences; ++b) {
    result.first.push_back(int64_t(result.spans.size()));
    const int64_t begin = offsets == nullptr ? 0 : offsets[b], end = offsets == nullptr ? columns : offsets[b + 1];
    for (int64_t t = begin; t < end; t += kPolicyTokens)
      result.spans.push_back({b, t, std::min(kPolicyTokens, end - t), offsets == nullptr ? b * columns + t : t});
  }
  result.first.push_back(int64_t(result.spans.size()));
  return result;
}

template <typename Real>
void sum_span(const PolicyInputs& inputs, const PolicySpan& span, PolicySequence& sequence) {
  Real mask[kPolicyTokens], logp[kPolicyTokens], old_logp[kPolicyTokens];
  read_mask(inputs.mask, span, mask);
  read_tokens(inputs.logp, span, mask, logp);
  read_tokens(inputs.old_logp, span, mask, old_logp);
  for (int64_t i = 0; i < span.count; ++i) {
    sequence.count += mask[i] != 0;
    sequence.old_logp += double(old_logp[i]);
    sequence.log_ratio += double(logp[i] - old_logp[i]);
  }
}

void normalize_in_groups(const int64_t* group, std::vector<PolicySequence>& sequences) {
  struct Statistics {
    double count = 0, mean = 0, square = 0;
  };
  std::unordered_map<int64_t, Statistics> groups;
  const auto perplexity = [](const PolicySequence& x) { return -x.old_logp / double(x.count); };
  for (size_t b = 0; b < sequences.size(); ++b) {
    if (sequences[b].count == 0) continue;
    Statistics& own = groups[group[b]];
    own.count += 1;
    own.mean += perplexity(sequences[b]);
  }
  for (auto& [id, own] : groups) own.mean /= own.count;
  for (size_t b = 0; b < sequences.size(); ++b) {
    if (sequences[b].count == 0) continue;
    Statistics& own = groups[group[b]];
    const double distance = perplexity(sequences[b]) - own.mean;
    own.square += distance * distance;
  }
  for (size_t b = 0; b < sequences.size(); ++b) {
    if (sequences[b].count == 0) continue;
    const Statistics& own = groups[group[b]];
    sequences[b].score = (perplexity(sequences[b]) - own.mean) / (std::sqrt(own.square / own.count) + kGroupEpsilon);
  }
}

template <typename Real>
void policy_span(const PolicyOptions& options, const PolicyInputs& inputs, const PolicySpan& span,
                 const PolicySequence& sequence, PolicySums& sums, Real* coefficient) {
  PolicyTokens<Real> tokens;
  read_mask(inputs.mask, span, tokens.mask);
  read_tokens(inputs.logp, span, tokens.mask, tokens.logp);
  read_tokens(inputs.old_logp, span, tokens.mask, tokens.old_logp);
  read_tokens(inputs.advantage, span, tokens.mask, tokens.advantage);
  tokens.has_ref_logp = read_tokens(inputs.ref_logp, span, tokens.mask, tokens.ref_logp);
  tokens.has_entropy = read_tokens(inputs.entropy, span, tokens.mask, tokens.entropy);
  tokens.has_kl = read_tokens(inputs.kl, span, tokens.mask, tokens.kl);
  tokens.has_token_weight = read_tokens(inputs.token_weight, span, tokens.mask, tokens.token_weight);
  if (options.of_sequences) std::fill_n(tokens.raw_ratio, span.count, Real(sequence.mean_log_ratio()));
  if (options.reweight == PolicyReweight::kPerplexity) std::fill_n(tokens.score, span.count, Real(sequence.score));
  policy_tokens(options, span.count, tokens, sums);
  if (coefficient != nullptr) std::copy_n(tokens.coefficient, span.count, coefficient + span.place);
}

template <typename Real>
void add_slope(const BoolMatrix& mask, const PolicySpan& span, double slope, Real* coefficient) {
  for (int64_t i = 0; i < span.count; ++i)
    if (mask.at(span.sequence, span.begin + i)) coefficient[span.place + i] += Real(slope);
}

double policy_scale(const PolicyOptions& options, double count, double total, double num_tokens, int64_t sequences,
                    int64_t max_length) {
  switch (options.denominator) {
    case PolicyDenominator::kTokens:
      return inverse(num_tokens < 0 ? total : num_tokens);
    case PolicyDenominator::kSequences:
      return inverse(count * double(sequences));
    case PolicyDenominator::kMaxLength:
      return inverse(double(sequences) * double(max_length));
  }
  return 0;
}

template <typename Real>
void scale_span(const PolicySpan& span, double factor, const Real* coefficient, Real* grad) {
  multiply_row(span.count, Real(factor), coefficient + span.place, grad + span.place);
}

template <typename Real>
void fill_span(const BoolMatrix& mask, const PolicySpan& span, double value, Real* grad) {
  for (int64_t i = 0; i < span.count; ++i)
    grad[span.place + i] = mask.at(span.sequence, span.begin + i) ? Real(value) : Real(0);
}

#define DLOGP_INSTANTIATE(Real)                                                                                        \
  template void sum_span<Real>(const PolicyInputs&, const PolicySpan&, PolicySequence&);                               \
  template void policy_span<Real>(const PolicyOptions&, const PolicyInputs&, const PolicySpan&, const PolicySequence&, \
                                  PolicySums&, Real*);                                                                 \
  template void add_slope<Real>(const BoolMatrix&, const PolicySpan&, double, Real*);                                  \
  template void scale_span<Real>(const PolicySpan&, double, const Real*, Real*);                                       \
  template void fill_span<Real>(const BoolMatrix&, const PolicySpan&, double, Real*);
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
