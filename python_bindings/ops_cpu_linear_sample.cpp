#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>

#include "../csrc/cpu/linear_extrapolated_sample.h"
#include "checks.h"
#include "layers.h"
#include "samples.h"

namespace dlogp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows of both models in blocks that the workspace holds; the vocabulary is shared out among the threads.
template <typename T>
void sample_rows(const Head* heads, const Identities& identities, const SampleOptions& options, int64_t workspace,
                 const SampleOutputs& outputs) {
  using Real = Accumulator<T>;
  const int64_t width = heads[0].width() + heads[1].width(), all = heads[0].hidden.rows;
  const Tiling tiling = tile_vocabulary(heads[0].vocabulary(), width, sizeof(T));
  const int64_t threads = thread_slots();
  const int64_t row_bytes = width * int64_t(sizeof(T)) + tiling.parts * int64_t(sizeof(PairState<Real>)) +
                            threads * int64_t(sizeof(RowDraws<Real>));
  const int64_t max_rows = std::clamp(workspace / 8 / row_bytes / kRowBlock * kRowBlock, kRowBlock, kMaxRows);

  PerThread<DrawScratch<T>> scratch;
  PackedHidden<T> hidden[2];
  std::vector<RowNoise> noise(std::min(max_rows, all));
  std::vector<PairState<Real>> states(noise.size() * tiling.parts);
  std::vector<RowDraws<Real>> draws;
  for (int64_t first = 0; first < all; first += max_rows) {
    const int64_t count = std::min(max_rows, all - first);
    for (int64_t i = 0; i < count; ++i) noise[i] = identities.of(first + i);
    for (int model = 0; model < 2; ++model) pack_hidden(heads[model].hidden, first, count, hidden[model]);
    draws.assign(threads * count, {});
    at::parallel_for(0, tiling.parts, 1, [&](int64_t begin, int64_t end) {
      const int64_t thread = own_slot(threads);
      for (int64_t part = begin; part < end; ++part)
        linear_extrapolated_sample(heads, hidden, noise.data(), options, tiling, part, scratch.own(), states.data(),
                                   draws.data() + thread * count);
    });
    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        outputs.set(first + i, finish_sample(states.data() + i * tiling.parts, tiling.parts, draws.data() + i, threads,
                                             count, noise[i], options));
    });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_extrapolated_sample_cpu(
    const Tensor& hidden, const Tensor& weight, const Tensor& base_hidden, const Tensor& base_weight,
    const OptionalTensor& bias, const OptionalTensor& base_bias, std::optional<double> softcap,
    std::optional<double> base_softcap, double logit_scale, double base_logit_scale, const OptionalTensor& row_id,
    int64_t seed, int64_t step, const OptionalTensor& seed_tensor, const OptionalTensor& step_tensor, double gamma,
    std::string_view criterion, std::optional<double> threshold, std::string_view draft, double temperature,
    int64_t top_k, double top_p, double min_p, int64_t workspace) {
  const Layer model(hidden, weight, bias, 1, softcap, logit_scale);
  const Layer base(base_hidden, base_weight, base_bias, 1, base_softcap, base_logit_scale, kBaseNames);
  check_pair(model, base);
  const Head heads[2] = {model.head, base.head};
  const int64_t count = model.head.hidden.rows;
  const Identities identities = identities_of(row_id, step, step_tensor, count);
  const SampleOptions options =
      sample_options(seed, seed_tensor, gamma, criterion, threshold, draft, temperature, {top_k, top_p, min_p});
  TORCH_CHECK_VALUE(temperature == 0 || !options.filters.any(weight.size(0)),
                    "top_k, top_p and min_p need a row of logits, which eager/sampling.py forms");
  const SampleOutputs outputs(count, is_double(heads[0]) || is_double(heads[1]) ? at::kDouble : at::kFloat);
  with_product_type(heads, 2,
                    [&](auto type) { sample_rows<decltype(type)>(heads, identities, options, workspace, outputs); });
  return outputs.all();
}

}  // namespace
}  // namespace dlogp

TORCH_LIBRARY_IMPL(dlogp, CPU, library) {
  library.impl("_cpu_linear_extrapolated_sample", &dlogp::linear_extrapolated_sample_cpu);
}
