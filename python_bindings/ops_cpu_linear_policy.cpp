#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <tuple>

#include "../csrc/cpu/linear_policy_loss.h"
#include "layers.h"
#include "policy_checks.h"

namespace dlogp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Where gradients go, in the type that accumulates; null: not wanted.
template <typename Real>
struct PolicyGradients {
  Real *hidden = nullptr, *weight = nullptr, *bias = nullptr;

  bool any() const { return hidden != nullptr || weight != nullptr || bias != nullptr; }
};

// Loss, sums and gradients, a block of rows at a time. With gradients a block's logits are kept in the workspace.
template <typename T, int Models>
class LinearPolicy {
  using Real = Accumulator<T>;

 public:
  LinearPolicy(const Head* heads, const KeptRows& kept, const PolicyOptions& options, const PolicyRows<Real>& known,
               int64_t ignore_index, int64_t workspace, const PolicyGradients<Real>& gradients)
      : heads_(heads),
        kept_(kept),
        options_(options),
        known_(known),
        ignore_index_(ignore_index),
        gradients_(gradients),
        width_(heads[0].width()) {
    int64_t widest = 0;
    for (int model = 0; model < Models; ++model) widest = std::max(widest, heads[model].width());
    tiling_ = tile_vocabulary(heads[0].vocabulary(), widest, sizeof(T), kBackwardTile<T>);
    max_rows_ = gradients.any() ? rows_in(workspace) : kMaxRows;
  }

  void run() {
    // Not a vector, which would be filled with zeros first.
    const int64_t size = tiling_.tiles() * tiling_.columns * padded_rows(std::min(max_rows_, kept_.count()));
    for (auto& logits : logits_)
      if (gradients_.any() && kept_.count() > 0) logits.reset(new Real[size]);
    if (gradients_.bias != nullptr) bias_sums_.assign(tiling_.tiles() * tiling_.columns, Real(0));
    for (int64_t first = 0; first < kept_.count(); first += max_rows_) {
      const int64_t count = std::min(max_rows_, kept_.count() - first);
      forward(first, count);
      loss += policy_block<Real>(options_, known_, kept_.rows.data() + first, count, block_, sums);
      if (gradients_.any()) backward(first, count);
    }
    if (gradients_.bias != nullptr) std::copy_n(bias_sums_.data(), tiling_.vocabulary, gradients_.bias);
    if (gradients_.weight != nullptr && kept_.count() == 0)
      std::fill_n(gradients_.weight, tiling_.vocabulary * width_, Real(0));
  }

  double loss = 0;
  PolicySums sums;

 private:
  // Blocks of nearly equal size whose logits take three quarters of the workspace at most.
  int64_t rows_in(int64_t workspace) const {
    const int64_t row_bytes = Models * tiling_.tiles() * tiling_.columns * int64_t(sizeof(Real));
    const int64_t most = std::clamp<int64_t>(workspace / 4 * 3 / row_bytes, 8, kMaxRows);
    const int64_t unit = most >= kRowBlock ? kRowBlock : padded_rows(most + 1) / 2;
    const int64_t blocks = std::max<int64_t>(1, (kept_.count() + most - 1) / most);
    return std::min(round_up((kept_.count() + blocks - 1) / blocks, unit), most / unit * unit);
  }

  void forward(int64_t first, int64_t count) {
    Real* target_logits[2] = {nullptr, nullptr};
    Real* kept_logits[Models];
    for (int model = 0; model < Models; ++model) {
      pack_hidden(heads_[model], kept_.rows.data() + first, count, hidden_storage_[model], hidden_[model]);
      target_storage_[model].resize(count);
      target_logits[model] = target_storage_[model].data();
      kept_logits[model] = logits_[model].get();
    }
    states_.resize(count * tiling_.parts);
    at::parallel_for(0, tiling_.parts, 1, [&](int64_t begin, int64_t end) {
      TileScratch<T>& own = own_scratch(kRowBlock);
      for (int64_t part = begin; part < end; ++part)
        linear_logp_fwd<T, Models>(heads_, hidden_, count, kept_.target_of(first), 1, tiling_, part, own,
                                   states_.data(), target_logits, gradients_.any() ? kept_logits : nullptr);
    });
    block_.resize(count, Models);
    places_.resize(count);
    std::iota(places_.begin(), places_.end(), 0);
    const StatsOutputs<Real> outputs = block_.outputs();
    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      write_stats<Real, Models>(states_.data(), tiling_.parts, target_logits, kept_.target_of(first), 1, ignore_index_,
                                places_.data(), begin, end, outputs);
    });
  }

  void backward(int64_t first, int64_t count) {
    const int64_t row_block = std::clamp<int64_t>(padded_rows((count + 7) / 8), 8, kRowBlock);
    const int64_t inner = round_up(count, row_block), stride = hidden_[0].stride;
    prepare_products(count, inner, row_block);
    const Upstream<Real> upstream = block_.upstream(Models, ignore_index_);
    for (int64_t index = 0; index < tiling_.tiles(); ++index) {
      const int64_t begin = index * tiling_.columns;
      const BackwardTile tile{begin, std::min(tiling_.columns, tiling_.vocabulary - begin), count, inner, row_block};
      BackwardBuffers<T> buffers[Models];
      buffers[0] = buffers_of(index, stride);
      if (gradients_.hidden != nullptr) pack_weight(tile, buffers[0]);
      at::parallel_for(0, inner / row_block, 1, [&](int64_t begin_block, int64_t end_block) {
        for (int64_t block = begin_block; block < end_block; ++block)
          one_row_block(tile, index, block * row_block, first, upstream, buffers);
        release_products<T>();
      });
      if (gradients_.bias != nullptr) linear_logp_bwd_bias(tiling_, tile, buffers[0]);
      if (gradients_.weight != nullptr) weight_gradient(tile, first > 0, buffers[0]);
    }
    if (gradients_.hidden != nullptr) {
      for (int64_t i = 0; i < count; ++i)
        std::copy_n(grad_hidden_.data() + i * stride, width_, gradients_.hidden + kept_.rows[first + i] * width_);
    }
  }

  void prepare_products(int64_t count, int64_t inner, int64_t row_block) {
    const int64_t stride = hidden_[0].stride;
    grad_logits_.resize(inner * tiling_.columns);
    if (gradients_.hidden != nullptr) {
      grad_hidden_.assign(inner * stride, Real(0));
      packed_weight_rows_.resize(Packed<T>::size(tiling_.columns, stride));
    }
    if (gradients_.bias != nullptr) bias_blocks_.resize(inner / row_block * tiling_.columns);
    if (gradients_.weight != nullptr) {
      std::vector<T>& rows = hidden_storage_[0];
      rows.resize(std::max<int64_t>(padded_rows(count), inner) * stride);
      hidden_[0].data = rows.data();
      std::fill(rows.begin() + count * stride, rows.end(), T(0));
      packed_hidden_.resize(Packed<T>::size(inner, stride));
      pack_rows<T>(0, inner, rows.data(), stride, {packed_hidden_.data(), inner, stride});
    }
  }

  BackwardBuffers<T> buffers_of(int64_t tile_index, int64_t stride) {
    BackwardBuffers<T> buffers;
    buffers.hidden = {stride, hidden_[0].data};
    buffers.grad_logits = grad_logits_.data();
    if (gradients_.hidden != nullptr) {
      buffers.packed_weight_rows = packed_weight_rows_.data();
      buffers.grad_hidden = grad_hidden_.data();
    }
    if (gradients_.weight != nullptr) buffers.grad_weight = gradients_.weight;
    if (gradients_.bias != nullptr) {
      buffers.grad_bias = bias_sums_.data() + tile_index * tiling_.columns;
      buffers.grad_bias_blocks = bias_blocks_.data();
    }
    return buffers;
  }

  void pack_weight(const BackwardTile& tile, const BackwardBuffers<T>& buffers) {
    at::parallel_for(0, tiling_.columns / kColumnBlock, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        pack_backward_weight(heads_[0], tiling_, tile, block * kColumnBlock, own_scratch(tile.row_block), buffers);
    });
  }

  void one_row_block(const BackwardTile& tile, int64_t tile_index, int64_t row, int64_t first,
                     const Upstream<Real>& upstream, const BackwardBuffers<T>* buffers) {
    const Real* logits[Models];
    for (int model = 0; model < Models; ++model)
      logits[model] = logits_[model].get() + (tile_index * padded_rows(tile.count) + row) * tiling_.columns;
    linear_logp_bwd_logits<T, Models>(heads_, tiling_, tile, row, places_.data(), kept_.target_of(first), upstream,
                                      logits, own_scratch(tile.row_block), buffers);
  }

  void weight_gradient(const BackwardTile& tile, bool accumulate, const BackwardBuffers<T>& buffers) {
    at::parallel_for(0, round_up(tile.width, kColumnBlock) / kColumnBlock, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        add_weight_gradient<T>(tiling_, tile, block * kColumnBlock, std::min(tile.width, (block + 1) * kColumnBlock),
                               width_, accumulate, buffers, packed_hidden_.data(), transposed_.own(),
                               gradients_.weight + tile.begin * width_);
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
  const PolicyOptions& options_;
  const PolicyRows<Real>& known_;
  const int64_t ignore_index_;
  const PolicyGradients<Real> gradients_;
  const int64_t width_;
  Tiling tiling_;
  int64_t max_rows_;
  PerThread<TileScratch<T>> scratch_;
  PerThread<std::vector<T>> transposed_;
  std::unique_ptr<Real[]> logits_[Models];
  // Of the block of rows at work:
  PackedRows<T> hidden_[Models];
  std::vector<T> hidden_storage_[Models], grad_logits_;
  PackedStorage<T> packed_hidden_, packed_weight_rows_;
  std::vector<Real> target_storage_[Models], grad_hidden_, bias_blocks_, bias_sums_;
  std::vector<State<Real, Models>> states_;
  std::vector<int64_t> places_;
  PolicyBlock<Real> block_;
};

// The rows of the schema, kept alive.
template <typename Real>
struct OwnedPolicyRows {
  Values<Real> old_logp, advantage, scale, score, ref_logp, token_weight;

  OwnedPolicyRows(int64_t rows, const Tensor& old_logp_, const Tensor& advantage_, const Tensor& scale_,
                  const OptionalTensor& score_, const OptionalTensor& ref_logp_, const OptionalTensor& token_weight_)
      : old_logp(old_logp_, {rows}, "old_logp"),
        advantage(advantage_, {rows}, "advantage"),
        scale(scale_, {rows}, "scale"),
        score(score_, {rows}, "score"),
        ref_logp(ref_logp_, {rows}, "ref_logp"),
        token_weight(token_weight_, {rows}, "token_weight") {}

  PolicyRows<Real> get() const {
    return {old_logp.get(), advantage.get(), scale.get(), score.get(), ref_logp.get(), token_weight.get()};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_policy_loss_fwd_cpu(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    const OptionalTensor& base_hidden, const OptionalTensor& base_weight, const OptionalTensor& base_bias,
    const Tensor& old_logp, const Tensor& advantage, const Tensor& scale, const OptionalTensor& score,
    const OptionalTensor& ref_logp, const OptionalTensor& token_weight, const std::vector<std::string>& choices,
    at::ArrayRef<double> numbers, double temperature, std::optional<double> softcap, std::optional<double> base_softcap,
    double logit_scale, double base_logit_scale, int64_t ignore_index, std::array<bool, 3> output_mask,
    int64_t workspace) {
  const PolicyOptions options = policy_options(choices, numbers);
  TORCH_CHECK_VALUE(options.importance == PolicyImportance::kToken, "importance is '", choices[3],
                    "', expected 'token'");
  TORCH_CHECK_VALUE(options.reweight != PolicyReweight::kPerplexity || score.has_value(),
                    "score is missing, expected [N] for reweight 'ppl'");
  TORCH_CHECK_VALUE(base_hidden.has_value() == base_weight.has_value(),
                    "base_hidden and base_weight are expected together");
  TORCH_CHECK_VALUE(target.dim() == 2 && target.size(1) == 1, "target has shape ", target.sizes(), ", expected [N, 1]");
  const Layer model(hidden, weight, bias, temperature, softcap, logit_scale);
  std::optional<Layer> base;
  if (base_hidden.has_value()) {
    base.emplace(*base_hidden, *base_weight, base_bias, temperature, base_softcap, base_logit_scale, kBaseNames);
    check_pair(model, *base);
  }
  const int64_t rows = model.head.hidden.rows;
  const KeptRows kept = keep_rows(target, rows, weight.size(0), ignore_index);
  const Head heads[2] = {model.head, base.has_value() ? base->head : model.head};
  const int models = base.has_value() ? 2 : 1;
  const bool use_double = is_double(heads[0]) || is_double(heads[1]) || scale.scalar_type() == at::kDouble;
  const auto like = at::TensorOptions().dtype(use_double ? at::kDouble : at::kFloat);
  const auto allocate = [&](at::IntArrayRef sizes, bool wanted, bool zero) {
    return zero ? at::zeros(wanted ? sizes : at::IntArrayRef{0}, like)
                : at::empty(wanted ? sizes : at::IntArrayRef{0}, like);
  };
  const Tensor loss = at::empty({}, like), metrics = at::empty({kPolicyMetrics}, like);
  // Rows that do not count have no gradient.
  const Tensor grad_hidden = allocate(hidden.sizes(), output_mask[0], true);
  const Tensor grad_weight = allocate(weight.sizes(), output_mask[1], false);
  const Tensor grad_bias = allocate({weight.size(0)}, output_mask[2] && bias.has_value(), false);
  const auto run = [&](auto type, auto number) {
    using T = decltype(type);
    using Real = Accumulator<T>;
    constexpr int kModels = decltype(number)::value;
    const OwnedPolicyRows<Real> owned(rows, old_logp, advantage, scale, score, ref_logp, token_weight);
    const auto pointer = [](const Tensor& x, bool wanted) {
      return wanted ? x.template mutable_data_ptr<Real>() : nullptr;
    };
    const PolicyGradients<Real> gradients = {pointer(grad_hidden, output_mask[0]), pointer(grad_weight, output_mask[1]),
                                             pointer(grad_bias, output_mask[2] && bias.has_value())};
    const PolicyRows<Real> known = owned.get();
    LinearPolicy<T, kModels> policy(heads, kept, options, known, ignore_index, workspace, gradients);
    policy.run();
    *loss.mutable_data_ptr<Real>() = Real(policy.loss);
    write_metrics<Real>(policy.sums, metrics);
  };
  const auto with_models = [&](auto type) {
    models == 1 ? run(type, std::integral_constant<int, 1>()) : run(type, std::integral_constant<int, 2>());
  };
  if (use_double)
    with_models(double());
  else
    with_product_type(heads, models, with_models);
  return {loss, metrics, grad_hidden, grad_weight, grad_bias};
}

// gradient · factor, in `dtype`; empty unless wanted.
Tensor scaled(const Tensor& gradient, double factor, at::ScalarType dtype, bool wanted) {
  const at::TensorOptions options = gradient.options().dtype(dtype);
  if (!wanted) return at::empty({0}, options);
  const Tensor result = at::empty(gradient.sizes(), options);
  const Tensor from = checked(gradient, "a gradient").contiguous();
  if (result.numel() == 0) return result;
  const Output output{result.mutable_data_ptr(), dtype_of(result), 0};
  const auto run = [&](auto type) {
    using Real = decltype(type);
    const Real* values = from.const_data_ptr<Real>();
    at::parallel_for(0, from.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      constexpr int64_t kPiece = 1024;
      Real piece[kPiece];
      for (int64_t i = begin; i < end; i += kPiece) {
        const int64_t count = std::min(kPiece, end - i);
        for (int64_t j = 0; j < count; ++j) piece[j] = values[i + j] * Real(factor);
        write_row(output, 0, i, count, piece);
      }
    });
  };
  gradient.scalar_type() == at::kDouble ? run(double()) : run(float());
  return result;
}

std::tuple<Tensor, Tensor, Tensor> linear_policy_loss_bwd_cpu(const Tensor& grad_loss, const Tensor& grad_hidden,
                                                              const Tensor& grad_weight, const Tensor& grad_bias,
                                                              at::ScalarType hidden_dtype, at::ScalarType weight_dtype,
                                                              at::ScalarType bias_dtype,
                                                              std::array<bool, 3> output_mask, int64_t workspace) {
  const double factor = checked(grad_loss, "grad_loss").item<double>();
  for (const Tensor* x : {&grad_hidden, &grad_weight, &grad_bias})
    TORCH_CHECK_TYPE(x->scalar_type() == at::kFloat || x->scalar_type() == at::kDouble, "a gradient has dtype ",
                     x->scalar_type(), ", expected float32 or float64");
  return {scaled(grad_hidden, factor, hidden_dtype, output_mask[0]),
          scaled(grad_weight, factor, weight_dtype, output_mask[1]),
          scaled(grad_bias, factor, bias_dtype, output_mask[2])};
}

}  // namespace
}  // namespace dlogp

TORCH_LIBRARY_IMPL(dlogp, CPU, library) {
  library.impl("_cpu_linear_policy_loss_fwd", &dlogp::linear_policy_loss_fwd_cpu);
  library.impl("_cpu_linear_policy_loss_bwd", &dlogp::linear_policy_loss_bwd_cpu);
}
