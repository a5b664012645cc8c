// A matrix of any floating type and strides, read and written row by row, and the layouts that matrix products want.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

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

template <typename T>
void write_row(const Output& output, int64_t row, int64_t begin, int64_t count, const T* from);

// to[c][r] = from[r][c].
template <typename T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride);

// Elements that a product consumes together along its inner dimension: 2 of bfloat16, else 1.
template <typename T>
constexpr int64_t kGroup = sizeof(T) == 2 ? 2 : 1;

// The layout of the right operand of a product, (inner / group, columns, group), out of its row-major form
// (inner, columns). `inner` is a multiple of the group.
template <typename T>
void pack_rows(int64_t inner, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride);

// The same layout out of the transposed form (columns, inner).
template <typename T>
void pack_columns(int64_t inner, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride);

int64_t round_up(int64_t value, int64_t multiple);

}  // namespace dlogp
