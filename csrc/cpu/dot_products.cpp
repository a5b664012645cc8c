#include "dot_products.h"

#include "lanes.h"

namespace dlogp {
namespace {

// kDotTokens tokens and `Rows` rows: as many running sums as hide the latency of an addition.
template <int Bytes, int Rows, typename T>
DLOGP_INLINE void dot_block(int64_t tokens, int64_t inner, const T* weight, int64_t weight_stride, const T* hidden,
                            int64_t hidden_stride, T* c, int64_t c_stride) {
  using L = Lanes<T, Bytes>;
  typename L::Vector sums[kDotTokens][Rows] = {};
  const int64_t whole = inner / L::count * L::count;
  for (int64_t k = 0; k < whole; k += L::count) {
    typename L::Vector left[kDotTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kDotTokens; ++t) L::load(weight + t * weight_stride + k, left[t]);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      typename L::Vector right;
      L::load(hidden + r * hidden_stride + k, right);
#pragma GCC unroll 4
      for (int t = 0; t < kDotTokens; ++t) sums[t][r] += left[t] * right;
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kDotTokens; ++t) {
    if (t >= tokens) break;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      T sum = L::sum(sums[t][r]);
      for (int64_t k = whole; k < inner; ++k) sum += weight[t * weight_stride + k] * hidden[r * hidden_stride + k];
      c[r * c_stride + t] = sum;
    }
  }
}

template <int Bytes, typename T>
DLOGP_INLINE void dot_rows(int64_t tokens, int64_t rows, int64_t inner, const T* weight, int64_t weight_stride,
                           const T* hidden, int64_t hidden_stride, T* c, int64_t c_stride) {
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2)
    dot_block<Bytes, 2>(tokens, inner, weight, weight_stride, hidden + r * hidden_stride, hidden_stride,
                        c + r * c_stride, c_stride);
  if (r < rows)
    dot_block<Bytes, 1>(tokens, inner, weight, weight_stride, hidden + r * hidden_stride, hidden_stride,
                        c + r * c_stride, c_stride);
}

#define DLOGP_DEFINE(attribute, name, bytes)                                                               \
  template <typename T>                                                                                    \
  attribute void name(int64_t tokens, int64_t rows, int64_t inner, const T* weight, int64_t weight_stride, \
                      const T* hidden, int64_t hidden_stride, T* c, int64_t c_stride) {                    \
    dot_rows<bytes>(tokens, rows, inner, weight, weight_stride, hidden, hidden_stride, c, c_stride);       \
  }
DLOGP_FOR_EACH_WIDTH(DLOGP_DEFINE, dot_products_with)
#undef DLOGP_DEFINE

}  // namespace

void dot_products(int64_t tokens, int64_t rows, int64_t inner, const float* weight, int64_t weight_stride,
                  const float* hidden, int64_t hidden_stride, float* c, int64_t c_stride) {
  static const auto run = DLOGP_WIDEST(dot_products_with, float);
  run(tokens, rows, inner, weight, weight_stride, hidden, hidden_stride, c, c_stride);
}
void dot_products(int64_t tokens, int64_t rows, int64_t inner, const double* weight, int64_t weight_stride,
                  const double* hidden, int64_t hidden_stride, double* c, int64_t c_stride) {
  static const auto run = DLOGP_WIDEST(dot_products_with, double);
  run(tokens, rows, inner, weight, weight_stride, hidden, hidden_stride, c, c_stride);
}

}  // namespace dlogp
