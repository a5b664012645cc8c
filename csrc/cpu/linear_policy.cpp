#include "linear_policy.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "backward_tile.h"
#include "linear_forward.h"

namespace dlogp {
namespace {

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
                                      stats.entropy.data(), stats.max.data(),    stats.log_sum.data()};
    if (Models == 1) return {{model, {}}, nullptr, nullptr, nullptr, nullptr, 1, ignore_index};
    const ModelUpstream<Acc> base = {
        nullptr, nullptr, nullptr, stats.base_entropy.data(), stats.base_max.data(), stats.base_log_sum.data()};
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
  LinearPolicy(const Head* heads, const KeptRows& kept, const PolicyGradients<Acc>& gradients, int64_t workspace)
      : heads_(heads), kept_(kept), gradients_(gradients), width_(heads[0].width()) {
    const int64_t widest = std::max(heads[0].width(), heads[Models - 1].width());
    tiling_ = tile_vocabulary(heads[0].vocabulary(), widest, sizeof(T), kBackwardTile<T>);
    max_rows_ = gradients.any() ? rows_in(workspace) : kMaxRows;
  }

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
      std::fill_n(gradients_.weight, tiling_.vocabulary * width_, Acc(0));
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
    const int64_t row_block = backward_row_block(rows.count), inner = inner_of(rows), stride = hidden().stride;
    prepare_products(inner, inner / row_block);
    const Upstream<Acc> upstream = block_.upstream(rows.ignore_index);
    for (int64_t index = 0; index < tiling_.tiles(); ++index) {
      const int64_t begin = index * tiling_.columns, width = std::min(tiling_.columns, tiling_.vocabulary - begin);
      const BackwardTile tile{begin, width, rows.count, inner, row_block};
      BackwardBuffers<T> buffers[Models];
      buffers[0] = buffers_of(index);
      if (gradients_.hidden != nullptr) {
        for_each(tiling_.columns / kColumnBlock, 1, [&](int64_t block) {
          pack_backward_weight(heads_[0], tiling_, tile, block * kColumnBlock, own_scratch(row_block), buffers[0]);
        });
      }
      at::parallel_for(0, tile.row_blocks(), 1, [&](int64_t begin_block, int64_t end_block) {
        for (int64_t first = begin_block * row_block; first < end_block * row_block; first += row_block) {
          const Acc* logits[Models];
          for (int model = 0; model < Models; ++model)
            logits[model] = logits_[model].get() + (index * padded_rows(rows.count) + first) * tiling_.columns;
          backward_rows<T, Models>(heads_, tiling_, tile, first, placed, upstream, logits, own_scratch(row_block),
                                   buffers);
        }
        release_products<T>();
      });
      if (gradients_.bias != nullptr) backward_bias(tiling_, tile, buffers[0]);
      if (gradients_.weight != nullptr) add_weight_gradient(tile, accumulate);
    }
    if (gradients_.hidden == nullptr) return;
    for (int64_t i = 0; i < rows.count; ++i)
      std::copy_n(grad_hidden_.data() + i * stride, width_, gradients_.hidden + rows.rows[i] * width_);
  }

  // The rows of a block, padded to a whole number of backward's row blocks.
  int64_t inner_of(const RowBlock& rows) const { return round_up(rows.count, backward_row_block(rows.count)); }
  const PackedRows<T>& hidden() const { return forward_.hidden[0]; }

  void prepare_products(int64_t inner, int64_t row_blocks) {
    const int64_t stride = hidden().stride;
    grad_logits_.resize(inner * tiling_.columns);
    if (gradients_.hidden != nullptr) {
      grad_hidden_.assign(inner * stride, Acc(0));
      packed_weight_rows_.resize(Packed<T>::size(tiling_.columns, stride));
    }
    if (gradients_.bias != nullptr) bias_blocks_.resize(row_blocks * tiling_.columns);
    if (gradients_.weight != nullptr) {
      packed_hidden_.resize(Packed<T>::size(inner, stride));
      pack_rows<T>(0, inner, hidden().data, stride, {packed_hidden_.data(), inner, stride});
    }
  }

  // Of the first head's tile `index`; of the other no gradient is wanted.
  BackwardBuffers<T> buffers_of(int64_t index) {
    BackwardBuffers<T> buffers;
    buffers.hidden = hidden();
    buffers.grad_logits = grad_logits_.data();
    if (gradients_.hidden != nullptr) {
      buffers.packed_weight_rows = packed_weight_rows_.data();
      buffers.grad_hidden = grad_hidden_.data();
    }
    buffers.grad_weight = gradients_.weight;
    if (gradients_.bias != nullptr) {
      buffers.grad_bias = bias_sums_.data() + index * tiling_.columns;
      buffers.grad_bias_blocks = bias_blocks_.data();
    }
    return buffers;
  }

  // A tile of grad_weight (V, D): starts from zero unless `accumulate`.
  void add_weight_gradient(const BackwardTile& tile, bool accumulate) {
    at::parallel_for(0, round_up(tile.width, kColumnBlock) / kColumnBlock, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t column = block * kColumnBlock, columns = std::min(tile.width - column, kColumnBlock);
        std::vector<T>& transposed = transposed_.own();
        transposed.resize(columns * tile.inner);
        transpose(tile.inner, columns, grad_logits_.data() + column, tiling_.columns, transposed.data(), tile.inner);
        multiply({columns, width_, tile.inner, tile.inner, hidden().stride, width_}, transposed.data(),
                 packed_hidden_.data(), gradients_.weight + (tile.begin + column) * width_, accumulate);
      }
      release_products<T>();
    });
  }

  TileScratch<T>& own_scratch(int64_t rows) {
    TileScratch<T>& own = scratch_.own();
    own.reserve(heads_, Models, tiling_, rows);
    return own;
  }

  const Head* heads_;
  const KeptRows& kept_;
  const PolicyGradients<Acc> gradients_;
  const int64_t width_;
  Tiling tiling_;
  int64_t max_rows_;
  PerThread<TileScratch<T>> scratch_;
  PerThread<std::vector<T>> transposed_;
  std::unique_ptr<Acc[]> logits_[Models];
  // Of the block of rows at work:
  ForwardBlock<T, Models> forward_;
  PolicyBlock<Acc, Models> block_;
  std::vector<T> grad_logits_;
  PackedStorage<T> packed_hidden_, packed_weight_rows_;
  std::vector<Acc> grad_hidden_, bias_blocks_, bias_sums_;
  std::vector<int64_t> places_;
};

}  // namespace

template <typename T, int Models>
double linear_policy(const Head* heads, const KeptRows& kept, const PolicyOptions& options,
                     const PolicyRows<Accumulator<T>>& known, int64_t workspace,
                     const PolicyGradients<Accumulator<T>>& gradients, PolicySums& sums) {
  return LinearPolicy<T, Models>(heads, kept, gradients, workspace).run(options, known, sums);
}

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

#define DLOGP_INSTANTIATE(T, Models)                                                           \
  template double linear_policy<T, Models>(const Head*, const KeptRows&, const PolicyOptions&, \
                                           const PolicyRows<Accumulator<T>>&, int64_t,         \
                                           const PolicyGradients<Accumulator<T>>&, PolicySums&);
DLOGP_INSTANTIATE(c10::BFloat16, 1)
DLOGP_INSTANTIATE(c10::BFloat16, 2)
DLOGP_INSTANTIATE(float, 1)
DLOGP_INSTANTIATE(float, 2)
DLOGP_INSTANTIATE(double, 1)
DLOGP_INSTANTIATE(double, 2)
#undef DLOGP_INSTANTIATE
template void scale_gradient<float>(int64_t, double, const float*, const Output&);
template void scale_gradient<double>(int64_t, double, const double*, const Output&);

}  // namespace dlogp
