// policy_loss on the CPU. Sequences are cut into spans, whose sums are merged in their order, so the result is the same
// for any threads.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"
#include "policy_tokens.h"

namespace dlogp {

// Of bytes: one that another type wrote may be neither 0 nor 1.
struct BoolMatrix {
  const uint8_t* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
};

// What is known of each token; a row is a sequence. Packed tokens have a row stride of 0, and columns count through all
// sequences; advantages of sequences have a column stride of 0. An optional matrix has no data.
struct PolicyInputs {
  Matrix logp, old_logp, advantage, ref_logp, entropy, kl, token_weight;
  BoolMatrix mask;
};

// A sequence is cut into spans of so many tokens, a long one into so many spans: what is kept of each is then nothing
// beside its tokens. That depends on the sequence alone, as do its sums.
constexpr int64_t kSpanTokens = 8 * kPolicyTokens;
constexpr int64_t kLongSpans = 4;

// Tokens [begin, begin + count) of a sequence; `place` is that of the first one in the outputs.
struct PolicySpan {
  int64_t sequence, begin, count, place;
};

struct PolicySpans {
  std::vector<PolicySpan> spans;
  std::vector<int64_t> first;  // of each sequence, and one past the last
};

// Sequence b has columns [begin[b], begin[b + 1]) where `packed`, else [0, columns).
PolicySpans policy_spans(int64_t sequences, int64_t columns, const int64_t* offsets);

// What a sequence's tokens have in common, out of a first pass: the sums of its old log-probabilities and log-ratios.
struct PolicySequence {
  int64_t count = 0;
  double old_logp = 0, log_ratio = 0;
  double score = 0;  // normalised log-perplexity

  double mean_log_ratio() const { return count == 0 ? 0 : log_ratio / double(count); }
};

// Adds a span's tokens to its sequence.
template <typename Real>
void sum_span(const PolicyInputs& inputs, const PolicySpan& span, PolicySequence& sequence);

// score = (ℓ − mean of the group) / (its standard deviation + 1e-6), ℓ = −mean old log-probability; 0 without tokens.
void normalize_in_groups(const int64_t* group, std::vector<PolicySequence>& sequences);

// One span: its sums, and its part of `coefficient` unless that is null.
template <typename Real>
void policy_span(const PolicyOptions& options, const PolicyInputs& inputs, const PolicySpan& span,
                 const PolicySequence& sequence, PolicySums& sums, Real* coefficient);

// Adds `slope` to a span's coefficients where tokens count.
template <typename Real>
void add_slope(const BoolMatrix& mask, const PolicySpan& span, double slope, Real* coefficient);

// 1 / the denominator of each sequence, 0 where there is nothing to divide by. `instead` ≥ 0 is taken instead of
// `total` or of `sequences`, whichever the loss divides by.
double policy_scale(const PolicyOptions& options, double count, double total, double instead, int64_t sequences,
                    int64_t max_length);

// grad[i] = coefficient[i] · factor.
template <typename Real>
void scale_span(const PolicySpan& span, double factor, const Real* coefficient, Real* grad);

// grad[i] = value where tokens count, else 0.
template <typename Real>
void fill_span(const BoolMatrix& mask, const PolicySpan& span, double value, Real* grad);

}  // namespace dlogp
