// extrapolated_sample on the CPU, one row at a time: the draft, the criterion, the replacement.
//
// A row is read once for its maxima and softmax statistics, and in parts again by a filter and by a draw, which skip
// blocks of tokens that are cut off or can not win. Acc is float or double; sums are in double; a row's result depends
// on nothing but its logits, its row_id and step, and the options.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/sampling.h"
#include "fold.h"
#include "sample_filter.h"
#include "scaled_logits.h"
#include "threads.h"
#include "winner.h"

namespace dlogp {

template <typename Acc>
struct SampledRow {
  int64_t token = -1, draft_token = -1;
  bool selected = false;
  Acc delta_logp = NAN, logp = NAN, base_logp = NAN;
};

// Where the results go, one a row.
template <typename Acc>
struct SampleOutputs {
  int64_t *token, *draft_token;
  bool* selected;
  Acc *delta_logp, *logp, *base_logp;

  void set(int64_t row, const SampledRow<Acc>& sampled) const {
    token[row] = sampled.token;
    draft_token[row] = sampled.draft_token;
    selected[row] = sampled.selected;
    delta_logp[row] = sampled.delta_logp;
    logp[row] = sampled.logp;
    base_logp[row] = sampled.base_logp;
  }
};

// Adds logits of both models to their state, in as many sums as the criterion needs.
template <typename Acc>
void fold_for(Criterion criterion, int64_t count, const Acc* z, const Acc* base_z, PairState<Acc>& state) {
  if (needs_divergence(criterion)) return fold_row(count, z, base_z, state);
  if (needs_all_sums(criterion)) {
    fold_row(count, z, state.model);
    fold_row(count, base_z, state.base);
  } else {
    fold_sum(count, z, state.model);
    fold_sum(count, base_z, state.base);
  }
}

// Room that the rows of a thread share.
template <typename Acc>
struct SampleScratch {
  BlockMaxima<Acc> maxima, base_maxima, drawn_maxima;
  std::vector<Acc> values;
};

// The largest score s + noise among tokens with s ≥ cut. The block with the largest logit goes first: its score rules
// most of the others out.
template <typename Acc>
int64_t draw_by_noise(const ScaledLogits<Acc>& logits, const BlockMaxima<Acc>& maxima, Acc cut, const NoiseKey& key) {
  const int64_t likely = std::find(maxima.values.begin(), maxima.values.end(), maxima.largest) - maxima.values.begin();
  Winner winner;
  Acc buffer[kBlockTokens];
  score_block(likely * kBlockTokens, logits.block(likely, buffer), logits.block_size(likely), cut, key, winner);
  for_blocks(
      logits, maxima, [&](Acc max) { return max >= cut && max + kLargestGumbel >= winner.score; },
      [&](int64_t block, const Acc* s, int64_t size) {
        if (block != likely) score_block(block * kBlockTokens, s, size, cut, key, winner);
      });
  return winner.token;
}

template <typename Acc>
int64_t first_maximum(const ScaledLogits<Acc>& logits, const BlockMaxima<Acc>& maxima) {
  const int64_t block = std::find(maxima.values.begin(), maxima.values.end(), maxima.largest) - maxima.values.begin();
  Acc buffer[kBlockTokens];
  const int64_t size = logits.block_size(block);
  const Acc* s = logits.block(block, buffer);
  const int64_t place = std::find(s, s + size, maxima.largest) - s;
  return block * kBlockTokens + std::min(place, size - 1);  // there is none where all of them overflowed into NaN
}

// The maxima and, where `state` is given, the softmax of the same pass.
template <typename Acc>
void find_maxima(const ScaledLogits<Acc>& logits, BlockMaxima<Acc>& maxima, SoftmaxState<Acc>* state) {
  maxima.values.resize(logits.blocks());
  Acc buffer[kPiece];
  for (int64_t begin = 0; begin < logits.vocabulary(); begin += kPiece) {
    const int64_t count = std::min(kPiece, logits.vocabulary() - begin);
    const Acc* s = logits.piece(begin, count, buffer);
    block_maxima(count, s, maxima.values.data() + begin / kBlockTokens);
    if (state != nullptr) fold_sum(count, s, *state);
  }
  maxima.find_largest();
}

template <typename Acc>
class RowSampler {
 public:
  RowSampler(const Matrix& logits, const Matrix& base_logits, int64_t row, const RowNoise& noise,
             const SampleOptions& options, SampleScratch<Acc>& scratch)
      : logits_(logits), base_logits_(base_logits), row_(row), noise_(noise), options_(options), scratch_(scratch) {}

  SampledRow<Acc> run() {
    SampledRow<Acc> result;
    if (!read_both()) return result;
    const bool from_base = options_.draft_from_base;
    const int64_t draft =
        draw_from(from_base ? base_logits_ : logits_, from_base ? scratch_.base_maxima : scratch_.maxima,
                  from_base ? state_.base : state_.model, Stream::kDraft);
    result.token = result.draft_token = draft;
    set_logp(draft, result);
    result.delta_logp = result.logp - result.base_logp;
    result.selected = is_selected(options_, state_, result.delta_logp, noise_);
    if (result.selected) {
      result.token = options_.gamma == 0 ? draw_from(logits_, scratch_.maxima, state_.model, Stream::kReplacement)
                                         : draw_extrapolated();
      set_logp(result.token, result);
    }
    return result;
  }

 private:
  // One pass over both rows; false if nothing can be drawn from one of them.
  bool read_both() {
    const ScaledLogits<Acc> z(logits_, row_, 1), base_z(base_logits_, row_, 1);
    scratch_.maxima.values.resize(z.blocks());
    scratch_.base_maxima.values.resize(z.blocks());
    Acc buffer[kPiece], base_buffer[kPiece];
    for (int64_t begin = 0; begin < z.vocabulary(); begin += kPiece) {
      const int64_t count = std::min(kPiece, z.vocabulary() - begin), block = begin / kBlockTokens;
      const Acc* piece = z.piece(begin, count, buffer);
      const Acc* base_piece = base_z.piece(begin, count, base_buffer);
      if (block_maxima(count, piece, scratch_.maxima.values.data() + block).special) return false;
      const Finiteness base = block_maxima(count, base_piece, scratch_.base_maxima.values.data() + block);
      if (base.special) return false;
      base_masked_ |= base.masked;
      fold(count, piece, base_piece);
    }
    scratch_.maxima.find_largest();
    scratch_.base_maxima.find_largest();
    return !state_.model.empty() && !state_.base.empty();
  }

  void fold(int64_t count, const Acc* z, const Acc* base_z) {
    // Doubles are summed one after another within a call, whose rounding then grows with its length.
    constexpr int64_t most = sizeof(Acc) == 8 ? kBlockTokens : kPiece;
    for (int64_t begin = 0; begin < count; begin += most) {
      const int64_t size = std::min(most, count - begin);
      fold_for(options_.criterion, size, z + begin, base_z + begin, state_);
    }
  }

  // From one model's logits, whose maxima and state at temperature 1 are known.
  int64_t draw_from(const Matrix& logits, const BlockMaxima<Acc>& maxima, const SoftmaxState<Acc>& state,
                    Stream stream) {
    const ScaledLogits<Acc> raw(logits, row_, 1);
    if (options_.temperature == 0) return first_maximum(raw, maxima);
    if (options_.temperature == 1) return draw(raw, maxima, state, stream);
    return draw_anew(ScaledLogits<Acc>(logits, row_, temperature()), stream);
  }

  int64_t draw_extrapolated() {
    const bool greedy = options_.temperature == 0;
    const ScaledLogits<Acc> logits(logits_, base_logits_, row_, Acc(options_.gamma), least_possible(),
                                   greedy ? 1 : temperature());
    if (!greedy) return draw_anew(logits, Stream::kReplacement);
    find_maxima<Acc>(logits, scratch_.drawn_maxima, nullptr);
    return first_maximum(logits, scratch_.drawn_maxima);
  }

  // The base model's least logit that is not −inf; it stands in for those that are, and is not needed without.
  Acc least_possible() const {
    Acc least = std::numeric_limits<Acc>::infinity();
    if (!base_masked_) return least;
    const ScaledLogits<Acc> base_z(base_logits_, row_, 1);
    Acc buffer[kPiece];
    for (int64_t begin = 0; begin < base_z.vocabulary(); begin += kPiece) {
      const int64_t count = std::min(kPiece, base_z.vocabulary() - begin);
      least = std::min(least, least_finite(count, base_z.piece(begin, count, buffer)));
    }
    return least;
  }

  // From logits of which nothing is known yet.
  int64_t draw_anew(const ScaledLogits<Acc>& logits, Stream stream) {
    SoftmaxState<Acc> state;
    find_maxima(logits, scratch_.drawn_maxima, options_.filters.needs_softmax(logits.vocabulary()) ? &state : nullptr);
    return draw(logits, scratch_.drawn_maxima, state, stream);
  }

  int64_t draw(const ScaledLogits<Acc>& logits, const BlockMaxima<Acc>& maxima, const SoftmaxState<Acc>& state,
               Stream stream) {
    const Acc cut = least_kept(logits, maxima, options_.filters, state, scratch_.values);
    const int64_t token = draw_by_noise(logits, maxima, cut, noise_.key(options_.seed, stream));
    return token >= 0 ? token : first_maximum(logits, maxima);  // only where logits / T overflowed
  }

  void set_logp(int64_t token, SampledRow<Acc>& result) const {
    Acc z, base_z;
    read_row(logits_, row_, token, 1, &z);
    read_row(base_logits_, row_, token, 1, &base_z);
    result.logp = Acc(state_.model.logp(z));
    result.base_logp = Acc(state_.base.logp(base_z));
  }

  Acc temperature() const { return Acc(options_.temperature); }

  const Matrix& logits_;
  const Matrix& base_logits_;
  const int64_t row_;
  const RowNoise noise_;
  const SampleOptions& options_;
  SampleScratch<Acc>& scratch_;
  PairState<Acc> state_;
  bool base_masked_ = false;
};

// From rows of logits that are those from `first` on of the call.
template <typename Acc>
void sample_rows(const Matrix& logits, const Matrix& base_logits, int64_t first, const RowIdentities& identities,
                 const SampleOptions& options, const SampleOutputs<Acc>& outputs) {
  at::parallel_for(0, logits.rows, 1, [&](int64_t begin, int64_t end) {
    SampleScratch<Acc> scratch;
    for (int64_t row = begin; row < end; ++row) {
      RowSampler<Acc> sampler(logits, base_logits, row, identities.of(first + row), options, scratch);
      outputs.set(first + row, sampler.run());
    }
  });
}

template <typename Acc>
void extrapolated_sample(const Matrix& logits, const Matrix& base_logits, const RowIdentities& identities,
                         const SampleOptions& options, const SampleOutputs<Acc>& outputs) {
  sample_rows<Acc>(logits, base_logits, 0, identities, options, outputs);
}

}  // namespace dlogp
