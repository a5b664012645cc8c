// Rows of logits on the device, as the host describes them to a kernel.
#pragma once

#include <cstdint>

namespace dlogp {

enum class LogitType { kBFloat16, kHalf, kFloat };

constexpr int64_t size_of(LogitType type) { return type == LogitType::kFloat ? 4 : 2; }

// Row n begins at element ⌊n / inner⌋ · stride_outer + n mod inner · stride_row: two strides reach every row.
struct LogitRows {
  const void* data = nullptr;
  LogitType type = LogitType::kFloat;
  int64_t inner = 1, stride_outer = 0, stride_row = 0, stride_column = 1;

  // Every fourth logit of a row begins a group of four that one load reads.
  bool has_aligned_groups() const {
    return stride_column == 1 && stride_outer % 4 == 0 && stride_row % 4 == 0 &&
           reinterpret_cast<uintptr_t>(data) % (4 * size_of(type)) == 0;
  }
};

}  // namespace dlogp
