#include "panel_product.h"

#include <algorithm>

#include "lanes.h"
#include "matrix.h"

namespace dlogp {
namespace {

// Of the inner dimension, so that panels stay in the first two levels of the cache while rows pass by.
constexpr int64_t kInnerBlock = 512;

// A tile of C has enough sums to hide the latency of an addition, and no more than the registers hold beside a row of
// its panels and an element of A: there are 32 of 64 bytes, 16 of less on x86-64, 32 of 16 bytes on others.
#if defined(__x86_64__)
constexpr int kShortRows = 2;
#else
constexpr int kShortRows = 6;
#endif
template <int Bytes>
constexpr int kTileRows = Bytes == 64   ? 8
                          : Bytes == 32 ? 6
                                        : kShortRows;
template <int Bytes>
constexpr int kTilePanels = Bytes == 64 ? 2 : 1;

// Where the operands of a tile begin; elements [begin, end) of the inner dimension are added.
template <typename T>
struct Operands {
  int64_t begin, end;
  const T *a, *panels;
  T* c;
  int64_t a_stride, panel_stride, c_stride;
  bool accumulate;
};

template <int Bytes, int Rows, int Panels, typename T>
DLOGP_INLINE void add_tile(const Operands<T>& o) {
  using L = Lanes<T, Bytes>;
  constexpr int kPerPanel = kPanel<T> / L::count, kVectors = Panels * kPerPanel;
  typename L::Vector sums[Rows][kVectors] = {};
  if (o.accumulate) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) L::load(o.c + r * o.c_stride + v * L::count, sums[r][v]);
  }
  for (int64_t k = o.begin; k < o.end; ++k) {
    typename L::Vector right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      L::load(o.panels + v / kPerPanel * o.panel_stride + k * kPanel<T> + v % kPerPanel * L::count, right[v]);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const T left = o.a[r * o.a_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) L::store(sums[r][v], o.c + r * o.c_stride + v * L::count);
}

// The same of `rows` ≤ Rows rows.
template <int Bytes, int Rows, int Panels, typename T>
DLOGP_INLINE void add_rows(int64_t rows, const Operands<T>& o) {
  if (rows == Rows) return add_tile<Bytes, Rows, Panels>(o);
  if constexpr (Rows > 1) add_rows<Bytes, Rows - 1, Panels>(rows, o);
}

// Of one panel, `columns` < kPanel of which are columns of C.
template <int Bytes, typename T>
DLOGP_INLINE void add_narrow(int64_t rows, int64_t columns, const Operands<T>& o) {
  T tile[kTileRows<Bytes> * kPanel<T>] = {};
  Operands<T> own = o;
  own.c = tile;
  own.c_stride = kPanel<T>;
  for (int64_t r = 0; r < rows && o.accumulate; ++r)
    std::copy_n(o.c + r * o.c_stride, columns, tile + r * own.c_stride);
  add_rows<Bytes, kTileRows<Bytes>, 1>(rows, own);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(tile + r * own.c_stride, columns, o.c + r * o.c_stride);
}

template <int Bytes, typename T>
DLOGP_INLINE void add_columns(const Product& p, int64_t column, int64_t columns, const Operands<T>& first) {
  Operands<T> o = first;
  o.panels += column * p.inner;
  o.c += column;
  for (int64_t row = 0; row < p.rows; row += kTileRows<Bytes>) {
    const int64_t rows = std::min<int64_t>(p.rows - row, kTileRows<Bytes>);
    if (columns == kTilePanels<Bytes> * kPanel<T>)
      add_rows<Bytes, kTileRows<Bytes>, kTilePanels<Bytes>>(rows, o);
    else if (columns == kPanel<T>)
      add_rows<Bytes, kTileRows<Bytes>, 1>(rows, o);
    else
      add_narrow<Bytes>(rows, columns, o);
    o.a += rows * o.a_stride;
    o.c += rows * o.c_stride;
  }
}

template <int Bytes, typename T>
DLOGP_INLINE void product_of(const Product& p, const T* a, const T* panels, T* c, bool accumulate) {
  constexpr int64_t kWhole = kTilePanels<Bytes> * kPanel<T>;
  Operands<T> o = {0, 0, a, panels, c, p.a_stride, p.inner * kPanel<T>, p.c_stride, accumulate};
  do {
    o.begin = o.end;
    o.end = std::min(o.begin + kInnerBlock, p.inner);
    for (int64_t column = 0, columns; column < p.columns; column += columns) {
      const int64_t left = p.columns - column;
      columns = left >= kWhole ? kWhole : std::min(left, kPanel<T>);
      add_columns<Bytes>(p, column, columns, o);
    }
    o.accumulate = true;
  } while (o.end < p.inner);
}

#define DLOGP_DEFINE(attribute, name, bytes)                                                        \
  template <typename T>                                                                             \
  attribute void name(const Product& product, const T* a, const T* panels, T* c, bool accumulate) { \
    product_of<bytes>(product, a, panels, c, accumulate);                                           \
  }
DLOGP_FOR_EACH_WIDTH(DLOGP_DEFINE, product_with)
#undef DLOGP_DEFINE

}  // namespace

void panel_product(const Product& product, const float* a, const float* panels, float* c, bool accumulate) {
  static const auto run = DLOGP_WIDEST(product_with, float);
  run(product, a, panels, c, accumulate);
}
void panel_product(const Product& product, const double* a, const double* panels, double* c, bool accumulate) {
  static const auto run = DLOGP_WIDEST(product_with, double);
  run(product, a, panels, c, accumulate);
}

}  // namespace dlogp
