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
constexpr int64_t kSpanTokens = 8 * kTokensPerBlock;
constexpr int64_t kLongSpans = 4;

// Tokens [begin, begin + count) of a sequence; `place` is that of the first one in the outputs.
struct PolicySpan {
  int64_t sequence, begin, count, place;
};

struct PolicySpans {
  std::vector<PolicySpan> spans;
  std::vector<int64_t> first;  // of each sequence, and one past the last

  int64_t count() const { return int64_t(spans.size()); }
  int64_t sequences() const { return int64_t(first.size()) - 1; }
};

// Sequence b has columns [offsets[b], offsets[b + 1]), or [0, columns) where `offsets` is null.
PolicySpans policy_spans(int64_t sequences, int64_t columns, const int64_t* offsets);

// What the sums of token losses are divided by, in part: `instead` ≥ 0 is taken instead of the tokens that count or the
// number of sequences, whichever the loss divides by.
struct PolicyDivisor {
  double instead;
  int64_t max_length;
};

// Returns the loss and adds the tokens to `sums`. `group` (sequences,) is looked at to reweight by perplexity. Writes
// `scale` (sequences,), what the losses of a sequence are multiplied by, and unless it is null `grad_logp_unscaled`.
template <typename Acc>
double policy_forward(const PolicyOptions& options, const PolicyInputs& inputs, const PolicySpans& spans,
                      const int64_t* group, const PolicyDivisor& divisor, PolicySums& sums, Acc* grad_logp_unscaled,
                      Acc* scale);

// Gradients by token; null: not wanted.
template <typename Acc>
struct PolicyTokenGradients {
  Acc *logp, *entropy, *kl;
};

// Writes the gradients, `upstream` being that of the loss.
template <typename Acc>
void policy_backward(const PolicySpans& spans, const BoolMatrix& mask, const Acc* grad_logp_unscaled, const Acc* scale,
                     double upstream, double entropy_coef, double kl_beta, const PolicyTokenGradients<Acc>& gradients);

}  // namespace dlogp
