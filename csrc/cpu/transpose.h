// to[c][r] = from[r][c] of elements of 32 and of 16 bits, whatever they stand for.
#pragma once

#include <cstdint>

namespace dlogp {

void transpose_words(int64_t rows, int64_t columns, const uint32_t* from, int64_t from_stride, uint32_t* to,
                     int64_t to_stride);
void transpose_halves(int64_t rows, int64_t columns, const uint16_t* from, int64_t from_stride, uint16_t* to,
                      int64_t to_stride);

}  // namespace dlogp
