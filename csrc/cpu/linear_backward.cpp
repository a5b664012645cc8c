#include "linear_backward.h"

#include <algorithm>

namespace dlogp {
namespace {

template <typename T, int Models>
class LinearBackward {
  using Acc = Accumulator<T>;

 public:
  LinearBackward(const Head* heads, const KeptRows& kept, const Upstream<Acc>& upstream, int64_t workspace,
                 const HeadOutputs* outputs)
      : heads_(heads),
        kept_(kept),
        upstream_(upstream),
        workspace_(workspace),
        row_block_(backward_row_block(kept.count())) {
    const int64_t width = std::max(heads[0].width(), heads[Models - 1].width());
    tiling_ = tile_vocabulary(heads[0].vocabulary(), width, sizeof(T), kBackwardTile<T>);
    for (int model = 0; model < Models; ++model) {
      HeadStorage& own = storage_[model];
      own.stride = packed_width<T>(heads[model].width());
      own.out = outputs[model];
      if (own.out.bias) own.bias_sums.resize(tiling_.tiles() * tiling_.columns);
    }
    const int64_t row_bytes =
        sizeof(T) * 2 * (storage_[0].stride + storage_[Models - 1].stride + Models * tiling_.columns);
    max_rows_ = std::clamp(workspace / 8 / row_bytes / kRowBlock * kRowBlock, kRowBlock, kMaxRows);
  }

  void run() {
    // Accumulators for all rows of grad_hidden and for some tiles of grad_weight serve both with one recomputation of
    // the logits. Where the former do not fit, each is formed in a pass of its own.
    const bool any_hidden = total(&HeadStorage::hidden_wanted) > 0, any_weight = total(&HeadStorage::weight_wanted) > 0;
    const int64_t hidden_bytes = kept_.count() * int64_t(sizeof(Acc)) * total(&HeadStorage::hidden_wanted);
    if (any_hidden && any_weight && hidden_bytes > workspace_ / 2) {
      pass(true, false);
      pass(false, true);
    } else {
      pass(any_hidden, any_weight);
    }
  }

 private:
  struct HeadStorage {
    int64_t stride = 0;
    HeadOutputs out;
    std::vector<T> hidden_rows, hidden_columns, grad_logits;
    PackedStorage<T> packed_weight, packed_weight_rows, packed_grad_logits;
    std::vector<Acc> grad_hidden, grad_weight, bias_blocks, bias_sums;

    int64_t hidden_wanted() const { return out.hidden ? stride : 0; }
    int64_t weight_wanted() const { return out.weight || out.bias ? stride : 0; }
  };

  int64_t total(int64_t (HeadStorage::*wanted)() const) const {
    int64_t sum = 0;
    for (int model = 0; model < Models; ++model) {
      const HeadStorage& own = storage_[model];  // GCC's bounds sanitizer calls the method of another element otherwise
      sum += (own.*wanted)();
    }
    return sum;
  }

  void pass(bool with_hidden, bool with_weight) {
    with_hidden_ = with_hidden;
    with_weight_ = with_weight;
    const int64_t blocks = (kept_.count() + max_rows_ - 1) / max_rows_;
    const int64_t accumulated_rows = padded(with_weight ? kept_.count() : std::min(max_rows_, kept_.count()));
    const int64_t tiles_at_once = with_weight ? accumulated_tiles(blocks) : tiling_.tiles();
    for (HeadStorage& own : storage_) {
      if (with_hidden && own.out.hidden) own.grad_hidden.assign(accumulated_rows * own.stride, Acc(0));
      if (with_weight && own.out.weight) own.grad_weight.resize(tiles_at_once * tiling_.columns * own.stride);
    }
    for (int64_t first_tile = 0; first_tile < tiling_.tiles(); first_tile += tiles_at_once) {
      const int64_t end_tile = std::min(first_tile + tiles_at_once, tiling_.tiles());
      for (int64_t first = 0; first < kept_.count(); first += max_rows_) {
        const RowBlock rows = kept_.block(first, max_rows_);
        if (blocks > 1 || first_tile == 0) gather(rows);
        for (int64_t tile = first_tile; tile < end_tile; ++tile) one_tile(tile, tile - first_tile, first, rows);
        if (!with_weight) finish_hidden(rows);
      }
      if (with_weight) finish_weight(first_tile, end_tile);
    }
    if (with_weight && with_hidden) finish_hidden(kept_.block(0, kept_.count()));
    if (with_weight) finish_bias();
  }

  // How many tiles of grad_weight a quarter of the workspace holds; one where each tile sees all rows at once.
  int64_t accumulated_tiles(int64_t blocks) const {
    const int64_t tile_bytes = int64_t(sizeof(Acc)) * tiling_.columns * total(&HeadStorage::weight_wanted);
    return blocks == 1 ? 1 : std::clamp<int64_t>(workspace_ / 4 / tile_bytes, 1, tiling_.tiles());
  }

  int64_t padded(int64_t count) const { return round_up(count, row_block_); }

  void gather(const RowBlock& rows) {
    const int64_t inner = padded(rows.count);
    for (int model = 0; model < Models; ++model) {
      HeadStorage& own = storage_[model];
      pack_hidden(heads_[model].hidden, rows.rows, rows.count, inner, own.hidden_rows);
      if (with_weight_ && own.out.weight) {
        own.hidden_columns.resize(inner * own.stride);
        transpose(inner, own.stride, own.hidden_rows.data(), own.stride, own.hidden_columns.data(), inner);
      }
    }
  }

  // Tile `index` of the vocabulary, whose accumulators are at `place`, and the rows from `first` on.
  void one_tile(int64_t index, int64_t place, int64_t first, const RowBlock& rows) {
    const int64_t begin = index * tiling_.columns, width = std::min(tiling_.columns, tiling_.vocabulary - begin);
    const BackwardTile tile{begin, width, rows.count, padded(rows.count), row_block_};
    BackwardBuffers<T> buffers[Models];
    for (int model = 0; model < Models; ++model)
      buffers[model] = buffers_of(storage_[model], tile, index, place, first);
    const int64_t column_blocks = tiling_.columns / kColumnBlock;
    for_each(Models * column_blocks, 1, [&](int64_t block) {
      const int64_t model = block / column_blocks, column = block % column_blocks * kColumnBlock;
      pack_backward_weight(heads_[model], tiling_, tile, column, own_scratch(), buffers[model]);
    });
    at::parallel_for(0, tile.row_blocks(), 1, [&](int64_t begin_block, int64_t end_block) {
      for (int64_t block = begin_block; block < end_block; ++block)
        recomputed_rows(tile, block * row_block_, rows, buffers);
      release_products<T>();
    });
    for (const BackwardBuffers<T>& own : buffers) {
      if (own.grad_bias != nullptr) backward_bias(tiling_, tile, own);
      if (own.grad_weight != nullptr) add_weight_gradient(tile, first > 0, own);
    }
  }

  void recomputed_rows(const BackwardTile& tile, int64_t first, const RowBlock& rows,
                       const BackwardBuffers<T>* buffers) {
    TileScratch<T>& scratch = own_scratch();
    const Acc* logits[Models];
    for (int model = 0; model < Models; ++model) {
      tile_logits(heads_[model], buffers[model].hidden, first, std::min(row_block_, tile.count - first),
                  buffers[model].packed_weight, tile.begin, tile.width, tiling_, scratch, scratch.logits[model].data());
      logits[model] = scratch.logits[model].data();
    }
    backward_rows<T, Models>(heads_, tiling_, tile, first, rows, upstream_, logits, scratch, buffers);
  }

  void add_weight_gradient(const BackwardTile& tile, bool accumulate, const BackwardBuffers<T>& buffers) {
    const int64_t stride = buffers.hidden.stride, columns = tiling_.columns;
    at::parallel_for(0, (stride + kRowBlock - 1) / kRowBlock, 1, [&](int64_t begin_block, int64_t end_block) {
      for (int64_t block = begin_block; block < end_block; ++block) {
        const int64_t begin = block * kRowBlock, end = std::min(stride, begin + kRowBlock);
        multiply({end - begin, columns, tile.inner, tile.inner, columns, columns},
                 buffers.hidden_columns + begin * tile.inner, buffers.packed_grad_logits,
                 buffers.grad_weight + begin * columns, accumulate);
      }
      release_products<T>();
    });
  }

  BackwardBuffers<T> buffers_of(HeadStorage& own, const BackwardTile& tile, int64_t index, int64_t place,
                                int64_t first) {
    BackwardBuffers<T> buffers;
    buffers.hidden = {own.stride, own.hidden_rows.data()};
    own.packed_weight.resize(Packed<T>::size(own.stride, tiling_.columns));
    buffers.packed_weight = own.packed_weight.data();
    own.grad_logits.resize(tile.inner * tiling_.columns);
    buffers.grad_logits = own.grad_logits.data();
    if (with_hidden_ && own.out.hidden) {
      own.packed_weight_rows.resize(Packed<T>::size(tiling_.columns, own.stride));
      buffers.packed_weight_rows = own.packed_weight_rows.data();
      buffers.grad_hidden = own.grad_hidden.data() + (with_weight_ ? first * own.stride : 0);
    }
    if (with_weight_ && own.out.weight) {
      own.packed_grad_logits.resize(Packed<T>::size(tile.inner, tiling_.columns));
      buffers.hidden_columns = own.hidden_columns.data();
      buffers.packed_grad_logits = own.packed_grad_logits.data();
      buffers.grad_weight = own.grad_weight.data() + place * own.stride * tiling_.columns;
    }
    if (with_weight_ && own.out.bias) {
      own.bias_blocks.resize(tile.row_blocks() * tiling_.columns);
      buffers.grad_bias_blocks = own.bias_blocks.data();
      buffers.grad_bias = own.bias_sums.data() + index * tiling_.columns;
    }
    return buffers;
  }

  TileScratch<T>& own_scratch() {
    TileScratch<T>& own = scratch_.own();
    own.reserve(heads_, Models, tiling_, row_block_);
    return own;
  }

  // Writes the accumulated rows and clears them for the next block.
  void finish_hidden(const RowBlock& rows) {
    for (HeadStorage& own : storage_) {
      if (!own.out.hidden) continue;
      for_each(rows.count, 64, [&](int64_t i) {
        write_row(own.out.hidden, rows.rows[i], 0, own.out.hidden.columns, own.grad_hidden.data() + i * own.stride);
      });
      std::fill(own.grad_hidden.begin(), own.grad_hidden.end(), Acc(0));
    }
  }

  // Writes the accumulated tiles [first_tile, end_tile) of grad_weight, transposed, to their rows.
  void finish_weight(int64_t first_tile, int64_t end_tile) {
    const int64_t column_blocks = tiling_.columns / kColumnBlock;
    for (HeadStorage& own : storage_) {
      if (!own.out.weight) continue;
      for_each((end_tile - first_tile) * column_blocks, 1, [&](int64_t block) {
        const int64_t tile = block / column_blocks, column = block % column_blocks * kColumnBlock;
        const Acc* accumulators = own.grad_weight.data() + tile * tiling_.columns * own.stride + column;
        std::vector<Acc>& rows = own_scratch().grad_weight;
        rows.resize(kColumnBlock * own.stride);
        transpose(own.stride, kColumnBlock, accumulators, tiling_.columns, rows.data(), own.stride);
        const int64_t begin = (first_tile + tile) * tiling_.columns + column;
        const int64_t count = std::min(kColumnBlock, tiling_.vocabulary - begin);
        for (int64_t v = 0; v < count; ++v)
          write_row(own.out.weight, begin + v, 0, own.out.weight.columns, rows.data() + v * own.stride);
      });
    }
  }

  void finish_bias() {
    for (HeadStorage& own : storage_)
      if (own.out.bias) write_row(own.out.bias, 0, 0, own.out.bias.columns, own.bias_sums.data());
  }

  const Head* heads_;
  const KeptRows& kept_;
  const Upstream<Acc>& upstream_;
  const int64_t workspace_, row_block_;
  Tiling tiling_;
  HeadStorage storage_[Models];
  int64_t max_rows_;
  bool with_hidden_ = false, with_weight_ = false;
  PerThread<TileScratch<T>> scratch_;
};

}  // namespace

template <typename T, int Models>
void linear_backward(const Head* heads, const KeptRows& kept, const Upstream<Accumulator<T>>& upstream,
                     int64_t workspace, const HeadOutputs* outputs) {
  if (kept.count() == 0 || !std::any_of(outputs, outputs + Models, [](const HeadOutputs& x) { return x.any(); }))
    return;
  if constexpr (Models == 2) {
    if (!upstream.has_divergence()) {  // then neither gradient needs the other model
      for (int model = 0; model < 2; ++model)
        linear_backward<T, 1>(heads + model, kept, upstream.of_model(model), workspace, outputs + model);
      return;
    }
  }
  LinearBackward<T, Models>(heads, kept, upstream, workspace, outputs).run();
}

#define DLOGP_INSTANTIATE(T, Models)                                                                               \
  template void linear_backward<T, Models>(const Head*, const KeptRows&, const Upstream<Accumulator<T>>&, int64_t, \
                                           const HeadOutputs*);
DLOGP_INSTANTIATE(c10::BFloat16, 1)
DLOGP_INSTANTIATE(c10::BFloat16, 2)
DLOGP_INSTANTIATE(float, 1)
DLOGP_INSTANTIATE(float, 2)
DLOGP_INSTANTIATE(double, 1)
DLOGP_INSTANTIATE(double, 2)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
