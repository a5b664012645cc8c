// A matrix of any floating type and strides, read and written row by row, and the layouts that matrix products want.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace dlogp {

enum class Dtype { kBFloat16, kHalf, kFloat, kDouble };

// Row r begins at row_offsets[r] if those are given (rows that are no single stride apart), else at r · row_stride.
struct Matrix {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 0;
  const int64_t* row_offsets = nullptr;

  int64_t row_begin(int64_t row) const { return row_offsets != nullptr ? row_offsets[row] : row * row_stride; }
  bool has_adjacent_columns() const { return column_stride == 1 || columns == 1; }
};

// A contiguous matrix to write.
struct Output {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t columns = 0;

  explicit operator bool() const { return data != nullptr; }
};

// Columns [begin, begin + count) of one row, converted.
template <typename T>
void read_row(const Matrix& matrix, int64_t row, int64_t begin, int64_t count, T* to);

// The same without a copy where the matrix has this type and adjacent columns; else null.
template <typename T>
const T* row_in_place(const Matrix& matrix, int64_t row, int64_t begin);

// Elements that a product consumes together along its inner dimension: 2 of bfloat16, else 1.
template <typename T>
constexpr int64_t kGroup = sizeof(T) == 2 ? 2 : 1;

// Rows from `row` on likewise, where each begins at a whole group, which is read at once: a view may begin within one.
template <typename T>
const T* groups_in_place(const Matrix& matrix, int64_t row);

template <typename T>
void write_row(const Output& output, int64_t row, int64_t begin, int64_t count, const T* from);

// to[c][r] = from[r][c].
template <typename T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride);

int64_t round_up(int64_t value, int64_t multiple);

// Bytes of a line of the cache. Where a vector that is stored and loaded again straddles two, it takes longer.
constexpr size_t kLine = 64;

// Columns of a panel, which are a line.
template <typename T>
constexpr int64_t kPanel = kLine / int64_t(sizeof(T));

// The right operand (inner, columns) of a product. bfloat16 lies as (inner / group, columns, group), `inner` being a
// multiple of the group; float and double as panels (columns / kPanel, inner, kPanel), the last of them to its whole
// width.
template <typename T>
struct Packed {
  T* data;
  int64_t inner, columns;

  // Where a column begins that is a multiple of kPanel.
  T* at_column(int64_t column) const { return data + column * (kGroup<T> == 2 ? 2 : inner); }
  static int64_t size(int64_t inner, int64_t columns) {
    return inner * (kGroup<T> == 2 ? columns : round_up(columns, kPanel<T>));
  }
};

// Storage that begins a line, as whole panels should.
template <typename T>
struct LineAllocator {
  using value_type = T;

  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(kLine))); }
  void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t(kLine)); }
  bool operator==(const LineAllocator&) const { return true; }
};
template <typename T>
using PackedStorage = std::vector<T, LineAllocator<T>>;

// Packs its rows [first, first + count) out of row-major ones; whole groups of them.
template <typename T>
void pack_rows(int64_t first, int64_t count, const T* from, int64_t from_stride, const Packed<T>& to);

// Packs its columns [first, first + count), `first` being a multiple of kPanel, out of row-major (count, inner).
template <typename T>
void pack_columns(int64_t first, int64_t count, const T* from, int64_t from_stride, const Packed<T>& to);

}  // namespace dlogp
