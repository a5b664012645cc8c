#include "matrix.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "fold.h"
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

constexpr int64_t kBlock = 16;

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DLOGP_SHUFFLES
#endif
#endif

#ifdef DLOGP_SHUFFLES
using Vector = uint32_t __attribute__((vector_size(64)));

// A 16 × 16 transpose of 32-bit elements in four rounds, each interleaving row i with row i + 8.
DLOGP_INLINE void transpose_block(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  Vector rows[kBlock], next[kBlock];
  for (int i = 0; i < kBlock; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof(Vector));
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < kBlock / 2; ++i) {
      next[2 * i] =
          __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] =
          __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < kBlock; ++i) rows[i] = next[i];
  }
  for (int i = 0; i < kBlock; ++i) std::memcpy(to + i * to_stride, &rows[i], sizeof(Vector));
}
#else
DLOGP_INLINE void transpose_block(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  for (int c = 0; c < kBlock; ++c)
    for (int r = 0; r < kBlock; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}
#endif

DLOGP_CLONES void transpose_words(int64_t rows, int64_t columns, const uint32_t* from, int64_t from_stride,
                                  uint32_t* to, int64_t to_stride) {
  const int64_t whole_rows = rows / kBlock * kBlock, whole_columns = columns / kBlock * kBlock;
  for (int64_t r = 0; r < whole_rows; r += kBlock)
    for (int64_t c = 0; c < whole_columns; c += kBlock) {
      // Sixteen rows at a time come from memory, too many for the processor to foresee.
      for (int64_t i = 0; i < kBlock; ++i) __builtin_prefetch(from + (r + kBlock + i) * from_stride + c);
      transpose_block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to[c * to_stride + r] = from[r * from_stride + c];
}

// 16-bit elements: two rows make a row of 32-bit elements, which are transposed as such.
DLOGP_CLONES void transpose_halves(int64_t rows, int64_t columns, const uint16_t* from, int64_t from_stride,
                                   uint16_t* to, int64_t to_stride) {
  const int64_t whole_rows = rows / (2 * kBlock) * (2 * kBlock), whole_columns = columns / kBlock * kBlock;
  for (int64_t r = 0; r < whole_rows; r += 2 * kBlock)
    for (int64_t c = 0; c < whole_columns; c += kBlock) {
      uint32_t pairs[kBlock * kBlock], transposed[kBlock * kBlock];
      for (int64_t i = 0; i < kBlock; ++i) {
        const uint16_t* even = from + (r + 2 * i) * from_stride + c;
        const uint16_t* odd = even + from_stride;
#pragma omp simd
        for (int64_t j = 0; j < kBlock; ++j) pairs[i * kBlock + j] = uint32_t(even[j]) | uint32_t(odd[j]) << 16;
      }
      transpose_block(pairs, kBlock, transposed, kBlock);
      for (int64_t j = 0; j < kBlock; ++j)
        std::memcpy(to + (c + j) * to_stride + r, transposed + j * kBlock, kBlock * sizeof(uint32_t));
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to[c * to_stride + r] = from[r * from_stride + c];
}

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
                    reinterpret_cast<uint32_t*>(to.data + first * 2), to.columns);
  } else {
    for (int64_t column = 0; column < count; column += kPanel<T>)
      transpose(std::min(kPanel<T>, count - column), to.inner, from + column * from_stride, from_stride,
                to.data + (first + column) * to.inner, kPanel<T>);
  }
}

#define DLOGP_INSTANTIATE(T)                                                         \
  template void read_row<T>(const Matrix&, int64_t, int64_t, int64_t, T*);           \
  template const T* row_in_place<T>(const Matrix&, int64_t, int64_t);                \
  template void write_row<T>(const Output&, int64_t, int64_t, int64_t, const T*);    \
  template void transpose<T>(int64_t, int64_t, const T*, int64_t, T*, int64_t);      \
  template void pack_rows<T>(int64_t, int64_t, const T*, int64_t, const Packed<T>&); \
  template void pack_columns<T>(int64_t, int64_t, const T*, int64_t, const Packed<T>&);
DLOGP_INSTANTIATE(c10::BFloat16)
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
