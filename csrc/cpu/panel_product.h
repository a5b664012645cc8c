// C (rows, columns) = A · B, or += with `accumulate`, of float and double on one thread: B lies in panels (matrix.h),
// and as large a tile of C as the processor's registers hold is summed at a time.
#pragma once

#include <cstdint>

namespace dlogp {

struct Product {
  int64_t rows, columns, inner;
  int64_t a_stride;
  int64_t b_columns;  // that B was packed with, `columns` at least: bfloat16 only
  int64_t c_stride;
};

// `inner` is that of the packed B. An element's products are added one by one in its order.
void panel_product(const Product& product, const float* a, const float* panels, float* c, bool accumulate);
void panel_product(const Product& product, const double* a, const double* panels, double* c, bool accumulate);

}  // namespace dlogp
