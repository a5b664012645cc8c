#include "dot_products.h"

#include <cstring>

#include "vector_math.h"

namespace dlogp {
namespace {

// Vectors of so many bytes, of float or double.
template <typename Real, int Bytes>
struct Lanes {
  using Vector __attribute__((vector_size(Bytes))) = Real;
  static constexpr int64_t count = Bytes / int64_t(sizeof(Real));

  // By reference: a vector as a result would be a matter of the instruction set.
  static DLOGP_INLINE void load(const Real* from, Vector& lanes) { std::memcpy(&lanes, from, sizeof lanes); }
  static DLOGP_INLINE Real sum(const Vector& lanes) {
    Real sums[count];
    std::memcpy(sums, &lanes, sizeof sums);
    for (int64_t half = count / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
  }
};

// kDotTokens tokens and `Rows` rows: as many running sums as hide the latency of an addition.
template <int Bytes, int Rows, typename Real>
DLOGP_INLINE void dot_block(int64_t tokens, int64_t inner, const Real* weight, int64_t weight_stride,
                            const Real* hidden, int64_t hidden_stride, Real* c, int64_t c_stride) {
  using L = Lanes<Real, Bytes>;
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
      Real sum = L::sum(sums[t][r]);
      for (int64_t k = whole; k < inner; ++k) sum += weight[t * weight_stride + k] * hidden[r * hidden_stride + k];
      c[r * c_stride + t] = sum;
    }
  }
}

template <int Bytes, typename Real>
DLOGP_INLINE void dot_rows(int64_t tokens, int64_t rows, int64_t inner, const Real* weight, int64_t weight_stride,
                           const Real* hidden, int64_t hidden_stride, Real* c, int64_t c_stride) {
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2)
    dot_block<Bytes, 2>(tokens, inner, weight, weight_stride, hidden + r * hidden_stride, hidden_stride,
                        c + r * c_stride, c_stride);
  if (r < rows)
    dot_block<Bytes, 1>(tokens, inner, weight, weight_stride, hidden + r * hidden_stride, hidden_stride,
                        c + r * c_stride, c_stride);
}

template <typename Real>
using DotProducts = void (*)(int64_t, int64_t, int64_t, const Real*, int64_t, const Real*, int64_t, Real*, int64_t);

// A vector type wider than the processor's would be taken apart, so each instruction set has its own width.
#define DLOGP_DOT_PRODUCTS(name, attribute, bytes)                                                            \
  template <typename Real>                                                                                    \
  attribute void name(int64_t tokens, int64_t rows, int64_t inner, const Real* weight, int64_t weight_stride, \
                      const Real* hidden, int64_t hidden_stride, Real* c, int64_t c_stride) {                 \
    dot_rows<bytes>(tokens, rows, inner, weight, weight_stride, hidden, hidden_stride, c, c_stride);          \
  }
DLOGP_DOT_PRODUCTS(dot_products_16, , 16)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
DLOGP_DOT_PRODUCTS(dot_products_32, __attribute__((target("avx2,fma"))), 32)
DLOGP_DOT_PRODUCTS(dot_products_64, __attribute__((target("arch=x86-64-v4"))), 64)
#define DLOGP_WIDE_VECTORS
#endif
#undef DLOGP_DOT_PRODUCTS

template <typename Real>
DotProducts<Real> for_this_processor() {
#ifdef DLOGP_WIDE_VECTORS
  if (__builtin_cpu_supports("x86-64-v4")) return dot_products_64<Real>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return dot_products_32<Real>;
#endif
  return dot_products_16<Real>;
}

}  // namespace

void dot_products(int64_t tokens, int64_t rows, int64_t inner, const float* weight, int64_t weight_stride,
                  const float* hidden, int64_t hidden_stride, float* c, int64_t c_stride) {
  static const DotProducts<float> run = for_this_processor<float>();
  run(tokens, rows, inner, weight, weight_stride, hidden, hidden_stride, c, c_stride);
}
void dot_products(int64_t tokens, int64_t rows, int64_t inner, const double* weight, int64_t weight_stride,
                  const double* hidden, int64_t hidden_stride, double* c, int64_t c_stride) {
  static const DotProducts<double> run = for_this_processor<double>();
  run(tokens, rows, inner, weight, weight_stride, hidden, hidden_stride, c, c_stride);
}

}  // namespace dlogp
