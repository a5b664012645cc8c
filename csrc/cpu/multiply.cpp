#include "multiply.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

namespace dlogp {
namespace blas = at::native::cpublas;

template <typename T>
void multiply(const Product& p, const T* a, const T* b, Accumulator<T>* c, bool accumulate) {
  if constexpr (sizeof(T) == 2)
    blas::brgemm(p.rows, p.columns, p.inner, p.a_stride, p.b_columns, p.c_stride, accumulate, a, b, c, true);
  else
    panel_product(p, a, b, c, accumulate);
}

template <typename T>
void release_products() {
  if constexpr (sizeof(T) == 2) blas::brgemm_release(true);
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
