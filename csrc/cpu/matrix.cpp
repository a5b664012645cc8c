#include "matrix.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "fold.h"
#include "transpose.h"
#include "vector_math.h"

namespace dlogp {
namespace {

template <typename From, typename To>
To convert(From value) {
  if constexpr (std::is_same_v<From, double> || std::is_same_v<To, double>) {
    return static_cast<To>(static_cast<double>(value));
  } else {
    return static_cast<To>(static_cast<float>(value));
  }
}

DLOGP_CLONES void widen_row(int64_t count, const uint16_t* from, uint32_t* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = uint32_t(from[i]) << 16;
}

template <typename From, typename To>
void read_typed(const From* from, int64_t stride, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    if (stride == 1) {
      std::memcpy(to, from, count * sizeof(To));
      return;
    }
  } else if constexpr (std::is_same_v<From, c10::BFloat16> && std::is_same_v<To, float>) {
    if (stride == 1) return widen_row(count, reinterpret_cast<const uint16_t*>(from), reinterpret_cast<uint32_t*>(to));
  }
  for (int64_t i = 0; i < count; ++i) to[i] = convert<From, To>(from[i * stride]);
}

template <typename From, typename To>
void write_typed(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, c10::BFloat16>)
    return round_row(count, from, reinterpret_cast<uint16_t*>(to));
  for (int64_t i = 0; i < count; ++i) to[i] = convert<From, To>(from[i]);
}

// Calls `use` with a null pointer of the C++ type that `dtype` stands for.
template <typename Use>
void with_type(Dtype dtype, Use use) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return use(static_cast<const c10::BFloat16*>(nullptr));
    case Dtype::kHalf:
      return use(static_cast<const c10::Half*>(nullptr));
    case Dtype::kFloat:
      return use(static_cast<const float*>(nullptr));
    case Dtype::kDouble:
      return use(static_cast<const double*>(nullptr));
  }
}

template <typename T>
constexpr Dtype kDtype = std::is_same_v<T, c10::BFloat16> ? Dtype::kBFloat16
                         : std::is_same_v<T, float>       ? Dtype::kFloat
                                                          : Dtype::kDouble;

// to[i] = (even[i], odd[i])
DLOGP_CLONES void interleave(int64_t count, const uint16_t* even, const uint16_t* odd, uint32_t* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = uint32_t(even[i]) | uint32_t(odd[i]) << 16;
}

}  // namespace

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <typename T>
void read_row(const Matrix& matrix, int64_t row, int64_t begin, int64_t count, T* to) {
  with_type(matrix.dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(matrix.data) + matrix.row_begin(row) + begin * matrix.column_stride;
    read_typed(from, matrix.column_stride, count, to);
  });
}

template <typename T>
const T* row_in_place(const Matrix& matrix, int64_t row, int64_t begin) {
  if (matrix.dtype != kDtype<T> || !matrix.has_adjacent_columns()) return nullptr;
  return static_cast<const T*>(matrix.data) + matrix.row_begin(row) + begin;
}

template <typename T>
const T* groups_in_place(const Matrix& matrix, int64_t row) {
  const T* begin = matrix.row_stride % kGroup<T> == 0 ? row_in_place<T>(matrix, row, 0) : nullptr;
  return reinterpret_cast<uintptr_t>(begin) % (kGroup<T> * sizeof(T)) == 0 ? begin : nullptr;
}

template <typename T>
void write_row(const Output& output, int64_t row, int64_t begin, int64_t count, const T* from) {
  with_type(output.dtype, [&](auto* type) {
    using To = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    write_typed(from, count, static_cast<To*>(output.data) + row * output.columns + begin);
  });
}

template <typename T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  if constexpr (sizeof(T) == 4) {
    transpose_words(rows, columns, reinterpret_cast<const uint32_t*>(from), from_stride,
                    reinterpret_cast<uint32_t*>(to), to_stride);
  } else if constexpr (sizeof(T) == 2) {
    transpose_halves(rows, columns, reinterpret_cast<const uint16_t*>(from), from_stride,
                     reinterpret_cast<uint16_t*>(to), to_stride);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

template <typename T>
void pack_rows(int64_t first, int64_t count, const T* from, int64_t from_stride, const Packed<T>& to) {
  if constexpr (kGroup<T> == 2) {
    for (int64_t i = 0; i < count; i += 2) {
      const auto* even = reinterpret_cast<const uint16_t*>(from + i * from_stride);
      interleave(to.columns, even, even + from_stride, reinterpret_cast<uint32_t*>(to.data + (first + i) * to.columns));
    }
  } else {
    const int64_t whole = to.columns / kPanel<T> * kPanel<T>;
    for (int64_t i = 0; i < count; ++i) {
      const T* row = from + i * from_stride;
      T* packed = to.data + (first + i) * kPanel<T>;
      for (int64_t column = 0; column < whole; column += kPanel<T>)
        std::memcpy(packed + column * to.inner, row + column, kPanel<T> * sizeof(T));
      std::copy_n(row + whole, to.columns - whole, packed + whole * to.inner);
    }
  }
}

template <typename T>
void pack_columns(int64_t first, int64_t count, const T* from, int64_t from_stride, const Packed<T>& to) {
  if constexpr (kGroup<T> == 2) {
    transpose_words(count, to.inner / 2, reinterpret_cast<const uint32_t*>(from), from_stride / 2,
                    reinterpret_cast<uint32_t*>(to.at_column(first)), to.columns);
  } else {
    for (int64_t column = 0; column < count; column += kPanel<T>)
      transpose(std::min(kPanel<T>, count - column), to.inner, from + column * from_stride, from_stride,
                to.at_column(first + column), kPanel<T>);
  }
}

#define DLOGP_INSTANTIATE(T)                                                         \
  template void read_row<T>(const Matrix&, int64_t, int64_t, int64_t, T*);           \
  template const T* row_in_place<T>(const Matrix&, int64_t, int64_t);                \
  template const T* groups_in_place<T>(const Matrix&, int64_t);                      \
  template void write_row<T>(const Output&, int64_t, int64_t, int64_t, const T*);    \
  template void transpose<T>(int64_t, int64_t, const T*, int64_t, T*, int64_t);      \
  template void pack_rows<T>(int64_t, int64_t, const T*, int64_t, const Packed<T>&); \
  template void pack_columns<T>(int64_t, int64_t, const T*, int64_t, const Packed<T>&);
DLOGP_INSTANTIATE(c10::BFloat16)
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
