// linear_logp and linear_delta_logp on the CPU: logits = hidden · weightᵀ tile by tile, folded at once into running
// states.
//
// Vocabulary is cut into tiles of `Tiling::columns`, tiles into parts; a part's state depends on nothing but its row,
// so rows and parts may be handed to threads in any way. `Models` is 1, or 2 for a pair (the model, then its base). T
// is the type of the products: bfloat16, float or double.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../common/logit_transform.h"
#include "../common/online_softmax.h"
#include "matrix.h"
#include "multiply.h"

namespace dlogp {

// One model's last layer; `bias` has one row, or no data.
struct Head {
  Matrix hidden, weight, bias;
  LogitTransform transform;

  int64_t width() const { return weight.columns; }
  int64_t vocabulary() const { return weight.rows; }
};

template <typename Real, int Models>
using State = std::conditional_t<Models == 1, SoftmaxState<Real>, PairState<Real>>;

// The outputs of the op, (N, K) or (N,); those of a pair are null for one model.
template <typename Real>
struct StatsOutputs {
  Real *logp, *entropy, *lse;
  Real *delta_logp, *base_logp, *base_entropy, *base_lse, *kl, *reverse_kl;
};

// How a vocabulary is cut; a function of the shapes of the weights alone.
struct Tiling {
  int64_t vocabulary, columns, parts;

  int64_t tiles() const { return (vocabulary + columns - 1) / columns; }
  int64_t part_begin(int64_t part) const { return part * tiles() / parts * columns; }
  int64_t part_end(int64_t part) const {
    const int64_t end = part_begin(part + 1);
    return end < vocabulary ? end : vocabulary;
  }
};

// What a tile has at most: columns, and bytes of packed weight.
struct TileSize {
  int64_t columns, bytes;
};
// Threads fold tiles on their own, so that a packed tile should stay in a core's second-level cache.
constexpr TileSize kForwardTile{256, 512 * 1024};
// Where gradients are formed, threads wait for one another three times a tile, so there should be few. Our own products
// read a tile panel by panel; those of bfloat16 take a whole one, and were measured with smaller ones only.
template <typename T>
constexpr TileSize kBackwardTile = sizeof(T) == 2 ? kForwardTile : TileSize{512, 2048 * 1024};

Tiling tile_vocabulary(int64_t vocabulary, int64_t width, int64_t element_size, TileSize most = kForwardTile);

constexpr int64_t kRowBlock = 64;
static_assert((kRowBlock & (kRowBlock - 1)) == 0, "padded_rows doubles up to it");

// Rows that a block of rows is padded to, so that few distinct product kernels of bfloat16 are needed.
int64_t padded_rows(int64_t rows);

// Row-major rows of `hidden`, gathered, converted and padded with zeros: (padded_rows(count), stride).
template <typename T>
struct PackedRows {
  int64_t stride = 0;
  T* data = nullptr;
};

template <typename T>
int64_t packed_width(int64_t width) {
  return round_up(width, kGroup<T>);
}

template <typename T>
void gather_rows(const Matrix& hidden, const int64_t* rows, int64_t begin, int64_t end, const PackedRows<T>& to);

// What one thread needs besides the packed rows.
template <typename T>
struct TileScratch {
  std::vector<T> weight_copy;
  PackedStorage<T> packed_weight[2];
  std::vector<Accumulator<T>> logits[2], bias, grad, grad_weight;

  void reserve(const Head* heads, int models, const Tiling& tiling, int64_t rows);
};

// Rows of the weight, packed_width each: in place where they fit, else in scratch.
template <typename T>
struct WeightRows {
  const T* data;
  int64_t stride;
};

// Rows [begin, begin + padded) of the weight, with zeros for those past the vocabulary; padded ≤ tiling.columns.
template <typename T>
WeightRows<T> weight_rows(const Matrix& weight, int64_t begin, int64_t padded, TileScratch<T>& scratch);

// logits (rows, tiling.columns) of one tile, transformed.
template <typename T>
void tile_logits(const Head& head, const PackedRows<T>& hidden, int64_t first_row, int64_t rows, const T* packed_weight,
                 int64_t begin, int64_t count, const Tiling& tiling, TileScratch<T>& scratch, Accumulator<T>* logits);

// Folds part `part` of the vocabulary for `count` gathered rows. `target` (count, candidates) are their targets.
// Writes states[row · parts + part], and target_logits[model][row · candidates + k] where the target lies in this part.
// If `kept_logits` is not null, each model's logits go there: (tiles, padded_rows(count), columns).
template <typename T, int Models>
void linear_logp_fwd(const Head* heads, const PackedRows<T>* hidden, int64_t count, const int64_t* target,
                     int64_t candidates, const Tiling& tiling, int64_t part, TileScratch<T>& scratch,
                     State<Accumulator<T>, Models>* states, Accumulator<T>* const* target_logits,
                     Accumulator<T>* const* kept_logits = nullptr);

// Merges the parts of gathered rows [begin, end) in their order and writes the statistics to places rows[i].
template <typename Real, int Models>
void write_stats(const State<Real, Models>* states, int64_t parts, const Real* const* target_logits,
                 const int64_t* target, int64_t candidates, int64_t ignore_index, const int64_t* rows, int64_t begin,
                 int64_t end, const StatsOutputs<Real>& outputs);

}  // namespace dlogp
