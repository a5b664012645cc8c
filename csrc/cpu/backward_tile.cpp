#include "backward_tile.h"

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
  const WeightRows<T> rows = weight_rows(head.weight, tile.begin + column, kColumnBlock, scratch.weight_copy);
  if (buffers.packed_weight != nullptr)
    pack_columns<T>(column, kColumnBlock, rows.data, rows.stride, {buffers.packed_weight, stride, tiling.columns});
  if (buffers.packed_weight_rows != nullptr)
    pack_rows<T>(column, kColumnBlock, rows.data, rows.stride, {buffers.packed_weight_rows, tiling.columns, stride});
}

template <typename T, int Models>
void backward_rows(const Head* heads, const Tiling& tiling, const BackwardTile& tile, int64_t first,
                   const RowBlock& rows, const Upstream<Accumulator<T>>& upstream, const Accumulator<T>* const* logits,
                   TileScratch<T>& scratch, const BackwardBuffers<T>* buffers) {
  using Acc = Accumulator<T>;
  const int64_t columns = tiling.columns, count = std::min(tile.row_block, tile.count - first);
  for (int model = 0; model < Models; ++model) {
    const BackwardBuffers<T>& own = buffers[model];
    if (!own.wants_any()) continue;
    T* grad_logits = own.grad_logits + first * columns;
    Acc* bias_sums = own.grad_bias == nullptr ? nullptr : own.grad_bias_blocks + first / tile.row_block * columns;
    if (bias_sums != nullptr) std::fill_n(bias_sums, columns, Acc(0));
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = rows.rows[first + r];
      const int64_t* row_target = rows.target + (first + r) * upstream.candidates;
      const Acc* z = logits[model] + r * columns;
      const Acc* other_z = Models == 1 ? nullptr : logits[Models - 1 - model] + r * columns;
      const auto terms = upstream.terms(model, row, row_target, heads[model].transform);
      Acc* grad = scratch.grad.data();
      logits_gradient(upstream, model, row, row_target, heads[model].transform, terms, tile.begin, tile.width, z,
                      other_z, grad);
      if (bias_sums != nullptr) add_row(tile.width, grad, bias_sums);
      std::fill(grad + tile.width, grad + columns, Acc(0));
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
void backward_bias(const Tiling& tiling, const BackwardTile& tile, const BackwardBuffers<T>& buffers) {
  for (int64_t block = 0; block * tile.row_block < tile.count; ++block)
    add_row(tile.width, buffers.grad_bias_blocks + block * tiling.columns, buffers.grad_bias);
}

#define DLOGP_INSTANTIATE_MODELS(T, Models)                                                                         \
  template void backward_rows<T, Models>(const Head*, const Tiling&, const BackwardTile&, int64_t, const RowBlock&, \
                                         const Upstream<Accumulator<T>>&, const Accumulator<T>* const*,             \
                                         TileScratch<T>&, const BackwardBuffers<T>*);
#define DLOGP_INSTANTIATE(T)                                                                                       \
  template void pack_backward_weight<T>(const Head&, const Tiling&, const BackwardTile&, int64_t, TileScratch<T>&, \
                                        const BackwardBuffers<T>&);                                                \
  template void backward_bias<T>(const Tiling&, const BackwardTile&, const BackwardBuffers<T>&);                   \
  DLOGP_INSTANTIATE_MODELS(T, 1)                                                                                   \
  DLOGP_INSTANTIATE_MODELS(T, 2)
DLOGP_INSTANTIATE(c10::BFloat16)
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE
#undef DLOGP_INSTANTIATE_MODELS

}  // namespace dlogp
