#include "dot_products.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

#if defined(__x86_64__)
#define DLOGP_BFLOAT16 __attribute__((target("arch=x86-64-v4,avx512bf16")))

DLOGP_BFLOAT16 inline __m512bh load_pairs(const c10::BFloat16* from) { return __m512bh(_mm512_loadu_si512(from)); }
// The first `count` < 32 elements, and zeros.
DLOGP_BFLOAT16 inline __m512bh load_pairs(const c10::BFloat16* from, int64_t count) {
  return __m512bh(_mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, from));
}

// In each quarter of a vector the sums of that quarter's lanes of a, b, c and d.
DLOGP_BFLOAT16 inline __m512 sums_in_quarters(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

// The sums of neighbouring quarters of a, then those of b.
DLOGP_BFLOAT16 inline __m512 sums_of_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

// As dot_block; a lane adds up the products of two neighbours.
template <int Rows>
DLOGP_BFLOAT16 void dot_pairs(int64_t tokens, int64_t inner, const c10::BFloat16* weight, int64_t weight_stride,
                              const c10::BFloat16* hidden, int64_t hidden_stride, float* c, int64_t c_stride) {
  static_assert(kDotTokens == 4 && Rows <= 4, "a quarter has the tokens of a row");
  __m512 sums[4][kDotTokens];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kDotTokens; ++t) sums[r][t] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 32 <= inner; k += 32) {
    __m512bh left[kDotTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kDotTokens; ++t) {
      left[t] = load_pairs(weight + t * weight_stride + k);
      // The products of several rows take longer than the next tokens take to come from memory.
      __builtin_prefetch(weight + (t + kDotTokens) * weight_stride + k);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m512bh right = load_pairs(hidden + r * hidden_stride + k);
#pragma GCC unroll 4
      for (int t = 0; t < kDotTokens; ++t) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], left[t], right);
    }
  }
  if (k < inner) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m512bh right = load_pairs(hidden + r * hidden_stride + k, inner - k);
#pragma GCC unroll 4
      for (int t = 0; t < kDotTokens; ++t)
        sums[r][t] = _mm512_dpbf16_ps(sums[r][t], load_pairs(weight + t * weight_stride + k, inner - k), right);
    }
  }
  __m512 rows[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) rows[r] = sums_in_quarters(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
  const __m512 all = sums_of_quarters(sums_of_quarters(rows[0], rows[1]), sums_of_quarters(rows[2], rows[3]));
  float found[16];
  _mm512_storeu_ps(found, all);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) std::memcpy(c + r * c_stride, found + 4 * r, tokens * sizeof(float));
}
#endif

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

void dot_products(int64_t tokens, int64_t rows, int64_t inner, const c10::BFloat16* weight, int64_t weight_stride,
                  const c10::BFloat16* hidden, int64_t hidden_stride, float* c, int64_t c_stride) {
#if defined(__x86_64__)
  constexpr int kRows = 4;
  for (int64_t r = 0; r < rows; r += kRows) {
    const auto dot = rows - r >= kRows ? dot_pairs<kRows>
                     : rows - r == 3   ? dot_pairs<3>
                     : rows - r == 2   ? dot_pairs<2>
                                       : dot_pairs<1>;
    dot(tokens, inner, weight, weight_stride, hidden + r * hidden_stride, hidden_stride, c + r * c_stride, c_stride);
  }
#else  // where nothing multiplies bfloat16 natively, nor comes here
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < tokens; ++t) {
      float sum = 0;
      for (int64_t k = 0; k < inner; ++k)
        sum += float(weight[t * weight_stride + k]) * float(hidden[r * hidden_stride + k]);
      c[r * c_stride + t] = sum;
    }
#endif
}

}  // namespace dlogp
