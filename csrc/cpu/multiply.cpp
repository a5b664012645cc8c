#include "multiply.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

namespace dlogp {
namespace {

namespace blas = at::native::cpublas;

void multiply_double(const Product& p, const double* a, const double* b, double* c, bool accumulate) {
  for (int64_t i = 0; i < p.rows; ++i) {
    double* row = c + i * p.c_stride;
    if (!accumulate)
      for (int64_t j = 0; j < p.columns; ++j) row[j] = 0;
    for (int64_t k = 0; k < p.inner; ++k) {
      const double factor = a[i * p.a_stride + k];
      const double* from = b + k * p.b_stride;
      for (int64_t j = 0; j < p.columns; ++j) row[j] += factor * from[j];
    }
  }
}

}  // namespace

template <typename T>
void multiply(const Product& p, const T* a, const T* b, Accumulator<T>* c, bool accumulate) {
  if constexpr (sizeof(T) == 8) {
    multiply_double(p, a, b, c, accumulate);
  } else {
    constexpr bool grouped = sizeof(T) == 2;
    blas::brgemm(p.rows, p.columns, p.inner, p.a_stride, p.b_stride, p.c_stride, accumulate, a, b, c, grouped);
  }
}

template <typename T>
void release_products() {
  if constexpr (sizeof(T) < 8) blas::brgemm_release(sizeof(T) == 2);
}

bool multiplies_bfloat16() {
  // oneDNN emulates bfloat16 on a processor without the instructions, which is slower than float32.
#if defined(__x86_64__)
  static const bool supported = [] {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    try {
      const c10::BFloat16 one[2] = {1.0f, 1.0f};
      float sum = 0;
      multiply({1, 1, 2, 2, 1, 1}, one, one, &sum, false);
      release_products<c10::BFloat16>();
      return sum == 2.0f;
    } catch (const c10::Error&) {  // this build of torch has no such products
      return false;
    }
  }();
  return supported;
#else
  return false;
#endif
}

template void multiply<c10::BFloat16>(const Product&, const c10::BFloat16*, const c10::BFloat16*, float*, bool);
template void multiply<float>(const Product&, const float*, const float*, float*, bool);
template void multiply<double>(const Product&, const double*, const double*, double*, bool);
template void release_products<c10::BFloat16>();
template void release_products<float>();
template void release_products<double>();

}  // namespace dlogp
