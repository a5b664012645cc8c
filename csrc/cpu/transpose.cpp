#include "transpose.h"

#include <utility>

#include "lanes.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DLOGP_SHUFFLES
#endif
#endif

namespace dlogp {
namespace {

// Rows and columns of a block: a line of the cache has as many 32-bit elements.
constexpr int64_t kBlock = 16;

#ifdef DLOGP_SHUFFLES
// low and high: the elements of a and b in turn, those of their first halves and those of their second ones.
template <typename Vector, int... I>
DLOGP_INLINE void interleave(const Vector& a, const Vector& b, Vector& low, Vector& high,
                             std::integer_sequence<int, I...>) {
  constexpr int kHalf = sizeof...(I) / 2;
  low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * 2 * kHalf)...);
  high = __builtin_shufflevector(a, b, (kHalf + I / 2 + I % 2 * 2 * kHalf)...);
}

// As many rows as a vector has elements: each round interleaves row i with that half of them further on.
template <int Bytes>
DLOGP_INLINE void transpose_square(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  using L = Lanes<uint32_t, Bytes>;
  constexpr int kRows = L::count;
  typename L::Vector rows[kRows], next[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) L::load(from + i * from_stride, rows[i]);
#pragma GCC unroll 4
  for (int round = 1; round < kRows; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows / 2; ++i)
      interleave(rows[i], rows[i + kRows / 2], next[2 * i], next[2 * i + 1], std::make_integer_sequence<int, kRows>());
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) L::store(rows[i], to + i * to_stride);
}
#else
template <int Bytes>
DLOGP_INLINE void transpose_square(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  constexpr int kRows = Bytes / 4;
  for (int c = 0; c < kRows; ++c)
    for (int r = 0; r < kRows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}
#endif

template <int Bytes>
DLOGP_INLINE void transpose_block(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  constexpr int64_t kSquare = Bytes / 4;
  for (int64_t c = 0; c < kBlock; c += kSquare)
    for (int64_t r = 0; r < kBlock; r += kSquare)
      transpose_square<Bytes>(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
}

template <int Bytes>
DLOGP_INLINE void words_of(int64_t rows, int64_t columns, const uint32_t* from, int64_t from_stride, uint32_t* to,
                           int64_t to_stride) {
  const int64_t whole_rows = rows / kBlock * kBlock, whole_columns = columns / kBlock * kBlock;
  for (int64_t r = 0; r < whole_rows; r += kBlock)
    for (int64_t c = 0; c < whole_columns; c += kBlock) {
      // Sixteen rows at a time come from memory, too many for the processor to foresee.
      for (int64_t i = 0; i < kBlock; ++i) __builtin_prefetch(from + (r + kBlock + i) * from_stride + c);
      transpose_block<Bytes>(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to[c * to_stride + r] = from[r * from_stride + c];
}

// Two rows make a row of 32-bit elements, which are transposed as such.
template <int Bytes>
DLOGP_INLINE void halves_of(int64_t rows, int64_t columns, const uint16_t* from, int64_t from_stride, uint16_t* to,
                            int64_t to_stride) {
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
      transpose_block<Bytes>(pairs, kBlock, transposed, kBlock);
      for (int64_t j = 0; j < kBlock; ++j)
        std::memcpy(to + (c + j) * to_stride + r, transposed + j * kBlock, kBlock * sizeof(uint32_t));
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to[c * to_stride + r] = from[r * from_stride + c];
}

#define DLOGP_DEFINE(attribute, name, bytes)                                                                         \
  template <typename T>                                                                                              \
  attribute void name(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride) { \
    if constexpr (sizeof(T) == 4)                                                                                    \
      words_of<bytes>(rows, columns, from, from_stride, to, to_stride);                                              \
    else                                                                                                             \
      halves_of<bytes>(rows, columns, from, from_stride, to, to_stride);                                             \
  }
DLOGP_FOR_EACH_WIDTH(DLOGP_DEFINE, transpose_with)
#undef DLOGP_DEFINE

}  // namespace

void transpose_words(int64_t rows, int64_t columns, const uint32_t* from, int64_t from_stride, uint32_t* to,
                     int64_t to_stride) {
  static const auto run = DLOGP_WIDEST(transpose_with, uint32_t);
  run(rows, columns, from, from_stride, to, to_stride);
}
void transpose_halves(int64_t rows, int64_t columns, const uint16_t* from, int64_t from_stride, uint16_t* to,
                      int64_t to_stride) {
  static const auto run = DLOGP_WIDEST(transpose_with, uint16_t);
  run(rows, columns, from, from_stride, to, to_stride);
}

}  // namespace dlogp
