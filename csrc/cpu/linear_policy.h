// linear_policy_loss on the CPU, of ratios of tokens. The logits of a block of rows are kept (linear_forward.h); out of
// their statistics come loss and gradients of each row, and out of the logits, tile by tile, theirs (backward_tile.h).
// The gradient of hidden states is accumulated over the tiles, that of the weight over the blocks, in its output.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "backward_tile.h"
#include "linear_forward.h"
#include "policy_tokens.h"

namespace dlogp {

// What is known of all N rows before their logits are; null where an argument is missing.
template <typename Acc>
struct PolicyRows {
  const Acc *old_logp, *advantage, *scale, *score, *ref_logp, *token_weight;
};

// Returns whether there are any.
template <typename Acc>
bool gather(const Acc* from, const int64_t* rows, int64_t count, Acc* to) {
  if (from == nullptr) return false;
  for (int64_t i = 0; i < count; ++i) to[i] = from[rows[i]];
  return true;
}

// Statistics and upstream gradients of one block of rows.
template <typename Acc, int Models>
struct PolicyBlock {
  StatsStorage<Acc, Models> stats;
  std::vector<Acc> grad_logp, grad_entropy, grad_kl;

  // Room for so many rows.
  StatsOutputs<Acc> outputs(int64_t count) {
    for (auto* grad : {&grad_logp, &grad_entropy, &grad_kl}) grad->resize(count);
    return stats.outputs(count);
  }

  Upstream<Acc> upstream(int64_t ignore_index) const {
    const ModelUpstream<Acc> model = {grad_logp.data(),     grad_entropy.data(), nullptr,
                                      stats.entropy.data(), stats.max.data(),    stats.rest.data()};
    if (Models == 1) return {{model, {}}, nullptr, nullptr, nullptr, nullptr, 1, ignore_index};
    const ModelUpstream<Acc> base = {
        nullptr, nullptr, nullptr, stats.base_entropy.data(), stats.base_max.data(), stats.base_rest.data()};
    return {{model, base}, grad_kl.data(), nullptr, stats.kl.data(), nullptr, 1, ignore_index};
  }

  // Sets the upstream gradients of the rows out of their statistics, adds to `sums`; returns their loss, times their
  // scale.
  double set_gradients(const PolicyOptions& options, const PolicyRows<Acc>& known, const RowBlock& rows,
                       PolicySums& sums) {
    PolicyTokens<Acc> tokens;
    Acc scale[kTokensPerBlock];
    double loss = 0;
    for (int64_t first = 0; first < rows.count; first += kTokensPerBlock) {
      const int64_t n = std::min(kTokensPerBlock, rows.count - first);
      const int64_t* own = rows.rows + first;
      std::fill_n(tokens.mask, n, Acc(1));
      std::copy_n(stats.logp.data() + first, n, tokens.logp);
      std::copy_n(stats.entropy.data() + first, n, tokens.entropy);
      gather(known.old_logp, own, n, tokens.old_logp);
      gather(known.advantage, own, n, tokens.advantage);
      gather(known.score, own, n, tokens.score);
      gather(known.scale, own, n, scale);
      tokens.has_entropy = true;
      tokens.has_ref_logp = gather(known.ref_logp, own, n, tokens.ref_logp);
      tokens.has_token_weight = gather(known.token_weight, own, n, tokens.token_weight);
      tokens.has_kl = Models == 2;
      if (tokens.has_kl) std::copy_n(stats.kl.data() + first, n, tokens.kl);
      policy_tokens(options, n, tokens, sums);
      for (int64_t i = 0; i < n; ++i) {
        loss += scale[i] == 0 ? 0 : double(scale[i]) * double(tokens.loss[i]);
        grad_logp[first + i] = scale[i] * tokens.grad_logp_unscaled[i];
        grad_entropy[first + i] = Acc(-options.entropy_coef) * scale[i];
        if (tokens.has_kl) grad_kl[first + i] = Acc(options.kl_beta) * scale[i];
      }
    }
    return loss;
  }
};

// A block of rows at a time. With gradients a block's logits are kept in the workspace.
template <typename T, int Models>
class LinearPolicy {
  using Acc = Accumulator<T>;

 public:
  LinearPolicy(const Head* heads, const KeptRows& kept, const HeadAccumulators<Acc>& gradients, int64_t workspace)
      : heads_(heads),
        kept_(kept),
        gradients_(gradients),
        tiling_(tile_vocabulary(heads[0].vocabulary(), std::max(heads[0].width(), heads[Models - 1].width()), sizeof(T),
                                kBackwardTile<T>)),
        max_rows_(gradients.any() ? rows_in(workspace) : kMaxRows),
        backward_(heads, tiling_) {}

  double run(const PolicyOptions& options, const PolicyRows<Acc>& known, PolicySums& sums) {
    if (gradients_.any() && kept_.count() > 0) {
      // Not a vector, which would be filled with zeros first.
      const int64_t size = tiling_.tiles() * tiling_.columns * padded_rows(std::min(max_rows_, kept_.count()));
      for (auto& logits : logits_) logits.reset(new Acc[size]);
    }
    if (gradients_.bias != nullptr) bias_sums_.assign(tiling_.tiles() * tiling_.columns, Acc(0));
    double loss = 0;
    for (int64_t first = 0; first < kept_.count(); first += max_rows_) {
      const RowBlock rows = kept_.block(first, max_rows_);
      forward(rows);
      loss += block_.set_gradients(options, known, rows, sums);
      if (gradients_.any()) backward(rows, first > 0);
    }
    if (gradients_.bias != nullptr) std::copy_n(bias_sums_.data(), tiling_.vocabulary, gradients_.bias);
    if (gradients_.weight != nullptr && kept_.count() == 0)
      std::fill_n(gradients_.weight, tiling_.vocabulary * heads_[0].width(), Acc(0));
    return loss;
  }

 private:
  // Blocks of nearly equal size whose logits take three quarters of the workspace at most.
  int64_t rows_in(int64_t workspace) const {
    const int64_t row_bytes = Models * tiling_.tiles() * tiling_.columns * int64_t(sizeof(Acc));
    const int64_t most = std::clamp<int64_t>(workspace / 4 * 3 / row_bytes, 8, kMaxRows);
    const int64_t unit = most >= kRowBlock ? kRowBlock : padded_rows(most + 1) / 2;
    const int64_t blocks = std::max<int64_t>(1, (kept_.count() + most - 1) / most);
    return std::min(round_up((kept_.count() + blocks - 1) / blocks, unit), most / unit * unit);
  }

  void forward(const RowBlock& rows) {
    Acc* kept_logits[Models];
    for (int model = 0; model < Models; ++model) kept_logits[model] = logits_[model].get();
    places_.resize(rows.count);
    std::iota(places_.begin(), places_.end(), 0);
    forward_.run(heads_, tiling_, rows, std::max(padded_rows(rows.count), inner_of(rows)), places_.data(),
                 gradients_.any() ? kept_logits : nullptr, scratch_, block_.outputs(rows.count));
  }

  // `accumulate` adds to what earlier blocks made of grad_weight.
  void backward(const RowBlock& rows, bool accumulate) {
    RowBlock placed = rows;
    placed.rows = places_.data();
    const int64_t stride = forward_.hidden[0].stride, width = heads_[0].width();
    const bool with_weight[] = {gradients_.weight != nullptr, false};
    backward_.set_rows(placed, backward_row_block(rows.count), forward_.hidden, with_weight);
    if (gradients_.hidden != nullptr) grad_hidden_.assign(inner_of(rows) * stride, Acc(0));
    const Upstream<Acc> upstream = block_.upstream(rows.ignore_index);
    for (int64_t index = 0; index < tiling_.tiles(); ++index) {
      const int64_t begin = index * tiling_.columns;
      const Acc* logits[Models];
      for (int model = 0; model < Models; ++model)
        logits[model] = logits_[model].get() + begin * padded_rows(rows.count);
      HeadAccumulators<Acc> to[Models];  // of the second head no gradient is wanted
      if (gradients_.hidden != nullptr) to[0].hidden = grad_hidden_.data();
      if (gradients_.weight != nullptr) to[0].weight = gradients_.weight + begin * width;
      if (gradients_.bias != nullptr) to[0].bias = bias_sums_.data() + begin;
      backward_.add_tile(index, upstream, logits, accumulate, to);
    }
    if (gradients_.hidden == nullptr) return;
    for (int64_t i = 0; i < rows.count; ++i)
      std::copy_n(grad_hidden_.data() + i * stride, width, gradients_.hidden + rows.rows[i] * width);
  }

  // The rows of a block, padded to a whole number of backward's row blocks.
  int64_t inner_of(const RowBlock& rows) const { return round_up(rows.count, backward_row_block(rows.count)); }

  const Head* heads_;
  const KeptRows& kept_;
  const HeadAccumulators<Acc> gradients_;
  const Tiling tiling_;
  const int64_t max_rows_;
  PerThread<TileScratch<T>> scratch_;
  std::unique_ptr<Acc[]> logits_[Models];
  // Of the block of rows at work:
  ForwardBlock<T, Models> forward_;
  PolicyBlock<Acc, Models> block_;
  BackwardBlock<T, Models> backward_;
  std::vector<Acc> grad_hidden_, bias_sums_;
  std::vector<int64_t> places_;
};

// Returns the loss of the rows that count, each times its scale, and adds them to `sums`. Writes the gradients of the
// first head, of hidden those of the rows that count. Of a pair, the second head is the reference model's.
template <typename T, int Models>
double linear_policy(const Head* heads, const KeptRows& kept, const PolicyOptions& options,
                     const PolicyRows<Accumulator<T>>& known, int64_t workspace,
                     const HeadAccumulators<Accumulator<T>>& gradients, PolicySums& sums) {
  return LinearPolicy<T, Models>(heads, kept, gradients, workspace).run(options, known, sums);
}

// Writes factor · from.
template <typename Acc>
void scale_gradient(int64_t count, double factor, const Acc* from, const Output& to) {
  at::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
    constexpr int64_t kPiece = 1024;
    Acc piece[kPiece];
    for (int64_t i = begin; i < end; i += kPiece) {
      const int64_t size = std::min(kPiece, end - i);
      for (int64_t j = 0; j < size; ++j) piece[j] = from[i + j] * Acc(factor);
      write_row(to, 0, i, size, piece);
    }
  });
}

}  // namespace dlogp
