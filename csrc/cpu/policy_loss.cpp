#include "policy_loss.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "threads.h"
#include "vector_math.h"

namespace dlogp {
namespace {

// What a sequence's tokens have in common, out of a first pass: the sums of its old log-probabilities and log-ratios.
struct PolicySequence {
  int64_t count = 0;
  double old_logp = 0, log_ratio = 0;
  double score = 0;  // normalised log-perplexity

  double mean_log_ratio() const { return count == 0 ? 0 : log_ratio / double(count); }
};

#define DLOGP_LOOPS "policy_loops.h"
#include "for_each_accumulator.h"

DLOGP_CLONES bool any_counts(int64_t count, const uint8_t* mask) {
  uint8_t any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t i = 0; i < count; ++i) any |= mask[i];
  return any != 0;
}

// That of a block, unless none of its tokens counts: then it returns false.
template <typename Acc>
bool read_mask(const BoolMatrix& mask, const PolicySpan& block, Acc* to) {
  const uint8_t* from = mask.data + block.sequence * mask.row_stride + block.begin * mask.column_stride;
  uint8_t copy[kTokensPerBlock];
  const uint8_t* adjacent = from;
  if (mask.column_stride != 1) {
    for (int64_t i = 0; i < block.count; ++i) copy[i] = from[i * mask.column_stride];
    adjacent = copy;
  }
  if (!any_counts(block.count, adjacent)) return false;
  mask_row(block.count, adjacent, to);
  return true;
}

// The values of a block: in place where they can be read so, else in `copy`.
template <typename Acc>
const Acc* values_of(const Matrix& from, const PolicySpan& block, Acc* copy) {
  const Acc* in_place = row_in_place<Acc>(from, block.sequence, block.begin);
  if (in_place != nullptr) return in_place;
  const bool one = from.column_stride == 0;
  read_row(from, block.sequence, block.begin, one ? 1 : block.count, copy);
  if (one) std::fill_n(copy, block.count, copy[0]);
  return copy;
}

// 0 where masked, whatever stands there.
template <typename Acc>
bool read_tokens(const Matrix& from, const PolicySpan& block, const Acc* mask, Acc* to) {
  if (from.data == nullptr) return false;
  copy_counted(block.count, mask, values_of(from, block, to), to);
  return true;
}

double inverse(double x) { return x > 0 ? 1 / x : 0; }

// Calls use(block) for blocks of at most kTokensPerBlock, in order.
template <typename Use>
void for_blocks(const PolicySpan& span, Use use) {
  for (int64_t i = 0; i < span.count; i += kTokensPerBlock)
    use(PolicySpan{span.sequence, span.begin + i, std::min(kTokensPerBlock, span.count - i), span.place + i});
}

// Adds a span's tokens to its sequence.
template <typename Acc>
void sum_span(const PolicyInputs& inputs, const PolicySpan& span, PolicySequence& sequence) {
  Acc mask[kTokensPerBlock], logp[kTokensPerBlock], old_logp[kTokensPerBlock];
  for_blocks(span, [&](const PolicySpan& block) {
    if (!read_mask(inputs.mask, block, mask)) return;
    sum_tokens(block.count, mask, values_of(inputs.logp, block, logp), values_of(inputs.old_logp, block, old_logp),
               sequence);
  });
}

// score = (ℓ − mean of the group) / (its standard deviation + 1e-6), ℓ = −mean old log-probability; 0 without tokens.
void normalize_in_groups(const int64_t* group, std::vector<PolicySequence>& sequences) {
  struct Statistics {
    double count = 0, mean = 0, square = 0;
  };
  std::unordered_map<int64_t, Statistics> groups;
  const auto for_sequences = [&](auto use) {
    for (size_t b = 0; b < sequences.size(); ++b) {
      PolicySequence& sequence = sequences[b];
      if (sequence.count > 0) use(groups[group[b]], sequence, -sequence.old_logp / double(sequence.count));
    }
  };
  for_sequences([](Statistics& own, PolicySequence&, double perplexity) {
    own.count += 1;
    own.mean += perplexity;
  });
  for (auto& [id, own] : groups) own.mean /= own.count;
  for_sequences([](Statistics& own, PolicySequence&, double perplexity) {
    const double distance = perplexity - own.mean;
    own.square += distance * distance;
  });
  for_sequences([](const Statistics& own, PolicySequence& sequence, double perplexity) {
    sequence.score = (perplexity - own.mean) / (std::sqrt(own.square / own.count) + kGroupEpsilon);
  });
}

// One span: its sums, and its tokens of `grad_logp_unscaled` unless that is null.
template <typename Acc>
void policy_span(const PolicyOptions& options, const PolicyInputs& inputs, const PolicySpan& span,
                 const PolicySequence& sequence, PolicySums& sums, Acc* grad_logp_unscaled) {
  PolicyTokens<Acc> tokens;
  if (options.importance != PolicyImportance::kToken) tokens.log_ratio = Acc(sequence.mean_log_ratio());
  if (options.reweight == PolicyReweight::kPerplexity) std::fill_n(tokens.score, kTokensPerBlock, Acc(sequence.score));
  for_blocks(span, [&](const PolicySpan& block) {
    if (!read_mask(inputs.mask, block, tokens.mask)) {
      if (grad_logp_unscaled != nullptr) std::fill_n(grad_logp_unscaled + block.place, block.count, Acc(0));
      return;
    }
    read_tokens(inputs.logp, block, tokens.mask, tokens.logp);
    read_tokens(inputs.old_logp, block, tokens.mask, tokens.old_logp);
    read_tokens(inputs.advantage, block, tokens.mask, tokens.advantage);
    tokens.has_ref_logp = read_tokens(inputs.ref_logp, block, tokens.mask, tokens.ref_logp);
    tokens.has_entropy = read_tokens(inputs.entropy, block, tokens.mask, tokens.entropy);
    tokens.has_kl = read_tokens(inputs.kl, block, tokens.mask, tokens.kl);
    tokens.has_token_weight = read_tokens(inputs.token_weight, block, tokens.mask, tokens.token_weight);
    policy_tokens(options, block.count, tokens, sums);
    if (grad_logp_unscaled != nullptr)
      std::copy_n(tokens.grad_logp_unscaled, block.count, grad_logp_unscaled + block.place);
  });
}

// Adds `value` to a span's gradients where tokens count; with `anew` the others are 0.
template <typename Acc>
void add_where_counted(const BoolMatrix& mask, const PolicySpan& span, double value, bool anew, Acc* grad) {
  Acc counted[kTokensPerBlock];
  for_blocks(span, [&](const PolicySpan& block) {
    if (anew) std::fill_n(grad + block.place, block.count, Acc(0));
    if (read_mask(mask, block, counted)) add_counted(block.count, counted, Acc(value), grad + block.place);
  });
}

// 1 / the denominator of a sequence of `count` tokens out of `total`, 0 where there is nothing to divide by.
double policy_scale(const PolicyOptions& options, double count, double total, int64_t sequences,
                    const PolicyDivisor& divisor) {
  const double instead = divisor.instead, batch = instead < 0 ? double(sequences) : instead;
  switch (options.denominator) {
    case PolicyDenominator::kTokens:
      return inverse(instead < 0 ? total : instead);
    case PolicyDenominator::kSequences:
      return inverse(count * batch);
    case PolicyDenominator::kMaxLength:
      return inverse(batch * double(divisor.max_length));
  }
  return 0;
}

// So many spans are a few microseconds of work.
constexpr int64_t kGrain = 1;

template <typename Acc>
std::vector<PolicySequence> first_pass(const PolicyInputs& inputs, const PolicySpans& spans) {
  std::vector<PolicySequence> of_spans(spans.spans.size()), sequences(spans.sequences());
  for_each(spans.count(), kGrain, [&](int64_t i) { sum_span<Acc>(inputs, spans.spans[i], of_spans[i]); });
  for (size_t i = 0; i < of_spans.size(); ++i) {
    PolicySequence& sequence = sequences[spans.spans[i].sequence];
    sequence.count += of_spans[i].count;
    sequence.old_logp += of_spans[i].old_logp;
    sequence.log_ratio += of_spans[i].log_ratio;
  }
  return sequences;
}

}  // namespace

PolicySpans policy_spans(int64_t sequences, int64_t columns, const int64_t* offsets) {
  PolicySpans result;
  for (int64_t b = 0; b < sequences; ++b) {
    result.first.push_back(int64_t(result.spans.size()));
    const int64_t begin = offsets == nullptr ? 0 : offsets[b], end = offsets == nullptr ? columns : offsets[b + 1];
    const int64_t most = std::max(kSpanTokens, round_up((end - begin) / kLongSpans, kTokensPerBlock));
    for (int64_t t = begin; t < end; t += most)
      result.spans.push_back({b, t, std::min(most, end - t), offsets == nullptr ? b * columns + t : t});
  }
  result.first.push_back(int64_t(result.spans.size()));
  return result;
}

template <typename Acc>
double policy_forward(const PolicyOptions& options, const PolicyInputs& inputs, const PolicySpans& spans,
                      const int64_t* group, const PolicyDivisor& divisor, PolicySums& sums, Acc* grad_logp_unscaled,
                      Acc* scale) {
  std::vector<PolicySequence> common(spans.sequences());
  if (options.importance != PolicyImportance::kToken || options.reweight == PolicyReweight::kPerplexity)
    common = first_pass<Acc>(inputs, spans);
  if (options.reweight == PolicyReweight::kPerplexity) normalize_in_groups(group, common);
  std::vector<PolicySums> of_spans(spans.spans.size()), of_sequences(spans.sequences());
  for_each(spans.count(), kGrain, [&](int64_t i) {
    const PolicySpan& span = spans.spans[i];
    policy_span<Acc>(options, inputs, span, common[span.sequence], of_spans[i], grad_logp_unscaled);
  });
  for (int64_t b = 0; b < spans.sequences(); ++b) {
    for (int64_t i = spans.first[b]; i < spans.first[b + 1]; ++i) of_sequences[b].add(of_spans[i]);
    sums.add(of_sequences[b]);
  }
  if (grad_logp_unscaled != nullptr && options.importance == PolicyImportance::kSequence) {
    for_each(spans.count(), kGrain, [&](int64_t i) {
      const PolicySpan& span = spans.spans[i];
      const double slope =
          slope_of_sequence(options, common[span.sequence].mean_log_ratio(), of_sequences[span.sequence]);
      if (slope != 0) add_where_counted(inputs.mask, span, slope, false, grad_logp_unscaled);
    });
  }
  double loss = 0;
  for (int64_t b = 0; b < spans.sequences(); ++b) {
    const double own = policy_scale(options, of_sequences[b].count, sums.count, spans.sequences(), divisor);
    scale[b] = Acc(own);
    loss += own == 0 ? 0 : own * of_sequences[b].loss;
  }
  return loss;
}

template <typename Acc>
void policy_backward(const PolicySpans& spans, const BoolMatrix& mask, const Acc* grad_logp_unscaled, const Acc* scale,
                     double upstream, double entropy_coef, double kl_beta, const PolicyTokenGradients<Acc>& gradients) {
  for_each(spans.count(), kGrain, [&](int64_t i) {
    const PolicySpan& span = spans.spans[i];
    const double factor = double(scale[span.sequence]) * upstream;
    if (gradients.logp != nullptr)
      multiply_row(span.count, Acc(factor), grad_logp_unscaled + span.place, gradients.logp + span.place);
    if (gradients.entropy != nullptr) add_where_counted(mask, span, -entropy_coef * factor, true, gradients.entropy);
    if (gradients.kl != nullptr) add_where_counted(mask, span, kl_beta * factor, true, gradients.kl);
  });
}

#define DLOGP_INSTANTIATE(Acc)                                                                                       \
  template double policy_forward<Acc>(const PolicyOptions&, const PolicyInputs&, const PolicySpans&, const int64_t*, \
                                      const PolicyDivisor&, PolicySums&, Acc*, Acc*);                                \
  template void policy_backward<Acc>(const PolicySpans&, const BoolMatrix&, const Acc*, const Acc*, double, double,  \
                                     double, const PolicyTokenGradients<Acc>&);
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
