#include "policy_loss.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "vector_math.h"

namespace dlogp {
namespace {

template <typename Real>
DLOGP_INLINE void copy_counted_body(int64_t count, const Real* mask, const Real* from, Real* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = mask[i] != 0 ? from[i] : Real(0);
}

// `from` may be `to`.
DLOGP_CLONES void copy_counted(int64_t count, const float* mask, const float* from, float* to) {
  copy_counted_body(count, mask, from, to);
}
void copy_counted(int64_t count, const double* mask, const double* from, double* to) {
  copy_counted_body(count, mask, from, to);
}

DLOGP_CLONES bool any_counts(int64_t count, const uint8_t* mask) {
  uint8_t any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t i = 0; i < count; ++i) any |= mask[i];
  return any != 0;
}

template <typename Real>
DLOGP_INLINE void mask_body(int64_t count, const uint8_t* from, Real* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = Real(int32_t(from[i] != 0));
}

DLOGP_CLONES void mask_row(int64_t count, const uint8_t* from, float* to) { mask_body(count, from, to); }
void mask_row(int64_t count, const uint8_t* from, double* to) { mask_body(count, from, to); }

// Of a part, unless none of its tokens counts: then it returns false.
template <typename Real>
bool read_mask(const BoolMatrix& mask, const PolicySpan& part, Real* to) {
  const uint8_t* from = mask.data + part.sequence * mask.row_stride + part.begin * mask.column_stride;
  uint8_t copy[kPolicyTokens];
  const uint8_t* adjacent = from;
  if (mask.column_stride != 1) {
    for (int64_t i = 0; i < part.count; ++i) copy[i] = from[i * mask.column_stride];
    adjacent = copy;
  }
  if (!any_counts(part.count, adjacent)) return false;
  mask_row(part.count, adjacent, to);
  return true;
}

// The values of a part: in place where they can be read so, else in `copy`.
template <typename Real>
const Real* values_of(const Matrix& from, const PolicySpan& part, Real* copy) {
  const Real* in_place = row_in_place<Real>(from, part.sequence, part.begin);
  if (in_place != nullptr) return in_place;
  const bool one = from.column_stride == 0;
  read_row(from, part.sequence, part.begin, one ? 1 : part.count, copy);
  if (one) std::fill_n(copy, part.count, copy[0]);
  return copy;
}

// 0 where masked, whatever stands there.
template <typename Real>
bool read_tokens(const Matrix& from, const PolicySpan& part, const Real* mask, Real* to) {
  if (from.data == nullptr) return false;
  copy_counted(part.count, mask, values_of(from, part, to), to);
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

// Adds `value` where tokens count. A product with the mask would make 0 · ∞ of the others.
template <typename Real>
DLOGP_INLINE void add_counted_body(int64_t count, const Real* mask, Real value, Real* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] += mask[i] != 0 ? value : Real(0);
}

DLOGP_CLONES void add_counted(int64_t count, const float* mask, float value, float* to) {
  add_counted_body(count, mask, value, to);
}
void add_counted(int64_t count, const double* mask, double value, double* to) {
  add_counted_body(count, mask, value, to);
}

double inverse(double x) { return x > 0 ? 1 / x : 0; }

}  // namespace

PolicySpans policy_spans(int64_t sequences, int64_t columns, const int64_t* offsets) {
  PolicySpans result;
  for (int64_t b = 0; b < sequences; ++b) {
    result.first.push_back(int64_t(result.spans.size()));
    const int64_t begin = offsets == nullptr ? 0 : offsets[b], end = offsets == nullptr ? columns : offsets[b + 1];
    const int64_t most = std::max(kSpanTokens, round_up((end - begin) / kLongSpans, kPolicyTokens));
    for (int64_t t = begin; t < end; t += most)
      result.spans.push_back({b, t, std::min(most, end - t), offsets == nullptr ? b * columns + t : t});
  }
  result.first.push_back(int64_t(result.spans.size()));
  return result;
}

namespace {

// Calls use(part) for parts of at most kPolicyTokens, in order.
template <typename Use>
void for_parts(const PolicySpan& span, Use use) {
  for (int64_t i = 0; i < span.count; i += kPolicyTokens)
    use(PolicySpan{span.sequence, span.begin + i, std::min(kPolicyTokens, span.count - i), span.place + i});
}

template <typename Real>
DLOGP_INLINE void sum_body(int64_t count, const Real* mask, const Real* logp, const Real* old_logp,
                           PolicySequence& sequence) {
  Real tokens = 0;
  double sum = 0, log_ratio = 0;
#pragma omp simd reduction(+ : tokens, sum, log_ratio)
  for (int64_t i = 0; i < count; ++i) {
    const Real old = mask[i] != 0 ? old_logp[i] : Real(0), own = mask[i] != 0 ? logp[i] : Real(0);
    tokens += mask[i];
    sum += double(old);
    log_ratio += double(own - old);
  }
  sequence.count += int64_t(tokens);
  sequence.old_logp += sum;
  sequence.log_ratio += log_ratio;
}

DLOGP_CLONES void sum_tokens(int64_t count, const float* mask, const float* logp, const float* old_logp,
                             PolicySequence& sequence) {
  sum_body(count, mask, logp, old_logp, sequence);
}
void sum_tokens(int64_t count, const double* mask, const double* logp, const double* old_logp,
                PolicySequence& sequence) {
  sum_body(count, mask, logp, old_logp, sequence);
}

}  // namespace

template <typename Real>
void sum_span(const PolicyInputs& inputs, const PolicySpan& span, PolicySequence& sequence) {
  Real mask[kPolicyTokens], logp[kPolicyTokens], old_logp[kPolicyTokens];
  for_parts(span, [&](const PolicySpan& part) {
    if (!read_mask(inputs.mask, part, mask)) return;
    sum_tokens(part.count, mask, values_of(inputs.logp, part, logp), values_of(inputs.old_logp, part, old_logp),
               sequence);
  });
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
  if (options.importance != PolicyImportance::kToken) tokens.log_ratio = Real(sequence.mean_log_ratio());
  if (options.reweight == PolicyReweight::kPerplexity) std::fill_n(tokens.score, kPolicyTokens, Real(sequence.score));
  for_parts(span, [&](const PolicySpan& part) {
    if (!read_mask(inputs.mask, part, tokens.mask)) {
      if (coefficient != nullptr) std::fill_n(coefficient + part.place, part.count, Real(0));
      return;
    }
    read_tokens(inputs.logp, part, tokens.mask, tokens.logp);
    read_tokens(inputs.old_logp, part, tokens.mask, tokens.old_logp);
    read_tokens(inputs.advantage, part, tokens.mask, tokens.advantage);
    tokens.has_ref_logp = read_tokens(inputs.ref_logp, part, tokens.mask, tokens.ref_logp);
    tokens.has_entropy = read_tokens(inputs.entropy, part, tokens.mask, tokens.entropy);
    tokens.has_kl = read_tokens(inputs.kl, part, tokens.mask, tokens.kl);
    tokens.has_token_weight = read_tokens(inputs.token_weight, part, tokens.mask, tokens.token_weight);
    policy_tokens(options, part.count, tokens, sums);
    if (coefficient != nullptr) std::copy_n(tokens.coefficient, part.count, coefficient + part.place);
  });
}

template <typename Real>
void add_slope(const BoolMatrix& mask, const PolicySpan& span, double slope, Real* coefficient) {
  Real counted[kPolicyTokens];
  for_parts(span, [&](const PolicySpan& part) {
    if (read_mask(mask, part, counted)) add_counted(part.count, counted, Real(slope), coefficient + part.place);
  });
}

double policy_scale(const PolicyOptions& options, double count, double total, double instead, int64_t sequences,
                    int64_t max_length) {
  const double batch = instead < 0 ? double(sequences) : instead;
  switch (options.denominator) {
    case PolicyDenominator::kTokens:
      return inverse(instead < 0 ? total : instead);
    case PolicyDenominator::kSequences:
      return inverse(count * batch);
    case PolicyDenominator::kMaxLength:
      return inverse(batch * double(max_length));
  }
  return 0;
}

template <typename Real>
void scale_span(const PolicySpan& span, double factor, const Real* coefficient, Real* grad) {
  multiply_row(span.count, Real(factor), coefficient + span.place, grad + span.place);
}

template <typename Real>
void fill_span(const BoolMatrix& mask, const PolicySpan& span, double value, Real* grad) {
  Real counted[kPolicyTokens];
  for_parts(span, [&](const PolicySpan& part) {
    std::fill_n(grad + part.place, part.count, Real(0));
    if (read_mask(mask, part, counted)) add_counted(part.count, counted, Real(value), grad + part.place);
  });
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
