#include "linear_logp_bwd.h"

#include <algorithm>

namespace dlogp {
namespace {

template <typename T>
void round_to(int64_t count, const Accumulator<T>* from, T* to) {
  if constexpr (sizeof(T) == 2)
    round_row(count, from, reinterpret_cast<uint16_t*>(to));
  else
    std::copy_n(from, count, to);
}

}  // namespace

template <typename T>
void pack_backward_weight(const Head& head, const Tiling& tiling, const BackwardTile& tile, int64_t column,
                          TileScratch<T>& scratch, const BackwardBuffers<T>& buffers) {
  const int64_t stride = buffers.hidden.stride;
  const WeightRows<T> rows = weight_rows(head.weight, tile.begin + column, kColumnBlock, scratch);
  if (buffers.packed_weight != nullptr)
    pack_columns<T>(column, kColumnBlock, rows.data, rows.stride, {buffers.packed_weight, stride, tiling.columns});
  if (buffers.packed_weight_rows != nullptr)
    pack_rows<T>(column, kColumnBlock, rows.data, rows.stride, {buffers.packed_weight_rows, tiling.columns, stride});
}

template <typename T, int Models>
void linear_logp_bwd_rows(const Head* heads, const Tiling& tiling, const BackwardTile& tile, int64_t first,
                          const int64_t* rows, const int64_t* target, const Upstream<Accumulator<T>>& upstream,
                          TileScratch<T>& scratch, const BackwardBuffers<T>* buffers) {
  const int64_t count = std::min(tile.row_block, tile.count - first);
  const Accumulator<T>* logits[Models];
  for (int model = 0; model < Models; ++model) {
    tile_logits(heads[model], buffers[model].hidden, first, count, buffers[model].packed_weight, tile.begin, tile.width,
                tiling, scratch, scratch.logits[model].data());
    logits[model] = scratch.logits[model].data();
  }
  linear_logp_bwd_logits<T, Models>(heads, tiling, tile, first, rows, target, upstream, logits, scratch, buffers);
}

template <typename T, int Models>
void linear_logp_bwd_logits(const Head* heads, const Tiling& tiling, const BackwardTile& tile, int64_t first,
                            const int64_t* rows, const int64_t* target, const Upstream<Accumulator<T>>& upstream,
                            const Accumulator<T>* const* logits, TileScratch<T>& scratch,
                            const BackwardBuffers<T>* buffers) {
  using Real = Accumulator<T>;
  const int64_t columns = tiling.columns, count = std::min(tile.row_block, tile.count - first);
  for (int model = 0; model < Models; ++model) {
    const BackwardBuffers<T>& own = buffers[model];
    if (!own.wants_any()) continue;
    T* grad_logits = own.grad_logits + first * columns;
    Real* bias_sums = own.grad_bias == nullptr ? nullptr : own.grad_bias_blocks + first / tile.row_block * columns;
    if (bias_sums != nullptr) std::fill_n(bias_sums, columns, Real(0));
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = rows[first + r];
      const int64_t* row_target = target + (first + r) * upstream.candidates;
      const Real* z = logits[model] + r * columns;
      const Real* other_z = Models == 1 ? nullptr : logits[Models - 1 - model] + r * columns;
      const auto terms = upstream.terms(model, row, row_target, heads[model].transform);
      Real* grad = scratch.grad.data();
      logits_gradient(upstream, model, row, row_target, heads[model].transform, terms, tile.begin, tile.width, z,
                      other_z, grad);
      if (bias_sums != nullptr) add_row(tile.width, grad, bias_sums);
      std::fill(grad + tile.width, grad + columns, Real(0));
      round_to(columns, grad, grad_logits + r * columns);
    }
    std::fill(grad_logits + count * columns, grad_logits + tile.row_block * columns, T(0));
    if (own.packed_grad_logits != nullptr)
      pack_rows<T>(first, tile.row_block, grad_logits, columns, {own.packed_grad_logits, tile.inner, columns});
    if (own.grad_hidden != nullptr) {
      const int64_t stride = own.hidden.stride;
      multiply({tile.row_block, stride, columns, columns, stride, stride}, grad_logits, own.packed_weight_rows,
               own.grad_hidden + first * stride, true);
    }
  }
}

template <typename T>
void linear_logp_bwd_weight(const Tiling& tiling, const BackwardTile& tile, int64_t begin, int64_t end, bool accumulate,
                            const BackwardBuffers<T>& buffers) {
  const int64_t columns = tiling.columns;
  multiply({end - begin, columns, tile.inner, tile.inner, columns, columns},
           buffers.hidden_columns + begin * tile.inner, buffers.packed_grad_logits,
           buffers.grad_weight + begin * columns, accumulate);
}

template <typename T>
void linear_logp_bwd_bias(const Tiling& tiling, const BackwardTile& tile, const BackwardBuffers<T>& buffers) {
  for (int64_t block = 0; block * tile.row_block < tile.count; ++block)
    add_row(tile.width, buffers.grad_bias_blocks + block * tiling.columns, buffers.grad_bias);
}

template <typename T>
void write_weight_gradient(const Accumulator<T>* accumulators, int64_t stride, const Tiling& tiling, int64_t begin,
                           int64_t column, TileScratch<T>& scratch, const Output& output) {
  scratch.grad_weight.resize(kColumnBlock * stride);
  Accumulator<T>* rows = scratch.grad_weight.data();
  transpose(stride, kColumnBlock, accumulators + column, tiling.columns, rows, stride);
  const int64_t count = std::min(kColumnBlock, tiling.vocabulary - begin - column);
  for (int64_t v = 0; v < count; ++v) write_row(output, begin + column + v, 0, output.columns, rows + v * stride);
}

#define DLOGP_INSTANTIATE_MODELS(T, Models)                                                                      \
  template void linear_logp_bwd_rows<T, Models>(const Head*, const Tiling&, const BackwardTile&, int64_t,        \
                                                const int64_t*, const int64_t*, const Upstream<Accumulator<T>>&, \
                                                TileScratch<T>&, const BackwardBuffers<T>*);                     \
  template void linear_logp_bwd_logits<T, Models>(                                                               \
      const Head*, const Tiling&, const BackwardTile&, int64_t, const int64_t*, const int64_t*,                  \
      const Upstream<Accumulator<T>>&, const Accumulator<T>* const*, TileScratch<T>&, const BackwardBuffers<T>*);
#define DLOGP_INSTANTIATE(T)                                                                                       \
  template void pack_backward_weight<T>(const Head&, const Tiling&, const BackwardTile&, int64_t, TileScratch<T>&, \
                                        const BackwardBuffers<T>&);                                                \
  template void linear_logp_bwd_weight<T>(const Tiling&, const BackwardTile&, int64_t, int64_t, bool,              \
                                          const BackwardBuffers<T>&);                                              \
  template void linear_logp_bwd_bias<T>(const Tiling&, const BackwardTile&, const BackwardBuffers<T>&);            \
  template void write_weight_gradient<T>(const Accumulator<T>*, int64_t, const Tiling&, int64_t, int64_t,          \
                                         TileScratch<T>&, const Output&);                                          \
  DLOGP_INSTANTIATE_MODELS(T, 1)                                                                                   \
  DLOGP_INSTANTIATE_MODELS(T, 2)
DLOGP_INSTANTIATE(c10::BFloat16)
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE
#undef DLOGP_INSTANTIATE_MODELS

}  // namespace dlogp
