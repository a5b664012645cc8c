// The last layers of the linear ops as their kernels take them: checks, the type of the products, packed hidden states.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../csrc/cpu/linear_logp.h"
#include "checks.h"

namespace dlogp {

// Rows that a pass through the vocabulary takes at most.
constexpr int64_t kMaxRows = 1024;

// Of arguments, for errors.
struct LayerNames {
  const char *hidden = "hidden", *weight = "weight", *bias = "bias";
};
constexpr LayerNames kBaseNames = {"base_hidden", "base_weight", "base_bias"};

// One model's last layer as the kernels take it.
struct Layer {
  Rows hidden;
  Head head;

  Layer(const at::Tensor& hidden_states, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
        double temperature, std::optional<double> softcap, double logit_scale, const LayerNames& names = {})
      : hidden(hidden_states, names.hidden),
        head{hidden.matrix,
             matrix_of(weight, names.weight),
             row_of(bias, weight.size(0), names.bias),
             {logit_scale, softcap.value_or(0), temperature}} {
    TORCH_CHECK_VALUE(head.hidden.columns == head.weight.columns && head.weight.rows > 0 && head.weight.columns > 0,
                      names.weight, " has shape ", weight.sizes(), ", expected [V, ", head.hidden.columns, "]");
  }
};

inline void check_pair(const Layer& model, const Layer& base) {
  check_rows(base.head.hidden, model.head.hidden.rows, "base_hidden");
  check_rows(base.head.weight, model.head.weight.rows, "base_weight");
}

inline bool is_double(const Head& head) {
  return head.hidden.dtype == Dtype::kDouble || head.weight.dtype == Dtype::kDouble ||
         (head.bias.data != nullptr && head.bias.dtype == Dtype::kDouble);
}

inline bool is_bfloat16(const Head& head) {
  return head.hidden.dtype == Dtype::kBFloat16 && head.weight.dtype == Dtype::kBFloat16;
}

// Calls `use` with a value of the type in which the heads' products are computed.
template <typename Use>
void with_product_type(const Head* heads, int models, Use use) {
  const auto any = [&](bool (*property)(const Head&)) { return std::any_of(heads, heads + models, property); };
  const auto all = [&](bool (*property)(const Head&)) { return std::all_of(heads, heads + models, property); };
  if (any(is_double)) {
    use(double());
  } else if (all(is_bfloat16) && multiplies_bfloat16()) {
    use(c10::BFloat16());
  } else {
    use(float());
  }
}

// Room for every thread that may take part, also where the op is called within a parallel region. The first
// parallel_for of a thread sets the number of its threads, which torch::set_num_threads may have changed elsewhere, so
// that is done before they are counted.
inline int64_t thread_slots() {
  at::internal::lazy_init_num_threads();
  return std::max(at::get_num_threads(), at::get_thread_num() + 1);
}

// That of the calling thread, out of `slots`.
inline int64_t own_slot(int64_t slots) {
  const int64_t slot = at::get_thread_num();
  TORCH_CHECK(slot < slots, "thread ", slot, " takes part, expected less than ", slots, " threads");
  return slot;
}

// One for each thread.
template <typename T>
class PerThread {
 public:
  T& own() { return slots_[own_slot(int64_t(slots_.size()))]; }

 private:
  std::vector<T> slots_ = std::vector<T>(thread_slots());
};

template <typename T>
void pack_hidden(const Head& head, const int64_t* rows, int64_t count, std::vector<T>& storage, PackedRows<T>& packed) {
  packed.stride = packed_width<T>(head.width());
  const int64_t padded = count == 0 ? 0 : padded_rows(count);
  storage.resize(padded * packed.stride);
  packed.data = storage.data();
  std::fill(storage.begin() + count * packed.stride, storage.end(), T(0));
  at::parallel_for(0, count, 64,
                   [&](int64_t begin, int64_t end) { gather_rows(head.hidden, rows, begin, end, packed); });
}

}  // namespace dlogp
