#include "linear_tile.h"

#include <algorithm>

#include "fold.h"

namespace dlogp {
namespace {

constexpr int64_t kMaxSplits = 64;

}  // namespace

Tiling tile_vocabulary(int64_t vocabulary, int64_t width, int64_t element_size, TileSize most) {
  int64_t columns = most.columns;
  while (columns > 64 && columns * width * element_size > most.bytes) columns /= 2;
  const int64_t tiles = (vocabulary + columns - 1) / columns;
  return {vocabulary, columns, std::min(tiles, kMaxSplits)};
}

int64_t padded_rows(int64_t rows) {
  int64_t padded = 1;
  while (padded < rows && padded < kRowBlock) padded *= 2;
  return round_up(rows, padded);
}

template <typename T>
PackedRows<T> pack_hidden(const Matrix& hidden, const int64_t* rows, int64_t count, int64_t padded,
                          std::vector<T>& storage) {
  const int64_t stride = packed_width<T>(hidden.columns);
  storage.resize(padded * stride);
  std::fill(storage.begin() + count * stride, storage.end(), T(0));
  for_each(count, 64, [&](int64_t i) {
    T* row = storage.data() + i * stride;
    read_row(hidden, rows[i], 0, hidden.columns, row);
    std::fill(row + hidden.columns, row + stride, T(0));
  });
  return {stride, storage.data()};
}

template <typename T>
void TileScratch<T>::reserve(const Head* heads, int models, const Tiling& tiling, int64_t rows) {
  for (int model = 0; model < models; ++model) {
    const int64_t width = packed_width<T>(heads[model].width());
    packed_weight[model].resize(Packed<T>::size(width, tiling.columns));
    logits[model].resize(rows * tiling.columns);
  }
  grad.resize(tiling.columns);
}

template <typename T>
WeightRows<T> weight_rows(const Matrix& weight, int64_t begin, int64_t padded, std::vector<T>& copy) {
  const int64_t width = packed_width<T>(weight.columns);
  const int64_t count = std::clamp<int64_t>(weight.rows - begin, 0, padded);
  if (count == padded && width == weight.columns) {
    const T* in_place = groups_in_place<T>(weight, begin);
    if (in_place != nullptr) return {in_place, weight.row_stride};
  }
  copy.resize(std::max<size_t>(copy.size(), padded * width));
  T* rows = copy.data();
  for (int64_t v = 0; v < count; ++v) {
    read_row(weight, begin + v, 0, weight.columns, rows + v * width);
    std::fill(rows + v * width + weight.columns, rows + (v + 1) * width, T(0));
  }
  std::fill(rows + count * width, rows + padded * width, T(0));
  return {rows, width};
}

template <typename Acc>
const Acc* bias_of(const Head& head, int64_t begin, int64_t count, std::vector<Acc>& copy) {
  if (head.bias.data == nullptr) return nullptr;
  copy.resize(std::max<size_t>(copy.size(), count));
  read_row(head.bias, 0, begin, count, copy.data());
  return copy.data();
}

template <typename T>
void tile_logits(const Head& head, const PackedRows<T>& hidden, int64_t first_row, int64_t rows, const T* packed_weight,
                 int64_t begin, int64_t count, const Tiling& tiling, TileScratch<T>& scratch, Accumulator<T>* logits) {
  const int64_t multiplied = kGroup<T> == 1 ? rows : padded_rows(rows);
  const Product product{multiplied, tiling.columns, hidden.stride, hidden.stride, tiling.columns, tiling.columns};
  multiply(product, hidden.data + first_row * hidden.stride, packed_weight, logits, false);
  const Accumulator<T>* bias = bias_of(head, begin, count, scratch.bias);
  if (bias == nullptr && head.transform.is_identity()) return;
  for (int64_t r = 0; r < rows; ++r) transform_row(head.transform, count, bias, logits + r * tiling.columns);
}

#define DLOGP_INSTANTIATE(T)                                                                                    \
  template PackedRows<T> pack_hidden<T>(const Matrix&, const int64_t*, int64_t, int64_t, std::vector<T>&);      \
  template struct TileScratch<T>;                                                                               \
  template WeightRows<T> weight_rows<T>(const Matrix&, int64_t, int64_t, std::vector<T>&);                      \
  template void tile_logits<T>(const Head&, const PackedRows<T>&, int64_t, int64_t, const T*, int64_t, int64_t, \
                               const Tiling&, TileScratch<T>&, Accumulator<T>*);
DLOGP_INSTANTIATE(c10::BFloat16)
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE
template const float* bias_of(const Head&, int64_t, int64_t, std::vector<float>&);
template const double* bias_of(const Head&, int64_t, int64_t, std::vector<double>&);

}  // namespace dlogp
