// C (rows, columns) = A · B, or += with `accumulate`, on one thread. A is row-major; B is packed (matrix.h: Packed).
// bfloat16 and float32 accumulate in float32, float64 in float64. The order of the additions depends on `inner` alone,
// so a row's result does not depend on the rows around it.
#pragma once

#include <cstdint>

#include "panel_product.h"

namespace dlogp {

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

template <typename T>
void multiply(const Product& product, const T* a, const T* b, Accumulator<T>* c, bool accumulate);

// Whether this processor multiplies bfloat16 natively; otherwise the operands have to be float32.
bool multiplies_bfloat16();

// To be called by a thread after its last product.
template <typename T>
void release_products();

}  // namespace dlogp
