// Memory safety at the boundary: whatever reaches a kernel was checked here. User errors are explained in
// functional.py.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../csrc/cpu/matrix.h"
#include "../csrc/cpu/row_statistics.h"

namespace dlogp {

inline Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    default:
      TORCH_CHECK_TYPE(false, "dtype ", x.scalar_type(), ", expected bfloat16, float16, float32 or float64");
  }
}

// Calls `use` with a value of the type that accumulates.
template <typename Use>
void dispatch_accumulator(bool use_double, Use use) {
  use_double ? use(double()) : use(float());
}

// Before anything of x is read: a model whose weights are sharded leaves tensors behind whose storage was taken away,
// and a view of a file may begin anywhere.
inline const at::Tensor& checked(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " is on ", x.device(), ", expected cpu");
  const size_t needed = at::detail::computeStorageNbytes(x.sizes(), x.strides(), x.itemsize(), x.storage_offset());
  TORCH_CHECK_VALUE(x.numel() == 0 || needed <= x.storage().nbytes(), name, " has a storage of ", x.storage().nbytes(),
                    " bytes, expected the ", needed, " of its shape ", x.sizes(),
                    " (a tensor that ZeRO-3 or FSDP sharded has to be gathered first)");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % x.itemsize() == 0, name,
                    " begins at an address that is no multiple of its elements' ", x.itemsize(), " bytes: pass ", name,
                    ".clone()");
  return x;
}

// x (…, columns) seen as rows; for leading dimensions that are no single stride apart it holds where each row begins.
struct Rows {
  Matrix matrix;
  std::vector<int64_t> offsets;

  Rows() = default;
  Rows(const at::Tensor& x, const char* name) {
    TORCH_CHECK_VALUE(x.dim() >= 2, name, " has ", x.dim(), " dimensions, expected at least 2");
    const int64_t columns = x.size(-1), leading = x.dim() - 1;
    const int64_t rows = c10::multiply_integers(x.sizes().slice(0, leading));
    matrix = {checked(x, name).const_data_ptr(), dtype_of(x), rows, columns, 0, x.stride(-1)};
    if (leading == 1) {
      matrix.row_stride = x.stride(0);
      return;
    }
    offsets.resize(rows);
    std::vector<int64_t> position(leading, 0);
    for (int64_t row = 0, offset = 0; row < rows; ++row) {
      offsets[row] = offset;
      for (int64_t d = leading - 1; d >= 0; --d) {
        offset += x.stride(d);
        if (++position[d] < x.size(d)) break;
        offset -= x.size(d) * x.stride(d);
        position[d] = 0;
      }
    }
    matrix.row_offsets = offsets.data();
  }
  Rows(Rows&&) = default;  // the offsets stay where they are
  Rows& operator=(Rows&&) = default;
};

inline Matrix matrix_of(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 2, name, " has ", x.dim(), " dimensions, expected 2");
  return {checked(x, name).const_data_ptr(), dtype_of(x), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

inline Matrix row_of(const std::optional<at::Tensor>& x, int64_t columns, const char* name) {
  if (!x.has_value()) return {};
  TORCH_CHECK_VALUE(x->dim() == 1 && x->size(0) == columns, name, " has shape ", x->sizes(), ", expected [", columns,
                    "]");
  return {checked(*x, name).const_data_ptr(), dtype_of(*x), 1, columns, 0, x->stride(0)};
}

inline void check_rows(const Matrix& x, int64_t rows, const char* name) {
  TORCH_CHECK_VALUE(x.rows == rows, name, " has ", x.rows, " rows, expected ", rows);
}

// The sizes of an output that may not be wanted; then it is empty.
inline at::IntArrayRef sizes_if(bool wanted, at::IntArrayRef sizes) {
  static constexpr int64_t empty[] = {0};
  return wanted ? sizes : at::IntArrayRef(empty);
}

// A contiguous tensor to write, seen as rows of so many columns; one without elements has no data.
inline Output output_of(const at::Tensor& x, int64_t columns) {
  return x.numel() == 0 ? Output{} : Output{x.mutable_data_ptr(), dtype_of(x), columns};
}

// Values of `sizes` and type Acc, contiguous, kept alive by the tensor; null for none.
template <typename Acc>
class Values {
 public:
  Values(const std::optional<at::Tensor>& x, at::IntArrayRef sizes, const char* name) {
    if (!x.has_value() || !x->defined()) return;
    TORCH_CHECK_VALUE(x->sizes() == sizes, name, " has shape ", x->sizes(), ", expected ", sizes);
    tensor_ = checked(*x, name).to(c10::CppTypeToScalarType<Acc>::value).contiguous();
  }
  const Acc* get() const { return tensor_.defined() ? tensor_.template const_data_ptr<Acc>() : nullptr; }

 private:
  at::Tensor tensor_;
};

// The rows of target (N, K) with a candidate that is not ignored; IndexError for one out of range.
inline KeptRows keep_rows(const at::Tensor& target, int64_t rows, int64_t vocabulary, int64_t ignore_index) {
  TORCH_CHECK_VALUE(target.dim() == 2 && target.size(0) == rows, "target has shape ", target.sizes(), ", expected [",
                    rows, ", candidates]");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target has dtype ", target.scalar_type(), ", expected int64");
  const at::Tensor contiguous = checked(target, "target").contiguous();
  const int64_t* values = contiguous.const_data_ptr<int64_t>();
  KeptRows kept;
  kept.candidates = target.size(1);
  kept.ignore_index = ignore_index;
  for (int64_t row = 0; row < rows; ++row) {
    bool keep = false;
    for (int64_t k = 0; k < kept.candidates; ++k) {
      const int64_t value = values[row * kept.candidates + k];
      if (value == ignore_index) continue;
      TORCH_CHECK_INDEX(value >= 0 && value < vocabulary, "target[", row, ", ", k, "] is ", value,
                        ", expected a token in [0, ", vocabulary, ") or ignore_index (", ignore_index, ")");
      keep = true;
    }
    if (!keep) continue;
    kept.rows.push_back(row);
    kept.target.insert(kept.target.end(), values + row * kept.candidates, values + (row + 1) * kept.candidates);
  }
  return kept;
}

}  // namespace dlogp
