// linear_logp, linear_delta_logp, logp and delta_logp on the CPU, as implementations of the private schemas `_cpu_*`.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <Python.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "../csrc/cpu/linear_backward.h"
#include "../csrc/cpu/linear_forward.h"
#include "../csrc/cpu/logp.h"
#include "checks.h"
#include "heads.h"

namespace dlogp {

void register_statistics(torch::Library& library);
void register_policy(torch::Library& library);
void register_sampling(torch::Library& library);

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct LogitsArguments {
  const Tensor& logits;
  LogitTransform transform;
};

struct TargetArguments {
  const Tensor& target;
  int64_t ignore_index;
  bool top = false;  // whether forward is asked for the most likely token
};

// Upstream gradients of a model's statistics, and its entropy.
struct ModelArguments {
  const OptionalTensor &grad_logp, &grad_entropy, &grad_lse;
  const Tensor& entropy;
};

// What backward is given of one model's statistics, or of a pair's.
template <int Models>
struct UpstreamArguments {
  ModelArguments models[Models];
  const Tensor& extra;
  OptionalTensor grad_kl, grad_reverse_kl, kl, reverse_kl;
};

// Which gradients of a head are wanted: of hidden, weight and bias.
using HeadMask = std::array<bool, 3>;

// Outputs of forward, zero, of tokens −1, where a row is ignored; `extra` has no rows for what is not asked for.
template <int Models>
class Stats {
 public:
  Stats(const TargetArguments& targets, bool is_double) {
    const Tensor& target = targets.target;
    const auto options = target.options().dtype(is_double ? at::kDouble : at::kFloat);
    auto tensor = tensors_.begin();
#define DLOGP_PER_TARGET(name, value) *tensor++ = at::zeros(target.sizes(), options);
#define DLOGP_PER_ROW(name, value) *tensor++ = at::zeros(target.sizes().slice(0, 1), options);
    DLOGP_STATS(Models, DLOGP_PER_TARGET, DLOGP_PER_ROW, DLOGP_NOTHING, DLOGP_NOTHING)
#undef DLOGP_PER_TARGET
#undef DLOGP_PER_ROW
    constexpr int64_t on_demand = 2 * Models;
    *tensor = at::zeros({targets.top ? 2 * on_demand : on_demand, target.size(0)}, options);
    if (targets.top) tensor->slice(0, on_demand, std::nullopt, 2).fill_(-1);  // every other one is a token
  }

  template <typename Acc>
  StatsOutputs<Acc> outputs() const {
    StatsOutputs<Acc> outputs;
    auto tensor = tensors_.begin();
#define DLOGP_POINTER(name, value) outputs.name = (tensor++)->template mutable_data_ptr<Acc>();
    DLOGP_STATS(Models, DLOGP_POINTER, DLOGP_POINTER, DLOGP_NOTHING, DLOGP_NOTHING)
#undef DLOGP_POINTER
    const int64_t rows = tensor->size(1);
    Acc* row = tensor->template mutable_data_ptr<Acc>();
    const Acc* end = row + tensor->numel();
#define DLOGP_EXTRA(name, value) outputs.name = std::exchange(row, row + rows);
#define DLOGP_ON_DEMAND(name, value) \
  if (row != end) outputs.name = std::exchange(row, row + rows);
    DLOGP_STATS(Models, DLOGP_NOTHING, DLOGP_NOTHING, DLOGP_EXTRA, DLOGP_ON_DEMAND)
#undef DLOGP_EXTRA
#undef DLOGP_ON_DEMAND
    return outputs;
  }

  auto all() const {
    return std::apply([](const auto&... tensors) { return std::make_tuple(tensors...); }, tensors_);
  }

 private:
#define DLOGP_ONE(name, value) +1
  static constexpr size_t kCount = Models == 1
                                       ? 1 DLOGP_LOGP_STATS(DLOGP_ONE, DLOGP_ONE, DLOGP_NOTHING, DLOGP_NOTHING)
                                       : 1 DLOGP_DELTA_LOGP_STATS(DLOGP_ONE, DLOGP_ONE, DLOGP_NOTHING, DLOGP_NOTHING);
#undef DLOGP_ONE
  std::array<Tensor, kCount> tensors_;
};

// The gradients of a head, hidden zero where a row is ignored, all zero where every one is; empty where not wanted.
struct HeadGradients {
  Tensor hidden, weight, bias;

  HeadGradients(const HeadArguments& like, const HeadMask& wanted, bool any_row)
      : hidden(allocate(like.hidden, wanted[0], true)),
        weight(allocate(like.weight, wanted[1], !any_row)),
        bias(allocate(like.bias.value_or(like.hidden), wanted[2] && like.bias.has_value(), !any_row)) {}

  HeadOutputs outputs() const {
    return {output_of(hidden, hidden.size(-1)), output_of(weight, weight.size(-1)), output_of(bias, bias.size(-1))};
  }

 private:
  static Tensor allocate(const Tensor& like, bool wanted, bool zero) {
    const at::IntArrayRef sizes = sizes_if(wanted, like.sizes());
    return zero ? at::zeros(sizes, like.options()) : at::empty(sizes, like.options());
  }
};

// Upstream gradients of a model's statistics and its entropy, kept alive.
template <typename Acc>
struct ModelValues {
  Values<Acc> grad_logp, grad_entropy, grad_lse, entropy;

  ModelValues(const Tensor& target, const ModelArguments& given)
      : grad_logp(given.grad_logp, target.sizes(), "grad_logp"),
        grad_entropy(given.grad_entropy, target.sizes().slice(0, 1), "grad_entropy"),
        grad_lse(given.grad_lse, target.sizes().slice(0, 1), "grad_lse"),
        entropy(given.entropy, target.sizes().slice(0, 1), "entropy") {}
};

// Calls use(upstream), which it keeps alive meanwhile.
template <typename Acc, int Models, typename Use>
void with_upstream(const Tensor& target, const UpstreamArguments<Models>& given, const KeptRows& kept, Use use) {
  const at::IntArrayRef rows = target.sizes().slice(0, 1);
  const Values<Acc> grad_kl(given.grad_kl, rows, "grad_kl"),
      grad_reverse_kl(given.grad_reverse_kl, rows, "grad_reverse_kl");
  const Values<Acc> kl(given.kl, rows, "kl"), reverse_kl(given.reverse_kl, rows, "reverse_kl");
  // What is on demand may follow the normalizers.
  const int64_t normalizers = 2 * Models;
  const bool with_more = given.extra.dim() == 2 && given.extra.size(0) == 2 * normalizers;
  const Values<Acc> extra(given.extra, {with_more ? 2 * normalizers : normalizers, rows[0]}, "extra");
  Upstream<Acc> upstream = {
      {}, grad_kl.get(), grad_reverse_kl.get(), kl.get(), reverse_kl.get(), kept.candidates, kept.ignore_index};
  std::vector<ModelValues<Acc>> values;
  for (int model = 0; model < Models; ++model) {
    const auto& own = values.emplace_back(target, given.models[model]);
    const Acc* normalizer = extra.get() + 2 * model * rows[0];
    upstream.models[model] = {own.grad_logp.get(), own.grad_entropy.get(), own.grad_lse.get(), own.entropy.get(),
                              normalizer,          normalizer + rows[0]};
  }
  use(upstream);
}

template <int Models>
auto linear_statistics(const std::array<HeadArguments, Models>& given, const TargetArguments& targets,
                       int64_t workspace) {
  const CheckedHeads<Models> heads(given);
  KeptRows kept = keep_rows(targets.target, heads.rows(), heads.vocabulary(), targets.ignore_index);
  kept.with_top = targets.top;
  const Stats<Models> stats(targets, heads.any_double());
  heads.dispatch_product(heads.any_double(), [&](auto type) {
    using T = decltype(type);
    linear_forward<T, Models>(heads.heads, kept, workspace, stats.template outputs<Accumulator<T>>());
  });
  return stats.all();
}

template <int Models>
std::vector<HeadGradients> linear_gradients(const UpstreamArguments<Models>& upstream,
                                            const std::array<HeadArguments, Models>& given,
                                            const TargetArguments& targets, const std::array<HeadMask, Models>& wanted,
                                            int64_t workspace) {
  const CheckedHeads<Models> heads(given);
  const KeptRows kept = keep_rows(targets.target, heads.rows(), heads.vocabulary(), targets.ignore_index);
  std::vector<HeadGradients> gradients;
  HeadOutputs outputs[Models];
  for (int model = 0; model < Models; ++model) {
    gradients.emplace_back(given[model], wanted[model], kept.count() > 0);
    outputs[model] = gradients.back().outputs();
  }
  heads.dispatch_product(heads.any_double(), [&](auto type) {
    using T = decltype(type);
    with_upstream<Accumulator<T>>(targets.target, upstream, kept, [&](const Upstream<Accumulator<T>>& values) {
      linear_backward<T, Models>(heads.heads, kept, values, workspace, outputs);
    });
  });
  return gradients;
}

// Given logits as the kernels take them: of a model, or of a pair.
template <int Models>
class CheckedLogits {
 public:
  Logits logits[Models];
  bool use_double = false;

  explicit CheckedLogits(const std::array<LogitsArguments, Models>& given) {
    constexpr const char* names[] = {"logits", "base_logits"};
    for (int model = 0; model < Models; ++model) {
      const Tensor& values = given[model].logits;
      TORCH_CHECK_VALUE(values.sizes() == given[0].logits.sizes(), names[model], " has shape ", values.sizes(),
                        ", expected ", given[0].logits.sizes());
      rows_[model] = Rows(values, names[model]);
      logits[model] = {rows_[model].matrix, given[model].transform};
      use_double |= values.scalar_type() == at::kDouble;
      TORCH_CHECK_VALUE(columns() > 0, names[model], " has no columns, expected the vocabulary");
    }
  }

  int64_t rows() const { return logits[0].values.rows; }
  int64_t columns() const { return logits[0].values.columns; }

 private:
  Rows rows_[Models];
};

template <int Models>
auto logits_statistics(const std::array<LogitsArguments, Models>& given, const TargetArguments& targets) {
  const CheckedLogits<Models> checked(given);
  KeptRows kept = keep_rows(targets.target, checked.rows(), checked.columns(), targets.ignore_index);
  kept.with_top = targets.top;
  const Stats<Models> stats(targets, checked.use_double);
  dispatch_accumulator(checked.use_double, [&](auto type) {
    using Acc = decltype(type);
    logp_forward<Acc, Models>(checked.logits, kept, stats.template outputs<Acc>());
  });
  return stats.all();
}

template <int Models>
std::array<Tensor, Models> logits_gradients(const UpstreamArguments<Models>& upstream,
                                            const std::array<LogitsArguments, Models>& given,
                                            const TargetArguments& targets, const std::array<bool, Models>& wanted) {
  const CheckedLogits<Models> checked(given);
  const KeptRows kept = keep_rows(targets.target, checked.rows(), checked.columns(), targets.ignore_index);
  std::array<Tensor, Models> gradients;
  Output outputs[Models];
  for (int model = 0; model < Models; ++model) {
    const Tensor& like = given[model].logits;
    const at::IntArrayRef sizes = sizes_if(wanted[model], like.sizes());
    gradients[model] =
        kept.count() == checked.rows() ? at::empty(sizes, like.options()) : at::zeros(sizes, like.options());
    outputs[model] = output_of(gradients[model], checked.columns());
  }
  dispatch_accumulator(checked.use_double, [&](auto type) {
    using Acc = decltype(type);
    with_upstream<Acc>(targets.target, upstream, kept, [&](const Upstream<Acc>& values) {
      logp_backward<Acc, Models>(checked.logits, kept, values, outputs);
    });
  });
  return gradients;
}

// From here on: the order of the schemas' arguments (inputs.py), put into the structures above.

auto linear_logp_fwd(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                     at::ArrayRef<double> transform, const Tensor& target, int64_t ignore_index, bool top,
                     int64_t workspace) {
  return linear_statistics<1>({{{hidden, weight, bias, transform_of(transform)}}}, {target, ignore_index, top},
                              workspace);
}

std::tuple<Tensor, Tensor, Tensor> linear_logp_bwd(const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy,
                                                   const OptionalTensor& grad_lse, const Tensor& hidden,
                                                   const Tensor& weight, const OptionalTensor& bias,
                                                   at::ArrayRef<double> transform, const Tensor& target,
                                                   int64_t ignore_index, const Tensor& entropy, const Tensor& extra,
                                                   std::array<bool, 3> output_mask, int64_t workspace) {
  const auto found = linear_gradients<1>({{{grad_logp, grad_entropy, grad_lse, entropy}}, extra},
                                         {{{hidden, weight, bias, transform_of(transform)}}}, {target, ignore_index},
                                         {output_mask}, workspace);
  return {found[0].hidden, found[0].weight, found[0].bias};
}

auto linear_delta_logp_fwd(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                           at::ArrayRef<double> transform, const Tensor& base_hidden, const Tensor& base_weight,
                           const OptionalTensor& base_bias, at::ArrayRef<double> base_transform, const Tensor& target,
                           int64_t ignore_index, bool top, int64_t workspace) {
  return linear_statistics<2>({{{hidden, weight, bias, transform_of(transform)},
                                {base_hidden, base_weight, base_bias, transform_of(base_transform)}}},
                              {target, ignore_index, top}, workspace);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_delta_logp_bwd(
    const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
    const OptionalTensor& grad_base_logp, const OptionalTensor& grad_base_entropy, const OptionalTensor& grad_base_lse,
    const OptionalTensor& grad_kl, const OptionalTensor& grad_reverse_kl, const Tensor& hidden, const Tensor& weight,
    const OptionalTensor& bias, at::ArrayRef<double> transform, const Tensor& base_hidden, const Tensor& base_weight,
    const OptionalTensor& base_bias, at::ArrayRef<double> base_transform, const Tensor& target, int64_t ignore_index,
    const Tensor& entropy, const Tensor& base_entropy, const Tensor& kl, const Tensor& reverse_kl, const Tensor& extra,
    std::array<bool, 6> output_mask, int64_t workspace) {
  const auto& wanted = output_mask;
  const auto found = linear_gradients<2>(
      {{{grad_logp, grad_entropy, grad_lse, entropy}, {grad_base_logp, grad_base_entropy, grad_base_lse, base_entropy}},
       extra,
       grad_kl,
       grad_reverse_kl,
       kl,
       reverse_kl},
      {{{hidden, weight, bias, transform_of(transform)},
        {base_hidden, base_weight, base_bias, transform_of(base_transform)}}},
      {target, ignore_index}, {{{wanted[0], wanted[1], wanted[2]}, {wanted[3], wanted[4], wanted[5]}}}, workspace);
  return {found[0].hidden, found[0].weight, found[0].bias, found[1].hidden, found[1].weight, found[1].bias};
}

auto logp_fwd(const Tensor& logits, at::ArrayRef<double> transform, const Tensor& target, int64_t ignore_index,
              bool top, int64_t workspace) {
  return logits_statistics<1>({{{logits, transform_of(transform)}}}, {target, ignore_index, top});
}

Tensor logp_bwd(const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
                const Tensor& logits, at::ArrayRef<double> transform, const Tensor& target, int64_t ignore_index,
                const Tensor& entropy, const Tensor& extra, std::array<bool, 1> output_mask, int64_t workspace) {
  return logits_gradients<1>({{{grad_logp, grad_entropy, grad_lse, entropy}}, extra},
                             {{{logits, transform_of(transform)}}}, {target, ignore_index}, output_mask)[0];
}

auto delta_logp_fwd(const Tensor& logits, at::ArrayRef<double> transform, const Tensor& base_logits,
                    at::ArrayRef<double> base_transform, const Tensor& target, int64_t ignore_index, bool top,
                    int64_t workspace) {
  return logits_statistics<2>({{{logits, transform_of(transform)}, {base_logits, transform_of(base_transform)}}},
                              {target, ignore_index, top});
}

std::tuple<Tensor, Tensor> delta_logp_bwd(const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy,
                                          const OptionalTensor& grad_lse, const OptionalTensor& grad_base_logp,
                                          const OptionalTensor& grad_base_entropy, const OptionalTensor& grad_base_lse,
                                          const OptionalTensor& grad_kl, const OptionalTensor& grad_reverse_kl,
                                          const Tensor& logits, at::ArrayRef<double> transform,
                                          const Tensor& base_logits, at::ArrayRef<double> base_transform,
                                          const Tensor& target, int64_t ignore_index, const Tensor& entropy,
                                          const Tensor& base_entropy, const Tensor& kl, const Tensor& reverse_kl,
                                          const Tensor& extra, std::array<bool, 2> output_mask, int64_t workspace) {
  const auto found = logits_gradients<2>(
      {{{grad_logp, grad_entropy, grad_lse, entropy}, {grad_base_logp, grad_base_entropy, grad_base_lse, base_entropy}},
       extra,
       grad_kl,
       grad_reverse_kl,
       kl,
       reverse_kl},
      {{{logits, transform_of(transform)}, {base_logits, transform_of(base_transform)}}}, {target, ignore_index},
      output_mask);
  return {found[0], found[1]};
}

}  // namespace

void register_statistics(torch::Library& library) {
  library.impl("_cpu_linear_logp_fwd", &linear_logp_fwd);
  library.impl("_cpu_linear_logp_bwd", &linear_logp_bwd);
  library.impl("_cpu_linear_delta_logp_fwd", &linear_delta_logp_fwd);
  library.impl("_cpu_linear_delta_logp_bwd", &linear_delta_logp_bwd);
  library.impl("_cpu_logp_fwd", &logp_fwd);
  library.impl("_cpu_logp_bwd", &logp_bwd);
  library.impl("_cpu_delta_logp_fwd", &delta_logp_fwd);
  library.impl("_cpu_delta_logp_bwd", &delta_logp_bwd);
}

}  // namespace dlogp

// Importing the module registers the ops; it has no contents of its own. Those that were built for other schemas than
// Python's are an ImportError.
PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  static std::unique_ptr<torch::Library> registered;
  try {
    registered =
        std::make_unique<torch::Library>(torch::Library::IMPL, "dlogp", c10::DispatchKey::CPU, __FILE__, __LINE__);
    for (auto add : {dlogp::register_statistics, dlogp::register_policy, dlogp::register_sampling}) add(*registered);
  } catch (const c10::Error& error) {
    registered.reset();
    PyErr_SetString(PyExc_ImportError, error.what_without_backtrace());
    return nullptr;
  }
  return PyModule_Create(&module);
}
