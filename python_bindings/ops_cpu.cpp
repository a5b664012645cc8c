// The CPU kernels as implementations of the private schemas `_cpu_*`: allocation, dtype dispatch, threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "../csrc/cpu/linear_logp.h"
#include "../csrc/cpu/linear_logp_bwd.h"
#include "../csrc/cpu/logp.h"
#include "checks.h"
#include "layers.h"

namespace dlogp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Outputs of forward, zero where a row is ignored.
struct Stats {
  std::vector<Tensor> tensors;

  Stats(const Tensor& target, int models, bool is_double) {
    const auto options = target.options().dtype(is_double ? at::kDouble : at::kFloat);
    const int per_candidate = models == 2 ? 3 : 1, per_row = models == 2 ? 6 : 2;
    for (int i = 0; i < per_candidate; ++i) tensors.push_back(at::zeros(target.sizes(), options));
    for (int i = 0; i < per_row; ++i) tensors.push_back(at::zeros({target.size(0)}, options));
  }

  template <typename Real>
  StatsOutputs<Real> outputs() const {
    const auto pointer = [&](size_t i) { return tensors[i].template mutable_data_ptr<Real>(); };
    if (tensors.size() == 3)
      return {pointer(0), pointer(1), pointer(2), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    return {pointer(1), pointer(3), pointer(7), pointer(0), pointer(2), pointer(4), pointer(8), pointer(5), pointer(6)};
  }

  std::tuple<Tensor, Tensor, Tensor> one_model() const { return {tensors[0], tensors[1], tensors[2]}; }
  auto pair() const {
    return std::make_tuple(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], tensors[6],
                           tensors[7], tensors[8]);
  }
};

template <typename T, int Models>
void linear_forward(const Head* heads, const KeptRows& kept, int64_t ignore_index, int64_t workspace,
                    const StatsOutputs<Accumulator<T>>& outputs) {
  using Real = Accumulator<T>;
  int64_t width = 0;
  for (int model = 0; model < Models; ++model) width += heads[model].width();
  const Tiling tiling = tile_vocabulary(heads[0].vocabulary(), width, sizeof(T));
  const int64_t row_bytes = width * int64_t(sizeof(T)) + Models * kept.candidates * int64_t(sizeof(Real)) +
                            tiling.parts * int64_t(sizeof(State<Real, Models>));
  const int64_t max_rows = std::clamp(workspace / 8 / row_bytes / kRowBlock * kRowBlock, kRowBlock, kMaxRows);

  PerThread<TileScratch<T>> scratch;
  std::vector<T> storage[2];
  std::vector<Real> target_storage[2];
  std::vector<State<Real, Models>> states;
  for (int64_t first = 0; first < kept.count(); first += max_rows) {
    const int64_t count = std::min(max_rows, kept.count() - first);
    PackedRows<T> hidden[2];
    Real* target_logits[2] = {nullptr, nullptr};
    for (int model = 0; model < Models; ++model) {
      pack_hidden(heads[model], kept.rows.data() + first, count, storage[model], hidden[model]);
      target_storage[model].resize(count * kept.candidates);
      target_logits[model] = target_storage[model].data();
    }
    states.resize(count * tiling.parts);
    at::parallel_for(0, tiling.parts, 1, [&](int64_t begin, int64_t end) {
      TileScratch<T>& own = scratch.own();
      own.reserve(heads, Models, tiling, kRowBlock);
      for (int64_t part = begin; part < end; ++part)
        linear_logp_fwd<T, Models>(heads, hidden, count, kept.target_of(first), kept.candidates, tiling, part, own,
                                   states.data(), target_logits);
    });
    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      write_stats<Real, Models>(states.data(), tiling.parts, target_logits, kept.target_of(first), kept.candidates,
                                ignore_index, kept.rows.data() + first, begin, end, outputs);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> linear_logp_fwd_cpu(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                                                       const OptionalTensor& bias, double temperature,
                                                       std::optional<double> softcap, double logit_scale,
                                                       int64_t ignore_index, int64_t workspace) {
  const Layer layer(hidden, weight, bias, temperature, softcap, logit_scale);
  const KeptRows kept = keep_rows(target, layer.head.hidden.rows, weight.size(0), ignore_index);
  const Stats stats(target, 1, is_double(layer.head));
  with_product_type(&layer.head, 1, [&](auto type) {
    using T = decltype(type);
    linear_forward<T, 1>(&layer.head, kept, ignore_index, workspace, stats.outputs<Accumulator<T>>());
  });
  return stats.one_model();
}

auto linear_delta_logp_fwd_cpu(const Tensor& hidden, const Tensor& weight, const Tensor& base_hidden,
                               const Tensor& base_weight, const Tensor& target, const OptionalTensor& bias,
                               const OptionalTensor& base_bias, double temperature, std::optional<double> softcap,
                               std::optional<double> base_softcap, double logit_scale, double base_logit_scale,
                               int64_t ignore_index, int64_t workspace) {
  const Layer model(hidden, weight, bias, temperature, softcap, logit_scale);
  const Layer base(base_hidden, base_weight, base_bias, temperature, base_softcap, base_logit_scale, kBaseNames);
  check_pair(model, base);
  const Head heads[2] = {model.head, base.head};
  const KeptRows kept = keep_rows(target, model.head.hidden.rows, weight.size(0), ignore_index);
  const Stats stats(target, 2, is_double(heads[0]) || is_double(heads[1]));
  with_product_type(heads, 2, [&](auto type) {
    using T = decltype(type);
    linear_forward<T, 2>(heads, kept, ignore_index, workspace, stats.outputs<Accumulator<T>>());
  });
  return stats.pair();
}

// Which gradients of a model are wanted, and where they go; an output without data is not wanted.
struct LayerGradients {
  Tensor hidden, weight, bias;

  LayerGradients(const Tensor& hidden_states, const Tensor& weight_, const OptionalTensor& bias_,
                 std::array<bool, 3> wanted)
      : hidden(wanted[0] ? at::zeros(hidden_states.sizes(), hidden_states.options())
                         : at::empty({0}, hidden_states.options())),
        weight(allocate(weight_, wanted[1])),
        bias(allocate(bias_.value_or(hidden_states), wanted[2] && bias_.has_value())) {}

  bool any() const { return hidden.numel() > 0 || weight.numel() > 0 || bias.numel() > 0; }
  void zero() {
    weight.zero_();
    bias.zero_();
  }

 private:
  static Tensor allocate(const Tensor& like, bool wanted) {
    return at::empty(wanted ? like.sizes() : at::IntArrayRef{0}, like.options());
  }
};

Output output_of(const Tensor& x, int64_t columns) {
  return x.numel() == 0 ? Output{} : Output{x.mutable_data_ptr(), dtype_of(x), columns};
}

// The backward pass of one model or a pair, in blocks that stay within the workspace.
template <typename T, int Models>
class LinearBackward {
  using Real = Accumulator<T>;

 public:
  LinearBackward(const Head* heads, const KeptRows& kept, const Upstream<Real>& upstream, int64_t workspace,
                 LayerGradients* const* gradients)
      : heads_(heads), kept_(kept), upstream_(upstream), workspace_(workspace) {
    const int64_t width = std::max(heads[0].width(), heads[Models - 1].width());
    tiling_ = tile_vocabulary(heads[0].vocabulary(), width, sizeof(T), kBackwardTile<T>);
    for (int model = 0; model < Models; ++model) {
      Side& side = sides_[model];
      side.stride = packed_width<T>(heads[model].width());
      side.hidden = output_of(gradients[model]->hidden, heads[model].width());
      side.weight = output_of(gradients[model]->weight, heads[model].width());
      side.bias = output_of(gradients[model]->bias, heads[model].vocabulary());
      if (side.bias) side.bias_sums.resize(tiling_.tiles() * tiling_.columns);
    }
    row_block_ = std::clamp<int64_t>(padded_rows((kept.count() + 7) / 8), 8, kRowBlock);
    const int64_t row_bytes = sizeof(T) * 2 * (sides_[0].stride + sides_[Models - 1].stride + Models * tiling_.columns);
    max_rows_ = std::clamp(workspace / 8 / row_bytes / kRowBlock * kRowBlock, kRowBlock, kMaxRows);
  }

  void run() {
    // Accumulators for all rows of grad_hidden and for a slab of grad_weight serve both with one recomputation of the
    // logits. Where the former do not fit, each is formed in a pass of its own.
    const bool any_hidden = total(&Side::hidden_wanted) > 0, any_weight = total(&Side::weight_wanted) > 0;
    const int64_t hidden_bytes = kept_.count() * int64_t(sizeof(Real)) * total(&Side::hidden_wanted);
    if (any_hidden && any_weight && hidden_bytes > workspace_ / 2) {
      pass(true, false);
      pass(false, true);
    } else {
      pass(any_hidden, any_weight);
    }
  }

 private:
  struct Side {
    int64_t stride = 0;
    Output hidden, weight, bias;
    std::vector<T> hidden_rows, hidden_columns, grad_logits;
    PackedStorage<T> packed_weight, packed_weight_rows, packed_grad_logits;
    std::vector<Real> grad_hidden, grad_weight, bias_blocks, bias_sums;

    int64_t hidden_wanted() const { return hidden ? stride : 0; }
    int64_t weight_wanted() const { return weight || bias ? stride : 0; }
  };

  int64_t total(int64_t (Side::*wanted)() const) const {
    int64_t sum = 0;
    for (int model = 0; model < Models; ++model) {
      const Side& side = sides_[model];  // GCC's bounds sanitizer calls the method of another element otherwise
      sum += (side.*wanted)();
    }
    return sum;
  }

  void pass(bool with_hidden, bool with_weight) {
    with_hidden_ = with_hidden;
    with_weight_ = with_weight;
    const int64_t blocks = (kept_.count() + max_rows_ - 1) / max_rows_;
    const int64_t accumulated_rows = padded(with_weight ? kept_.count() : std::min(max_rows_, kept_.count()));
    const int64_t tile_bytes = int64_t(sizeof(Real)) * tiling_.columns * total(&Side::weight_wanted);
    const int64_t slab_tiles = !with_weight  ? tiling_.tiles()
                               : blocks == 1 ? 1
                                             : std::clamp<int64_t>(workspace_ / 4 / tile_bytes, 1, tiling_.tiles());
    for (Side& side : sides_) {
      if (with_hidden && side.hidden) side.grad_hidden.assign(accumulated_rows * side.stride, Real(0));
      if (with_weight && side.weight) side.grad_weight.resize(slab_tiles * tiling_.columns * side.stride);
    }
    for (int64_t slab = 0; slab < tiling_.tiles(); slab += slab_tiles) {
      const int64_t slab_end = std::min(slab + slab_tiles, tiling_.tiles());
      for (int64_t first = 0; first < kept_.count(); first += max_rows_) {
        const int64_t count = std::min(max_rows_, kept_.count() - first);
        if (blocks > 1 || slab == 0) gather(first, count);
        for (int64_t tile = slab; tile < slab_end; ++tile) one_tile(tile, tile - slab, first, count);
        if (!with_weight) finish_hidden(first, count);
      }
      if (with_weight) finish_weight(slab, slab_end);
    }
    if (with_weight && with_hidden) finish_hidden(0, kept_.count());
    if (with_weight) finish_bias();
  }

  int64_t padded(int64_t count) const { return round_up(count, row_block_); }

  void gather(int64_t first, int64_t count) {
    for (int model = 0; model < Models; ++model) {
      Side& side = sides_[model];
      const int64_t inner = padded(count);
      side.hidden_rows.resize(inner * side.stride);
      std::fill(side.hidden_rows.begin() + count * side.stride, side.hidden_rows.end(), T(0));
      const PackedRows<T> packed{side.stride, side.hidden_rows.data()};
      at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
        gather_rows(heads_[model].hidden, kept_.rows.data() + first, begin, end, packed);
      });
      if (with_weight_ && side.weight) {
        side.hidden_columns.resize(inner * side.stride);
        transpose(inner, side.stride, side.hidden_rows.data(), side.stride, side.hidden_columns.data(), inner);
      }
    }
  }

  void one_tile(int64_t tile_index, int64_t slab_index, int64_t first, int64_t count) {
    const int64_t begin = tile_index * tiling_.columns;
    const BackwardTile tile{begin, std::min(tiling_.columns, tiling_.vocabulary - begin), count, padded(count),
                            row_block_};
    BackwardBuffers<T> buffers[Models];
    for (int model = 0; model < Models; ++model)
      buffers[model] = buffers_of(sides_[model], tile, tile_index, slab_index, first);

    const int64_t column_blocks = tiling_.columns / kColumnBlock;
    at::parallel_for(0, Models * column_blocks, 1, [&](int64_t begin_block, int64_t end_block) {
      for (int64_t block = begin_block; block < end_block; ++block) {
        const int64_t model = block / column_blocks, column = block % column_blocks * kColumnBlock;
        pack_backward_weight(heads_[model], tiling_, tile, column, own_scratch(), buffers[model]);
      }
    });
    const int64_t row_blocks = tile.inner / row_block_;
    at::parallel_for(0, row_blocks, 1, [&](int64_t begin_block, int64_t end_block) {
      for (int64_t block = begin_block; block < end_block; ++block)
        linear_logp_bwd_rows<T, Models>(heads_, tiling_, tile, block * row_block_, kept_.rows.data() + first,
                                        kept_.target_of(first), upstream_, own_scratch(), buffers);
      release_products<T>();
    });
    for (int model = 0; model < Models; ++model) {
      if (buffers[model].grad_bias != nullptr) linear_logp_bwd_bias(tiling_, tile, buffers[model]);
      if (buffers[model].grad_weight == nullptr) continue;
      const int64_t stride = sides_[model].stride, blocks = (stride + kRowBlock - 1) / kRowBlock;
      at::parallel_for(0, blocks, 1, [&](int64_t begin_block, int64_t end_block) {
        for (int64_t block = begin_block; block < end_block; ++block)
          linear_logp_bwd_weight(tiling_, tile, block * kRowBlock, std::min(stride, (block + 1) * kRowBlock), first > 0,
                                 buffers[model]);
        release_products<T>();
      });
    }
  }

  BackwardBuffers<T> buffers_of(Side& side, const BackwardTile& tile, int64_t tile_index, int64_t slab_index,
                                int64_t first) {
    const int64_t tile_size = side.stride * tiling_.columns;
    BackwardBuffers<T> buffers;
    buffers.hidden = {side.stride, side.hidden_rows.data()};
    side.packed_weight.resize(Packed<T>::size(side.stride, tiling_.columns));
    buffers.packed_weight = side.packed_weight.data();
    side.grad_logits.resize(tile.inner * tiling_.columns);
    buffers.grad_logits = side.grad_logits.data();
    if (with_hidden_ && side.hidden) {
      side.packed_weight_rows.resize(Packed<T>::size(tiling_.columns, side.stride));
      buffers.packed_weight_rows = side.packed_weight_rows.data();
      buffers.grad_hidden = side.grad_hidden.data() + (with_weight_ ? first * side.stride : 0);
    }
    if (with_weight_ && side.weight) {
      side.packed_grad_logits.resize(Packed<T>::size(tile.inner, tiling_.columns));
      buffers.hidden_columns = side.hidden_columns.data();
      buffers.packed_grad_logits = side.packed_grad_logits.data();
      buffers.grad_weight = side.grad_weight.data() + slab_index * tile_size;
    }
    if (with_weight_ && side.bias) {
      side.bias_blocks.resize(tile.inner / row_block_ * tiling_.columns);
      buffers.grad_bias_blocks = side.bias_blocks.data();
      buffers.grad_bias = side.bias_sums.data() + tile_index * tiling_.columns;
    }
    return buffers;
  }

  TileScratch<T>& own_scratch() {
    TileScratch<T>& own = scratch_.own();
    own.reserve(heads_, Models, tiling_, row_block_);
    return own;
  }

  // Writes the accumulated rows [first, first + count) and clears them for the next block.
  void finish_hidden(int64_t first, int64_t count) {
    for (int model = 0; model < Models; ++model) {
      Side& side = sides_[model];
      if (!side.hidden) continue;
      at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          Real* row = side.grad_hidden.data() + i * side.stride;
          write_row(side.hidden, kept_.rows[first + i], 0, side.hidden.columns, row);
        }
      });
      std::fill(side.grad_hidden.begin(), side.grad_hidden.end(), Real(0));
    }
  }

  void finish_weight(int64_t slab, int64_t slab_end) {
    for (Side& side : sides_) {
      if (!side.weight) continue;
      const int64_t column_blocks = tiling_.columns / kColumnBlock;
      at::parallel_for(slab * column_blocks, slab_end * column_blocks, 1, [&](int64_t begin_block, int64_t end_block) {
        for (int64_t block = begin_block; block < end_block; ++block) {
          const int64_t tile = block / column_blocks, column = block % column_blocks * kColumnBlock;
          write_weight_gradient<T>(side.grad_weight.data() + (tile - slab) * tiling_.columns * side.stride, side.stride,
                                   tiling_, tile * tiling_.columns, column, own_scratch(), side.weight);
        }
      });
    }
  }

  void finish_bias() {
    for (Side& side : sides_)
      if (side.bias) write_row(side.bias, 0, 0, side.bias.columns, side.bias_sums.data());
  }

  const Head* heads_;
  const KeptRows& kept_;
  const Upstream<Real>& upstream_;
  const int64_t workspace_;
  Tiling tiling_;
  Side sides_[Models];
  int64_t row_block_, max_rows_;
  bool with_hidden_ = false, with_weight_ = false;
  PerThread<TileScratch<T>> scratch_;
};

// Upstream gradients and saved statistics as tensors that stay alive.
template <typename Real>
struct OwnedModelUpstream {
  Values<Real> grad_logp, grad_entropy, grad_lse, entropy, lse;

  OwnedModelUpstream(const Tensor& target, const OptionalTensor& grad_logp_, const OptionalTensor& grad_entropy_,
                     const OptionalTensor& grad_lse_, const Tensor& entropy_, const Tensor& lse_)
      : grad_logp(grad_logp_, target.sizes(), "grad_logp"),
        grad_entropy(grad_entropy_, target.sizes().slice(0, 1), "grad_entropy"),
        grad_lse(grad_lse_, target.sizes().slice(0, 1), "grad_lse"),
        entropy(entropy_, target.sizes().slice(0, 1), "entropy"),
        lse(lse_, target.sizes().slice(0, 1), "lse") {}

  ModelUpstream<Real> get() const {
    return {grad_logp.get(), grad_entropy.get(), grad_lse.get(), entropy.get(), lse.get()};
  }
};

template <typename Real>
struct OwnedDivergences {
  Values<Real> grad_kl, grad_reverse_kl, kl, reverse_kl;

  OwnedDivergences(const Tensor& target, const OptionalTensor& grad_kl_, const OptionalTensor& grad_reverse_kl_,
                   const Tensor& kl_, const Tensor& reverse_kl_)
      : grad_kl(grad_kl_, target.sizes().slice(0, 1), "grad_kl"),
        grad_reverse_kl(grad_reverse_kl_, target.sizes().slice(0, 1), "grad_reverse_kl"),
        kl(kl_, target.sizes().slice(0, 1), "kl"),
        reverse_kl(reverse_kl_, target.sizes().slice(0, 1), "reverse_kl") {}

  Upstream<Real> with(const OwnedModelUpstream<Real>& model, const OwnedModelUpstream<Real>& base, int64_t candidates,
                      int64_t ignore_index) const {
    return {{model.get(), base.get()}, grad_kl.get(), grad_reverse_kl.get(), kl.get(),
            reverse_kl.get(),          candidates,    ignore_index};
  }
};

template <typename T>
void one_model_backward(const Head& head, const Tensor& target, const KeptRows& kept, int64_t ignore_index,
                        int64_t workspace, const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy,
                        const OptionalTensor& grad_lse, const Tensor& entropy, const Tensor& lse,
                        LayerGradients& gradients) {
  if (!gradients.any()) return;
  if (kept.count() == 0) return gradients.zero();
  using Real = Accumulator<T>;
  const OwnedModelUpstream<Real> model(target, grad_logp, grad_entropy, grad_lse, entropy, lse);
  const Upstream<Real> upstream{{model.get(), {}}, nullptr, nullptr, nullptr, nullptr, kept.candidates, ignore_index};
  LayerGradients* all[1] = {&gradients};
  LinearBackward<T, 1>(&head, kept, upstream, workspace, all).run();
}

std::tuple<Tensor, Tensor, Tensor> linear_logp_bwd_cpu(
    const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias, const Tensor& entropy,
    const Tensor& lse, double temperature, std::optional<double> softcap, double logit_scale, int64_t ignore_index,
    std::array<bool, 3> output_mask, int64_t workspace) {
  const Layer layer(hidden, weight, bias, temperature, softcap, logit_scale);
  const KeptRows kept = keep_rows(target, layer.head.hidden.rows, weight.size(0), ignore_index);
  LayerGradients gradients(hidden, weight, bias, output_mask);
  with_product_type(&layer.head, 1, [&](auto type) {
    one_model_backward<decltype(type)>(layer.head, target, kept, ignore_index, workspace, grad_logp, grad_entropy,
                                       grad_lse, entropy, lse, gradients);
  });
  return {gradients.hidden, gradients.weight, gradients.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_delta_logp_bwd_cpu(
    const OptionalTensor& grad_logp, const OptionalTensor& grad_base_logp, const OptionalTensor& grad_entropy,
    const OptionalTensor& grad_base_entropy, const OptionalTensor& grad_kl, const OptionalTensor& grad_reverse_kl,
    const OptionalTensor& grad_lse, const OptionalTensor& grad_base_lse, const Tensor& hidden, const Tensor& weight,
    const Tensor& base_hidden, const Tensor& base_weight, const Tensor& target, const OptionalTensor& bias,
    const OptionalTensor& base_bias, const Tensor& entropy, const Tensor& base_entropy, const Tensor& kl,
    const Tensor& reverse_kl, const Tensor& lse, const Tensor& base_lse, double temperature,
    std::optional<double> softcap, std::optional<double> base_softcap, double logit_scale, double base_logit_scale,
    int64_t ignore_index, std::array<bool, 6> output_mask, int64_t workspace) {
  const Layer model(hidden, weight, bias, temperature, softcap, logit_scale);
  const Layer base(base_hidden, base_weight, base_bias, temperature, base_softcap, base_logit_scale, kBaseNames);
  check_pair(model, base);
  const Head heads[2] = {model.head, base.head};
  const KeptRows kept = keep_rows(target, model.head.hidden.rows, weight.size(0), ignore_index);
  LayerGradients gradients(hidden, weight, bias, {output_mask[0], output_mask[1], output_mask[4]});
  LayerGradients base_gradients(base_hidden, base_weight, base_bias, {output_mask[2], output_mask[3], output_mask[5]});
  with_product_type(heads, 2, [&](auto type) {
    using T = decltype(type);
    using Real = Accumulator<T>;
    if (!grad_kl.has_value() && !grad_reverse_kl.has_value()) {  // then neither gradient needs the other model
      one_model_backward<T>(heads[0], target, kept, ignore_index, workspace, grad_logp, grad_entropy, grad_lse, entropy,
                            lse, gradients);
      one_model_backward<T>(heads[1], target, kept, ignore_index, workspace, grad_base_logp, grad_base_entropy,
                            grad_base_lse, base_entropy, base_lse, base_gradients);
      return;
    }
    if (!gradients.any() && !base_gradients.any()) return;
    if (kept.count() == 0) {
      gradients.zero();
      base_gradients.zero();
      return;
    }
    const OwnedModelUpstream<Real> own(target, grad_logp, grad_entropy, grad_lse, entropy, lse);
    const OwnedModelUpstream<Real> own_base(target, grad_base_logp, grad_base_entropy, grad_base_lse, base_entropy,
                                            base_lse);
    const OwnedDivergences<Real> divergences(target, grad_kl, grad_reverse_kl, kl, reverse_kl);
    const Upstream<Real> upstream = divergences.with(own, own_base, kept.candidates, ignore_index);
    LayerGradients* all[2] = {&gradients, &base_gradients};
    LinearBackward<T, 2>(heads, kept, upstream, workspace, all).run();
  });
  return {gradients.hidden,      gradients.weight, base_gradients.hidden,
          base_gradients.weight, gradients.bias,   base_gradients.bias};
}

// Given logits as the kernels take them.
struct GivenLogits {
  Rows rows;
  Logits logits;

  GivenLogits(const Tensor& values, double temperature, std::optional<double> softcap, double logit_scale,
              const char* name)
      : rows(values, name), logits{rows.matrix, {logit_scale, softcap.value_or(0), temperature}} {
    TORCH_CHECK_VALUE(rows.matrix.columns > 0, name, " has no columns, expected the vocabulary");
  }
};

template <typename Real, int Models>
void logits_forward(const Logits* logits, const KeptRows& kept, int64_t ignore_index,
                    const StatsOutputs<Real>& outputs) {
  const Tiling tiling = tile_logits_row(logits[0].values.columns);
  constexpr int64_t block = 256;
  std::vector<State<Real, Models>> states(block * tiling.parts);
  std::vector<Real> target_storage[2];
  for (auto& storage : target_storage) storage.resize(block * kept.candidates);
  Real* const target_logits[2] = {target_storage[0].data(), target_storage[1].data()};
  for (int64_t first = 0; first < kept.count(); first += block) {
    const int64_t count = std::min(block, kept.count() - first);
    at::parallel_for(0, count * tiling.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t i = item / tiling.parts, part = item % tiling.parts;
        Real* const own[2] = {target_logits[0] + i * kept.candidates, target_logits[1] + i * kept.candidates};
        states[item] = logp_fwd<Real, Models>(logits, kept.rows[first + i], tiling, part, kept.target_of(first + i),
                                              kept.candidates, own);
      }
    });
    write_stats<Real, Models>(states.data(), tiling.parts, target_logits, kept.target_of(first), kept.candidates,
                              ignore_index, kept.rows.data() + first, 0, count, outputs);
  }
}

template <typename Real, int Models>
void logits_backward(const Logits* logits, const KeptRows& kept, const Upstream<Real>& upstream,
                     const Output* outputs) {
  const Tiling tiling = tile_logits_row(logits[0].values.columns);
  at::parallel_for(0, kept.count() * tiling.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / tiling.parts;
      logp_bwd<Real, Models>(logits, kept.rows[i], tiling, item % tiling.parts, kept.target_of(i), upstream, outputs);
    }
  });
}

template <typename Use>
void with_real_type(bool use_double, Use use) {
  if (use_double)
    use(double());
  else
    use(float());
}

std::tuple<Tensor, Tensor, Tensor> logp_fwd_cpu(const Tensor& logits, const Tensor& target, double temperature,
                                                std::optional<double> softcap, double logit_scale, int64_t ignore_index,
                                                int64_t workspace) {
  const GivenLogits given(logits, temperature, softcap, logit_scale, "logits");
  const KeptRows kept = keep_rows(target, given.rows.matrix.rows, logits.size(-1), ignore_index);
  const bool use_double = logits.scalar_type() == at::kDouble;
  const Stats stats(target, 1, use_double);
  with_real_type(use_double, [&](auto type) {
    using Real = decltype(type);
    logits_forward<Real, 1>(&given.logits, kept, ignore_index, stats.outputs<Real>());
  });
  return stats.one_model();
}

void check_same_shape(const Tensor& base_logits, const Tensor& logits) {
  TORCH_CHECK_VALUE(base_logits.sizes() == logits.sizes(), "base_logits has shape ", base_logits.sizes(), ", expected ",
                    logits.sizes());
}

auto delta_logp_fwd_cpu(const Tensor& logits, const Tensor& base_logits, const Tensor& target, double temperature,
                        std::optional<double> softcap, std::optional<double> base_softcap, double logit_scale,
                        double base_logit_scale, int64_t ignore_index, int64_t workspace) {
  check_same_shape(base_logits, logits);
  const GivenLogits given(logits, temperature, softcap, logit_scale, "logits");
  const GivenLogits base(base_logits, temperature, base_softcap, base_logit_scale, "base_logits");
  const KeptRows kept = keep_rows(target, given.rows.matrix.rows, logits.size(-1), ignore_index);
  const bool use_double = logits.scalar_type() == at::kDouble || base_logits.scalar_type() == at::kDouble;
  const Stats stats(target, 2, use_double);
  const Logits both[2] = {given.logits, base.logits};
  with_real_type(use_double, [&](auto type) {
    using Real = decltype(type);
    logits_forward<Real, 2>(both, kept, ignore_index, stats.outputs<Real>());
  });
  return stats.pair();
}

// Zero where rows are ignored.
Tensor logits_gradient_like(const Tensor& logits, const KeptRows& kept, int64_t rows) {
  return kept.count() == rows ? at::empty(logits.sizes(), logits.options())
                              : at::zeros(logits.sizes(), logits.options());
}

Tensor logp_bwd_cpu(const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
                    const Tensor& logits, const Tensor& target, const Tensor& entropy, const Tensor& lse,
                    double temperature, std::optional<double> softcap, double logit_scale, int64_t ignore_index,
                    int64_t workspace) {
  const GivenLogits given(logits, temperature, softcap, logit_scale, "logits");
  const KeptRows kept = keep_rows(target, given.rows.matrix.rows, logits.size(-1), ignore_index);
  const Tensor gradient = logits_gradient_like(logits, kept, given.rows.matrix.rows);
  with_real_type(logits.scalar_type() == at::kDouble, [&](auto type) {
    using Real = decltype(type);
    const OwnedModelUpstream<Real> model(target, grad_logp, grad_entropy, grad_lse, entropy, lse);
    const Upstream<Real> upstream{{model.get(), {}}, nullptr, nullptr, nullptr, nullptr, kept.candidates, ignore_index};
    const Output output = output_of(gradient, logits.size(-1));
    logits_backward<Real, 1>(&given.logits, kept, upstream, &output);
  });
  return gradient;
}

std::tuple<Tensor, Tensor> delta_logp_bwd_cpu(
    const OptionalTensor& grad_logp, const OptionalTensor& grad_base_logp, const OptionalTensor& grad_entropy,
    const OptionalTensor& grad_base_entropy, const OptionalTensor& grad_kl, const OptionalTensor& grad_reverse_kl,
    const OptionalTensor& grad_lse, const OptionalTensor& grad_base_lse, const Tensor& logits,
    const Tensor& base_logits, const Tensor& target, const Tensor& entropy, const Tensor& base_entropy,
    const Tensor& kl, const Tensor& reverse_kl, const Tensor& lse, const Tensor& base_lse, double temperature,
    std::optional<double> softcap, std::optional<double> base_softcap, double logit_scale, double base_logit_scale,
    int64_t ignore_index, std::array<bool, 2> output_mask, int64_t workspace) {
  check_same_shape(base_logits, logits);
  const GivenLogits given(logits, temperature, softcap, logit_scale, "logits");
  const GivenLogits base(base_logits, temperature, base_softcap, base_logit_scale, "base_logits");
  const KeptRows kept = keep_rows(target, given.rows.matrix.rows, logits.size(-1), ignore_index);
  const auto allocate = [&](const Tensor& x, bool wanted) {
    return wanted ? logits_gradient_like(x, kept, given.rows.matrix.rows) : at::empty({0}, x.options());
  };
  const Tensor gradient = allocate(logits, output_mask[0]), base_gradient = allocate(base_logits, output_mask[1]);
  const Logits both[2] = {given.logits, base.logits};
  with_real_type(logits.scalar_type() == at::kDouble || base_logits.scalar_type() == at::kDouble, [&](auto type) {
    using Real = decltype(type);
    const OwnedModelUpstream<Real> own(target, grad_logp, grad_entropy, grad_lse, entropy, lse);
    const OwnedModelUpstream<Real> own_base(target, grad_base_logp, grad_base_entropy, grad_base_lse, base_entropy,
                                            base_lse);
    const OwnedDivergences<Real> divergences(target, grad_kl, grad_reverse_kl, kl, reverse_kl);
    const Upstream<Real> upstream = divergences.with(own, own_base, kept.candidates, ignore_index);
    const Output outputs[2] = {output_of(gradient, logits.size(-1)), output_of(base_gradient, logits.size(-1))};
    logits_backward<Real, 2>(both, kept, upstream, outputs);
  });
  return {gradient, base_gradient};
}

}  // namespace
}  // namespace dlogp

TORCH_LIBRARY_IMPL(dlogp, CPU, library) {
  library.impl("_cpu_linear_logp_fwd", &dlogp::linear_logp_fwd_cpu);
  library.impl("_cpu_linear_logp_bwd", &dlogp::linear_logp_bwd_cpu);
  library.impl("_cpu_linear_delta_logp_fwd", &dlogp::linear_delta_logp_fwd_cpu);
  library.impl("_cpu_linear_delta_logp_bwd", &dlogp::linear_delta_logp_bwd_cpu);
  library.impl("_cpu_logp_fwd", &dlogp::logp_fwd_cpu);
  library.impl("_cpu_logp_bwd", &dlogp::logp_bwd_cpu);
  library.impl("_cpu_delta_logp_fwd", &dlogp::delta_logp_fwd_cpu);
  library.impl("_cpu_delta_logp_bwd", &dlogp::delta_logp_bwd_cpu);
}

// Importing the module loads the library; it has no contents of its own.
PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
