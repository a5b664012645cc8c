// Models' last layers as the linear ops pass them, checked and as the kernels take them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <optional>

#include "../csrc/cpu/linear_tile.h"
#include "checks.h"

namespace dlogp {

// A Transform as a schema has it, `float[]`: (temperature, softcap, logit_scale), 0 for no softcap.
inline LogitTransform transform_of(at::ArrayRef<double> flat) {
  TORCH_CHECK_VALUE(flat.size() == 3, "a transform has ", flat.size(), " numbers, expected 3");
  return {.logit_scale = flat[2], .softcap = flat[1], .temperature = flat[0]};
}

// The arguments of a schema that make a head.
struct HeadArguments {
  const at::Tensor &hidden, &weight;
  const std::optional<at::Tensor>& bias;
  LogitTransform transform;
};

// A head, or a pair of them: the model's, then its base's.
template <int Models>
class CheckedHeads {
 public:
  Head heads[Models];

  explicit CheckedHeads(const std::array<HeadArguments, Models>& given) {
    constexpr const char* names[2][3] = {{"hidden", "weight", "bias"}, {"base_hidden", "base_weight", "base_bias"}};
    for (int model = 0; model < Models; ++model) {
      const auto& [hidden, weight, bias, transform] = given[model];
      const auto& [hidden_name, weight_name, bias_name] = names[model];
      rows_[model] = Rows(hidden, hidden_name);
      heads[model] = {rows_[model].matrix, matrix_of(weight, weight_name), row_of(bias, weight.size(0), bias_name),
                      transform};
      const Head& head = heads[model];
      TORCH_CHECK_VALUE(head.hidden.columns == head.weight.columns && head.weight.rows > 0 && head.weight.columns > 0,
                        weight_name, " has shape ", weight.sizes(), ", expected [V, ", head.hidden.columns, "]");
      check_rows(head.hidden, rows(), hidden_name);
      check_rows(head.weight, vocabulary(), weight_name);
    }
  }

  int64_t rows() const { return heads[0].hidden.rows; }
  int64_t vocabulary() const { return heads[0].vocabulary(); }
  bool any_double() const {
    return std::any_of(heads, heads + Models, [](const Head& x) {
      return x.hidden.dtype == Dtype::kDouble || x.weight.dtype == Dtype::kDouble ||
             (x.bias.data != nullptr && x.bias.dtype == Dtype::kDouble);
    });
  }

  // Calls `use` with a value of the type in which the heads' products are computed.
  template <typename Use>
  void dispatch_product(bool use_double, Use use) const {
    const bool all_bfloat16 = std::all_of(heads, heads + Models, [](const Head& x) {
      return x.hidden.dtype == Dtype::kBFloat16 && x.weight.dtype == Dtype::kBFloat16;
    });
    if (use_double) {
      use(double());
    } else if (all_bfloat16 && multiplies_bfloat16()) {
      use(c10::BFloat16());
    } else {
      use(float());
    }
  }

 private:
  Rows rows_[Models];
};

}  // namespace dlogp
