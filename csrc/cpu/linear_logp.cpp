#include "linear_logp.h"

#include <algorithm>

#include "fold.h"

namespace dlogp {
namespace {

constexpr int64_t kMaxParts = 64;

void fold_tile_row(int64_t count, const float* const* z, SoftmaxState<float>& state) { fold_row(count, z[0], state); }
void fold_tile_row(int64_t count, const double* const* z, SoftmaxState<double>& state) { fold_row(count, z[0], state); }
void fold_tile_row(int64_t count, const float* const* z, PairState<float>& state) {
  fold_row(count, z[0], z[1], state);
}
void fold_tile_row(int64_t count, const double* const* z, PairState<double>& state) {
  fold_row(count, z[0], z[1], state);
}

}  // namespace

Tiling tile_vocabulary(int64_t vocabulary, int64_t width, int64_t element_size, TileSize most) {
  int64_t columns = most.columns;
  while (columns > 64 && columns * width * element_size > most.bytes) columns /= 2;
  const int64_t tiles = (vocabulary + columns - 1) / columns;
  return {vocabulary, columns, std::min(tiles, kMaxParts)};
}

int64_t padded_rows(int64_t rows) {
  int64_t padded = 1;
  while (padded < rows && padded < kRowBlock) padded *= 2;
  return round_up(rows, padded);
}

template <typename T>
void gather_rows(const Matrix& hidden, const int64_t* rows, int64_t begin, int64_t end, const PackedRows<T>& to) {
  for (int64_t i = begin; i < end; ++i) {
    T* row = to.data + i * to.stride;
    read_row(hidden, rows[i], 0, hidden.columns, row);
    std::fill(row + hidden.columns, row + to.stride, T(0));
  }
}

template <typename T>
void TileScratch<T>::reserve(const Head* heads, int models, const Tiling& tiling, int64_t rows) {
  for (int model = 0; model < models; ++model) {
    const int64_t width = packed_width<T>(heads[model].width());
    weight_copy.resize(std::max<size_t>(weight_copy.size(), tiling.columns * width));
    packed_weight[model].resize(Packed<T>::size(width, tiling.columns));
    logits[model].resize(rows * tiling.columns);
  }
  bias.resize(tiling.columns);
  grad.resize(tiling.columns);
}

template <typename T>
WeightRows<T> weight_rows(const Matrix& weight, int64_t begin, int64_t padded, TileScratch<T>& scratch) {
  const int64_t width = packed_width<T>(weight.columns);
  const int64_t count = std::clamp<int64_t>(weight.rows - begin, 0, padded);
  if (count == padded && width == weight.columns) {
    const T* in_place = groups_in_place<T>(weight, begin);
    if (in_place != nullptr) return {in_place, weight.row_stride};
  }
  T* copy = scratch.weight_copy.data();
  for (int64_t v = 0; v < count; ++v) {
    read_row(weight, begin + v, 0, weight.columns, copy + v * width);
    std::fill(copy + v * width + weight.columns, copy + (v + 1) * width, T(0));
  }
  std::fill(copy + count * width, copy + padded * width, T(0));
  return {copy, width};
}

template <typename T>
void tile_logits(const Head& head, const PackedRows<T>& hidden, int64_t first_row, int64_t rows, const T* packed_weight,
                 int64_t begin, int64_t count, const Tiling& tiling, TileScratch<T>& scratch, Accumulator<T>* logits) {
  const int64_t multiplied = kGroup<T> == 1 ? rows : padded_rows(rows);
  const Product product{multiplied, tiling.columns, hidden.stride, hidden.stride, tiling.columns, tiling.columns};
  multiply(product, hidden.data + first_row * hidden.stride, packed_weight, logits, false);
  const Accumulator<T>* bias = nullptr;
  if (head.bias.data != nullptr) {
    read_row(head.bias, 0, begin, count, scratch.bias.data());
    bias = scratch.bias.data();
  }
  if (bias == nullptr && head.transform.is_identity()) return;
  for (int64_t r = 0; r < rows; ++r) transform_row(head.transform, count, bias, logits + r * tiling.columns);
}

template <typename T, int Models>
void linear_logp_fwd(const Head* heads, const PackedRows<T>* hidden, int64_t count, const int64_t* target,
                     int64_t candidates, const Tiling& tiling, int64_t part, TileScratch<T>& scratch,
                     State<Accumulator<T>, Models>* states, Accumulator<T>* const* target_logits,
                     Accumulator<T>* const* kept_logits) {
  using Real = Accumulator<T>;
  for (int64_t r = 0; r < count; ++r) states[r * tiling.parts + part] = {};
  for (int64_t begin = tiling.part_begin(part); begin < tiling.part_end(part); begin += tiling.columns) {
    const int64_t width = std::min(tiling.columns, tiling.vocabulary - begin);
    for (int model = 0; model < Models; ++model) {
      const WeightRows<T> rows = weight_rows(heads[model].weight, begin, tiling.columns, scratch);
      pack_columns<T>(0, tiling.columns, rows.data, rows.stride,
                      {scratch.packed_weight[model].data(), hidden[model].stride, tiling.columns});
    }
    for (int64_t first = 0; first < count; first += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, count - first);
      Real* logits[Models];
      for (int model = 0; model < Models; ++model) {
        logits[model] = kept_logits == nullptr
                            ? scratch.logits[model].data()
                            : kept_logits[model] + begin * padded_rows(count) + first * tiling.columns;
        tile_logits(heads[model], hidden[model], first, rows, scratch.packed_weight[model].data(), begin, width, tiling,
                    scratch, logits[model]);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const Real* z[2] = {logits[0] + r * tiling.columns, logits[Models - 1] + r * tiling.columns};
        fold_tile_row(width, z, states[(first + r) * tiling.parts + part]);
        for (int64_t k = 0; k < candidates; ++k) {
          const int64_t place = (first + r) * candidates + k, column = target[place] - begin;
          if (column < 0 || column >= width) continue;
          for (int model = 0; model < Models; ++model) target_logits[model][place] = z[model][column];
        }
      }
    }
  }
  release_products<T>();
}

template <typename Real, int Models>
void write_stats(const State<Real, Models>* states, int64_t parts, const Real* const* target_logits,
                 const int64_t* target, int64_t candidates, int64_t ignore_index, const int64_t* rows, int64_t begin,
                 int64_t end, const StatsOutputs<Real>& outputs) {
  for (int64_t i = begin; i < end; ++i) {
    State<Real, Models> state = states[i * parts];
    for (int64_t part = 1; part < parts; ++part) merge(state, states[i * parts + part]);
    const SoftmaxState<Real>* model;
    const int64_t row = rows[i];
    if constexpr (Models == 2) {
      model = &state.model;
      outputs.base_entropy[row] = Real(state.base.entropy());
      outputs.base_lse[row] = Real(state.base.lse());
      outputs.kl[row] = Real(state.kl());
      outputs.reverse_kl[row] = Real(state.reverse_kl());
    } else {
      model = &state;
    }
    outputs.entropy[row] = Real(model->entropy());
    outputs.lse[row] = Real(model->lse());
    for (int64_t k = 0; k < candidates; ++k) {
      if (target[i * candidates + k] == ignore_index) continue;
      const double logp = model->logp(target_logits[0][i * candidates + k]);
      outputs.logp[row * candidates + k] = Real(logp);
      if constexpr (Models == 2) {
        const double base_logp = state.base.logp(target_logits[1][i * candidates + k]);
        outputs.base_logp[row * candidates + k] = Real(base_logp);
        outputs.delta_logp[row * candidates + k] = Real(logp - base_logp);
      }
    }
  }
}

#define DLOGP_INSTANTIATE_MODELS(T, Models)                                                                         \
  template void linear_logp_fwd<T, Models>(const Head*, const PackedRows<T>*, int64_t, const int64_t*, int64_t,     \
                                           const Tiling&, int64_t, TileScratch<T>&, State<Accumulator<T>, Models>*, \
                                           Accumulator<T>* const*, Accumulator<T>* const*);
#define DLOGP_INSTANTIATE(T)                                                                                    \
  template void gather_rows<T>(const Matrix&, const int64_t*, int64_t, int64_t, const PackedRows<T>&);          \
  template struct TileScratch<T>;                                                                               \
  template WeightRows<T> weight_rows<T>(const Matrix&, int64_t, int64_t, TileScratch<T>&);                      \
  template void tile_logits<T>(const Head&, const PackedRows<T>&, int64_t, int64_t, const T*, int64_t, int64_t, \
                               const Tiling&, TileScratch<T>&, Accumulator<T>*);                                \
  DLOGP_INSTANTIATE_MODELS(T, 1)                                                                                \
  DLOGP_INSTANTIATE_MODELS(T, 2)
DLOGP_INSTANTIATE(c10::BFloat16)
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE
#undef DLOGP_INSTANTIATE_MODELS

#define DLOGP_INSTANTIATE(Real, Models)                                                                            \
  template void write_stats<Real, Models>(const State<Real, Models>*, int64_t, const Real* const*, const int64_t*, \
                                          int64_t, int64_t, const int64_t*, int64_t, int64_t,                      \
                                          const StatsOutputs<Real>&);
DLOGP_INSTANTIATE(float, 1)
DLOGP_INSTANTIATE(float, 2)
DLOGP_INSTANTIATE(double, 1)
DLOGP_INSTANTIATE(double, 2)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
