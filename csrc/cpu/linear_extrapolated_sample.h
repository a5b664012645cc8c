// linear_extrapolated_sample on the CPU: tiles of both models' logits, each folded at once into the softmax state of
// its row and into the winners of its draws. A filter has to see a whole row of logits before a token is drawn: then
// the tiles of some rows are kept, and drawn from as extrapolated_sample.h does.
//
// A batch that decodes has few rows, so the time is that of reading the weights, which therefore are read where they
// are: packing a tile of them, as linear_forward.h does for many rows, would take longer than its product.
//
// Whether a row is to be replaced is known only when its last tile was seen, so both draws run along. So does the
// stand-in for z_B = −inf, the row's least finite z_B: tokens of this kind, which it shifts all alike, have a winner of
// their own. Winners, the least z_B and what makes a row bad do not depend on the order of tiles; a thread keeps them
// from split to split, so that a good score soon rules most blocks out.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "dot_products.h"
#include "extrapolated_sample.h"
#include "fold.h"
#include "linear_tile.h"
#include "winner.h"

namespace dlogp {

// A winner with its logits at temperature 1.
template <typename Acc>
struct DrawnToken {
  Winner winner;
  Acc z = 0, base_z = 0;
};

// What a thread has seen of a row, besides the states.
template <typename Acc>
struct RowDraws {
  DrawnToken<Acc> draft, replacement;
  // Of the tokens with z_B = −inf, scored without the stand-in, if γ > 0.
  DrawnToken<Acc> unlikely;
  Acc least = std::numeric_limits<Acc>::infinity();
  bool bad = false;  // NaN or +inf in a logit
};

// Hidden states of one model, converted, in rows that begin a line of the cache.
template <typename T>
struct GatheredHidden {
  int64_t inner = 0, stride = 0, rows = 0;
  PackedStorage<T> data;

  int64_t block_rows(int64_t first) const { return std::min(kRowBlock, rows - first); }
  const T* block(int64_t first) const { return data.data() + first * stride; }
};

// What one thread needs besides.
template <typename T>
struct DrawScratch {
  std::vector<T> weight;
  std::vector<Accumulator<T>> logits[2], bias;
};

// Of a Tiling; a row of a tile has its scores on the stack.
constexpr int64_t kMostColumns = 256;

template <typename Acc>
class TileRow {
 public:
  TileRow(const SampleOptions& options, const RowNoise& noise, int64_t begin, int64_t count, const Acc* z,
          const Acc* base_z, PairState<Acc>& state, RowDraws<Acc>& draws)
      : options_(options),
        noise_(noise),
        begin_(begin),
        count_(count),
        z_(z),
        base_z_(base_z),
        state_(state),
        draws_(draws) {}

  void fold_and_draw() {
    const Finiteness model = block_maxima(count_, z_, maxima_), base = block_maxima(count_, base_z_, base_maxima_);
    if (model.special || base.special) draws_.bad = true;
    if (draws_.bad) return;
    fold_for(options_.criterion, count_, z_, base_z_, state_);
    if (options_.draft_from_base) {
      draw_from(base_z_, base_maxima_, Stream::kDraft, draws_.draft);
    } else {
      draw_from(z_, maxima_, Stream::kDraft, draws_.draft);
    }
    if (options_.criterion == Criterion::kNone) return;
    if (options_.gamma == 0) {
      draw_from(z_, maxima_, Stream::kReplacement, draws_.replacement);
    } else {
      draw_extrapolated();
    }
  }

 private:
  // From one model's logits, which are the scores as they are at temperatures 0 and 1.
  void draw_from(const Acc* z, const Acc* maxima, Stream stream, DrawnToken<Acc>& drawn) {
    if (!divides()) return draw(z, maxima, stream, drawn);
    std::copy_n(maxima, blocks(), score_maxima_);
    divide_scores(blocks(), Acc(options_.temperature),
                  score_maxima_);  // the largest quotients are those of the largest
    if (!any_may_win(score_maxima_, drawn.winner)) return;
    std::copy_n(z, count_, scores_);
    divide_scores(count_, Acc(options_.temperature), scores_);
    draw(scores_, score_maxima_, stream, drawn);
  }

  void draw_extrapolated() {
    const Acc gamma = Acc(options_.gamma);
    draws_.least = std::min(draws_.least, least_finite(count_, base_z_));
    const bool some_unlikely = extrapolated_scores(count_, gamma, z_, base_z_, scores_);
    draw_from_scores(draws_.replacement);
    if (!some_unlikely) return;
    unlikely_scores(count_, gamma, z_, base_z_, scores_);
    draw_from_scores(draws_.unlikely);
  }

  void draw_from_scores(DrawnToken<Acc>& drawn) {
    if (divides()) divide_scores(count_, Acc(options_.temperature), scores_);
    block_maxima(count_, scores_, score_maxima_);
    draw(scores_, score_maxima_, Stream::kReplacement, drawn);
  }

  void draw(const Acc* s, const Acc* maxima, Stream stream, DrawnToken<Acc>& drawn) {
    const bool greedy = options_.temperature == 0;
    const NoiseKey key = noise_.key(options_.seed, stream);
    const int64_t before = drawn.winner.token;
    for (int64_t block = 0; block < blocks(); ++block) {
      const int64_t offset = block * kBlockTokens, first = begin_ + offset;
      const int64_t size = std::min(kBlockTokens, count_ - offset);
      if (greedy) {
        if (maxima[block] > kMaskedLogit<Acc>) compare_block(first, s + offset, size, maxima[block], drawn.winner);
      } else if (may_win_block(maxima[block], drawn.winner)) {
        score_block(first, s + offset, size, kMaskedLogit<Acc>, key, drawn.winner);
      }
    }
    if (drawn.winner.token == before) return;
    drawn.z = z_[drawn.winner.token - begin_];
    drawn.base_z = base_z_[drawn.winner.token - begin_];
  }

  bool any_may_win(const Acc* maxima, const Winner& winner) const {
    return std::any_of(maxima, maxima + blocks(), [&](Acc max) { return may_win_block(max, winner); });
  }

  bool may_win_block(Acc max, const Winner& winner) const {
    return max > kMaskedLogit<Acc> && max + kLargestGumbel >= winner.score;
  }

  bool divides() const { return options_.temperature != 0 && options_.temperature != 1; }
  int64_t blocks() const { return sample_blocks(count_); }

  const SampleOptions& options_;
  const RowNoise& noise_;
  const int64_t begin_, count_;
  const Acc *z_, *base_z_;
  PairState<Acc>& state_;
  RowDraws<Acc>& draws_;
  Acc maxima_[kMostColumns / kBlockTokens], base_maxima_[kMostColumns / kBlockTokens];
  Acc score_maxima_[kMostColumns / kBlockTokens];
  Acc scores_[kMostColumns];
};

template <typename Acc>
void merge(DrawnToken<Acc>& into, const DrawnToken<Acc>& other) {
  if (other.winner.token >= 0 && into.winner.loses_to(other.winner.score, other.winner.token)) into = other;
}

template <typename Acc>
void merge(RowDraws<Acc>& into, const RowDraws<Acc>& other) {
  merge(into.draft, other.draft);
  merge(into.replacement, other.replacement);
  merge(into.unlikely, other.unlikely);
  into.least = std::min(into.least, other.least);
  into.bad |= other.bad;
}

// The winner among the tokens with z_B = −inf, now that the stand-in for it is known, scored as all others are.
template <typename Acc>
DrawnToken<Acc> with_stand_in(DrawnToken<Acc> drawn, Acc least, const RowNoise& noise, const SampleOptions& options) {
  const bool greedy = options.temperature == 0;
  const Acc temperature = greedy ? 1 : Acc(options.temperature);
  const Acc s = extrapolated(drawn.z, drawn.base_z, Acc(options.gamma), least) / temperature;
  constexpr Acc lowest = std::numeric_limits<Acc>::lowest();
  drawn.winner.score = s > lowest ? s : lowest;  // of NaN too
  if (!greedy) {
    const NoiseKey key = noise.key(options.seed, Stream::kReplacement);
    drawn.winner.score += gumbel<double>(noise_bits(key, drawn.winner.token));
  }
  return drawn;
}

template <typename Acc>
void set_token(const DrawnToken<Acc>& drawn, const PairState<Acc>& state, SampledRow<Acc>& result) {
  result.token = drawn.winner.token;
  result.logp = Acc(state.model.logp(drawn.z));
  result.base_logp = Acc(state.base.logp(drawn.base_z));
}

// products (rows, tiling.columns) of `count` tokens from `begin` on and a block of rows.
template <typename T>
void multiply_tile(const Matrix& weight, const GatheredHidden<T>& hidden, int64_t first, int64_t begin, int64_t count,
                   const Tiling& tiling, DrawScratch<T>& scratch, Accumulator<T>* products) {
  for (int64_t v = 0; v < count; v += kDotTokens) {
    const WeightRows<T> rows = weight_rows(weight, begin + v, kDotTokens, scratch.weight);
    dot_products(std::min(kDotTokens, count - v), hidden.block_rows(first), hidden.inner, rows.data, rows.stride,
                 hidden.block(first), hidden.stride, products + v, tiling.columns);
  }
}

// The logits of one model, a tile and a block of rows, at temperature 1.
template <typename T>
const Accumulator<T>* tile_logits(const Head& head, const GatheredHidden<T>& hidden, int64_t first, int64_t begin,
                                  int64_t count, const Tiling& tiling, DrawScratch<T>& scratch,
                                  std::vector<Accumulator<T>>& logits) {
  logits.resize(kRowBlock * tiling.columns);
  multiply_tile(head.weight, hidden, first, begin, count, tiling, scratch, logits.data());
  const Accumulator<T>* bias = bias_of(head, begin, count, scratch.bias);
  for (int64_t r = 0; r < hidden.block_rows(first); ++r)
    transform_row(head.transform, count, bias, logits.data() + r * tiling.columns);
  return logits.data();
}

// Rows [first, first + count) of `hidden`.
template <typename T>
void gather_hidden(const Matrix& hidden, int64_t first, int64_t count, GatheredHidden<T>& gathered) {
  gathered.inner = packed_width<T>(hidden.columns);
  gathered.stride = round_up(hidden.columns, kPanel<T>);
  gathered.rows = count;
  gathered.data.assign(count * gathered.stride, T(0));
  for (int64_t i = 0; i < count; ++i)
    read_row(hidden, first + i, 0, hidden.columns, &gathered.data[i * gathered.stride]);
}

// Folds one split of the vocabulary for the gathered rows, whose noise is `noise`, into states[row · splits + split]
// and draws[row].
template <typename T>
void fold_and_draw_split(const Head* heads, const GatheredHidden<T>* hidden, const RowNoise* noise,
                         const SampleOptions& options, const Tiling& tiling, int64_t split, DrawScratch<T>& scratch,
                         PairState<Accumulator<T>>* states, RowDraws<Accumulator<T>>* draws) {
  using Acc = Accumulator<T>;
  const int64_t count = hidden[0].rows;
  for (int64_t row = 0; row < count; ++row) states[row * tiling.splits + split] = {};
  for (int64_t begin = tiling.split_begin(split); begin < tiling.split_end(split); begin += tiling.columns) {
    const int64_t width = std::min(tiling.columns, tiling.vocabulary - begin);
    for (int64_t first = 0; first < count; first += kRowBlock) {
      const Acc* z[2];
      for (int model = 0; model < 2; ++model)
        z[model] =
            tile_logits(heads[model], hidden[model], first, begin, width, tiling, scratch, scratch.logits[model]);
      for (int64_t r = 0; r < hidden[0].block_rows(first); ++r) {
        const int64_t row = first + r, place = r * tiling.columns;
        TileRow<Acc>(options, noise[row], begin, width, z[0] + place, z[1] + place, states[row * tiling.splits + split],
                     draws[row])
            .fold_and_draw();
      }
    }
  }
  for (int64_t row = 0; row < count; ++row) settle(states[row * tiling.splits + split]);
}

// The row of `splits` states, merged in their order, and of the draws of `threads` threads, `stride` apart.
template <typename Acc>
SampledRow<Acc> finish_sample(const PairState<Acc>* states, int64_t splits, const RowDraws<Acc>* draws, int64_t threads,
                              int64_t stride, const RowNoise& noise, const SampleOptions& options) {
  SampledRow<Acc> result;
  RowDraws<Acc> drawn;
  for (int64_t thread = 0; thread < threads; ++thread) merge(drawn, draws[thread * stride]);
  if (drawn.bad) return result;
  PairState<Acc> state = states[0];
  for (int64_t split = 1; split < splits; ++split) merge(state, states[split]);
  if (state.model.empty() || state.base.empty()) return result;
  set_token(drawn.draft, state, result);
  result.draft_token = result.token;
  result.delta_logp = result.logp - result.base_logp;
  result.selected = is_selected(options, state, result.delta_logp, noise);
  if (!result.selected) return result;
  if (drawn.unlikely.winner.token >= 0)
    merge(drawn.replacement, with_stand_in(drawn.unlikely, drawn.least, noise, options));
  set_token(drawn.replacement, state, result);
  return result;
}

// Of both heads, in blocks of rows that the workspace holds; the vocabulary is shared out among the threads.
template <typename T>
void fold_and_draw(const Head* heads, const RowIdentities& identities, const SampleOptions& options, int64_t workspace,
                   const SampleOutputs<Accumulator<T>>& outputs) {
  using Acc = Accumulator<T>;
  const int64_t width = heads[0].width() + heads[1].width(), all = heads[0].hidden.rows;
  const Tiling tiling = tile_vocabulary(heads[0].vocabulary(), width, sizeof(T));
  const int64_t threads = thread_slots();
  const int64_t row_bytes = width * int64_t(sizeof(T)) + tiling.splits * int64_t(sizeof(PairState<Acc>)) +
                            threads * int64_t(sizeof(RowDraws<Acc>));
  const int64_t max_rows = std::clamp(workspace / 8 / row_bytes / kRowBlock * kRowBlock, kRowBlock, kMaxRows);
  PerThread<DrawScratch<T>> scratch;
  GatheredHidden<T> hidden[2];
  std::vector<RowNoise> noise(std::min(max_rows, all));
  std::vector<PairState<Acc>> states(noise.size() * tiling.splits);
  std::vector<RowDraws<Acc>> draws;
  for (int64_t first = 0; first < all; first += max_rows) {
    const int64_t count = std::min(max_rows, all - first);
    for (int64_t i = 0; i < count; ++i) noise[i] = identities.of(first + i);
    for (int model = 0; model < 2; ++model) gather_hidden(heads[model].hidden, first, count, hidden[model]);
    draws.assign(threads * count, {});
    for_each(tiling.splits, 1, [&](int64_t split) {
      fold_and_draw_split(heads, hidden, noise.data(), options, tiling, split, scratch.own(), states.data(),
                          draws.data() + own_slot(threads) * count);
    });
    for_each(count, 64, [&](int64_t i) {
      outputs.set(first + i, finish_sample(states.data() + i * tiling.splits, tiling.splits, draws.data() + i, threads,
                                           count, noise[i], options));
    });
  }
}

// The same from rows of logits, of which half of the workspace holds as many as are drawn from at a time.
template <typename T>
void keep_and_draw(const Head* heads, const RowIdentities& identities, const SampleOptions& options, int64_t workspace,
                   const SampleOutputs<Accumulator<T>>& outputs) {
  using Acc = Accumulator<T>;
  const int64_t vocabulary = heads[0].vocabulary(), all = heads[0].hidden.rows;
  const Tiling tiling = tile_vocabulary(vocabulary, heads[0].width() + heads[1].width(), sizeof(T));
  const int64_t fitting = workspace / 2 / (2 * vocabulary * int64_t(sizeof(Acc)));
  const int64_t max_rows = std::clamp<int64_t>(fitting, 1, kRowBlock), most = std::min(max_rows, all);
  PerThread<DrawScratch<T>> scratch;
  GatheredHidden<T> hidden;
  std::unique_ptr<Acc[]> kept[2];  // (rows, vocabulary); not a vector, which would be filled with zeros first
  for (auto& rows : kept) rows.reset(new Acc[most * vocabulary]);
  for (int64_t first = 0; first < all; first += max_rows) {
    const int64_t count = std::min(max_rows, all - first);
    Matrix logits[2];
    for (int model = 0; model < 2; ++model) {
      gather_hidden(heads[model].hidden, first, count, hidden);
      at::parallel_for(0, tiling.tiles(), 1, [&](int64_t tile, int64_t end_tile) {
        DrawScratch<T>& own = scratch.own();
        for (; tile < end_tile; ++tile) {
          const int64_t begin = tile * tiling.columns, width = std::min(tiling.columns, vocabulary - begin);
          const Acc* z = tile_logits(heads[model], hidden, 0, begin, width, tiling, own, own.logits[model]);
          for (int64_t row = 0; row < count; ++row)
            std::copy_n(z + row * tiling.columns, width, kept[model].get() + row * vocabulary + begin);
        }
      });
      logits[model] = {
          kept[model].get(), sizeof(Acc) == 8 ? Dtype::kDouble : Dtype::kFloat, count, vocabulary, vocabulary, 1};
    }
    sample_rows<Acc>(logits[0], logits[1], first, identities, options, outputs);
  }
}

template <typename T>
void linear_extrapolated_sample(const Head* heads, const RowIdentities& identities, const SampleOptions& options,
                                int64_t workspace, const SampleOutputs<Accumulator<T>>& outputs) {
  const bool filtered = options.temperature != 0 && options.filters.any(heads[0].vocabulary());
  const auto draw = filtered ? keep_and_draw<T> : fold_and_draw<T>;
  draw(heads, identities, options, workspace, outputs);
}

}  // namespace dlogp
