#include "linear_extrapolated_sample.h"

#include <algorithm>
#include <cmath>

#include "dot_products.h"
#include "fold.h"

namespace dlogp {
namespace {

// Of a Tiling; a row of a tile has its scores on the stack.
constexpr int64_t kMostColumns = 256;

template <typename Real>
constexpr Real kImpossible = -std::numeric_limits<Real>::infinity();

template <typename Real>
class TileRow {
 public:
  TileRow(const SampleOptions& options, const RowNoise& noise, int64_t begin, int64_t count, const Real* z,
          const Real* base_z, PairState<Real>& state, RowDraws<Real>& draws)
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
  void draw_from(const Real* z, const Real* maxima, Stream stream, DrawnToken<Real>& drawn) {
    if (!divides()) return draw(z, maxima, stream, drawn);
    std::copy_n(maxima, blocks(), score_maxima_);
    divide_scores(blocks(), Real(options_.temperature),
                  score_maxima_);  // the largest quotients are those of the largest
    if (!any_may_win(score_maxima_, drawn.winner)) return;
    std::copy_n(z, count_, scores_);
    divide_scores(count_, Real(options_.temperature), scores_);
    draw(scores_, score_maxima_, stream, drawn);
  }

  void draw_extrapolated() {
    const Real gamma = Real(options_.gamma);
    draws_.least = std::min(draws_.least, least_finite(count_, base_z_));
    const bool some_unlikely = extrapolated_scores(count_, gamma, z_, base_z_, scores_);
    draw_from_scores(draws_.replacement);
    if (!some_unlikely) return;
    unlikely_scores(count_, gamma, z_, base_z_, scores_);
    draw_from_scores(draws_.unlikely);
  }

  void draw_from_scores(DrawnToken<Real>& drawn) {
    if (divides()) divide_scores(count_, Real(options_.temperature), scores_);
    block_maxima(count_, scores_, score_maxima_);
    draw(scores_, score_maxima_, Stream::kReplacement, drawn);
  }

  void draw(const Real* s, const Real* maxima, Stream stream, DrawnToken<Real>& drawn) {
    const bool greedy = options_.temperature == 0;
    const NoiseKey key = noise_.key(options_.seed, stream);
    const int64_t before = drawn.winner.token;
    for (int64_t block = 0; block < blocks(); ++block) {
      const int64_t offset = block * kBlockTokens, first = begin_ + offset;
      const int64_t size = std::min(kBlockTokens, count_ - offset);
      if (greedy) {
        if (maxima[block] > kImpossible<Real>) compare_block(first, s + offset, size, maxima[block], drawn.winner);
      } else if (may_win_block(maxima[block], drawn.winner)) {
        score_block(first, s + offset, size, kImpossible<Real>, key, drawn.winner);
      }
    }
    if (drawn.winner.token == before) return;
    drawn.z = z_[drawn.winner.token - begin_];
    drawn.base_z = base_z_[drawn.winner.token - begin_];
  }

  bool any_may_win(const Real* maxima, const Winner& winner) const {
    return std::any_of(maxima, maxima + blocks(), [&](Real max) { return may_win_block(max, winner); });
  }

  bool may_win_block(Real max, const Winner& winner) const {
    return max > kImpossible<Real> && max + kLargestGumbel >= winner.score;
  }

  bool divides() const { return options_.temperature != 0 && options_.temperature != 1; }
  int64_t blocks() const { return sample_blocks(count_); }

  const SampleOptions& options_;
  const RowNoise& noise_;
  const int64_t begin_, count_;
  const Real *z_, *base_z_;
  PairState<Real>& state_;
  RowDraws<Real>& draws_;
  Real maxima_[kMostColumns / kBlockTokens], base_maxima_[kMostColumns / kBlockTokens];
  Real score_maxima_[kMostColumns / kBlockTokens];
  Real scores_[kMostColumns];
};

template <typename Real>
void merge(DrawnToken<Real>& into, const DrawnToken<Real>& other) {
  if (other.winner.token >= 0 && into.winner.loses_to(other.winner.score, other.winner.token)) into = other;
}

template <typename Real>
void merge(RowDraws<Real>& into, const RowDraws<Real>& other) {
  merge(into.draft, other.draft);
  merge(into.replacement, other.replacement);
  merge(into.unlikely, other.unlikely);
  into.least = std::min(into.least, other.least);
  into.bad |= other.bad;
}

// The winner among the tokens with z_B = −inf, now that the stand-in for it is known, scored as all others are.
template <typename Real>
DrawnToken<Real> with_stand_in(DrawnToken<Real> drawn, Real least, const RowNoise& noise,
                               const SampleOptions& options) {
  const bool greedy = options.temperature == 0;
  const Real temperature = greedy ? 1 : Real(options.temperature);
  const Real s = extrapolated(drawn.z, drawn.base_z, Real(options.gamma), least) / temperature;
  constexpr Real lowest = std::numeric_limits<Real>::lowest();
  drawn.winner.score = s > lowest ? s : lowest;  // of NaN too
  if (!greedy) {
    const NoiseKey key = noise.key(options.seed, Stream::kReplacement);
    drawn.winner.score += gumbel<double>(noise_bits(key, drawn.winner.token));
  }
  return drawn;
}

template <typename Real>
void set_token(const DrawnToken<Real>& drawn, const PairState<Real>& state, SampledRow<Real>& result) {
  result.token = drawn.winner.token;
  result.logp = Real(state.model.logp(drawn.z));
  result.base_logp = Real(state.base.logp(drawn.base_z));
}

// Columns that a block of so many rows is packed into, so that few distinct product kernels are needed.
int64_t padded_columns(int64_t rows) {
  int64_t padded = 8;
  while (padded < rows) padded *= 2;
  return padded;
}

// Rows [begin, begin + padded) of a weight, in place where they can be read so, else copied; zeros beyond the
// vocabulary.
template <typename T>
WeightRows<T> weight_rows(const Matrix& weight, int64_t begin, int64_t padded, int64_t width, std::vector<T>& copy) {
  const int64_t count = std::clamp<int64_t>(weight.rows - begin, 0, padded);
  if (count == padded && width == weight.columns) {
    const T* in_place = groups_in_place<T>(weight, begin);
    if (in_place != nullptr) return {in_place, weight.row_stride};
  }
  copy.resize(padded * width);
  for (int64_t v = 0; v < count; ++v) {
    read_row(weight, begin + v, 0, weight.columns, &copy[v * width]);
    std::fill(copy.begin() + v * width + weight.columns, copy.begin() + (v + 1) * width, T(0));
  }
  std::fill(copy.begin() + count * width, copy.end(), T(0));
  return {copy.data(), width};
}

// products (rows, tiling.columns) of `count` tokens from `begin` on and a block of rows.
template <typename Real>
void multiply_tile(const Matrix& weight, const PackedHidden<Real>& hidden, int64_t first, int64_t begin, int64_t count,
                   const Tiling& tiling, DrawScratch<Real>& scratch, Real* products) {
  for (int64_t v = 0; v < count; v += kDotTokens) {
    const WeightRows<Real> rows = weight_rows(weight, begin + v, kDotTokens, hidden.inner, scratch.weight);
    dot_products(std::min(kDotTokens, count - v), hidden.block_rows(first), hidden.inner, rows.data, rows.stride,
                 hidden.block(first), hidden.inner, products + v, tiling.columns);
  }
}

void multiply_tile(const Matrix& weight, const PackedHidden<c10::BFloat16>& hidden, int64_t first, int64_t begin,
                   int64_t count, const Tiling& tiling, DrawScratch<c10::BFloat16>& scratch, float* products) {
  const int64_t rows = hidden.block_rows(first), columns = padded_columns(rows);
  const auto left = weight_rows(weight, begin, tiling.columns, hidden.inner, scratch.weight);
  scratch.product.resize(tiling.columns * kRowBlock);
  multiply({tiling.columns, columns, hidden.inner, left.stride, columns, columns}, left.data, hidden.block(first),
           scratch.product.data(), false);
  transpose(count, rows, scratch.product.data(), columns, products, tiling.columns);
}

// The logits of one model, a tile and a block of rows, at temperature 1.
template <typename T>
const Accumulator<T>* tile_logits(const Head& head, const PackedHidden<T>& hidden, int64_t first, int64_t begin,
                                  int64_t count, const Tiling& tiling, DrawScratch<T>& scratch,
                                  std::vector<Accumulator<T>>& logits) {
  logits.resize(kRowBlock * tiling.columns);
  multiply_tile(head.weight, hidden, first, begin, count, tiling, scratch, logits.data());
  const Accumulator<T>* bias = nullptr;
  if (head.bias.data != nullptr) {
    scratch.bias.resize(tiling.columns);
    read_row(head.bias, 0, begin, count, scratch.bias.data());
    bias = scratch.bias.data();
  }
  for (int64_t r = 0; r < hidden.block_rows(first); ++r)
    transform_row(head.transform, count, bias, logits.data() + r * tiling.columns);
  return logits.data();
}

}  // namespace

template <typename T>
void pack_hidden(const Matrix& hidden, int64_t first, int64_t count, PackedHidden<T>& packed) {
  const int64_t inner = packed_width<T>(hidden.columns), last_block = count % kRowBlock;
  const int64_t padded = kGroup<T> == 1 ? count : count - last_block + padded_columns(last_block);
  packed.inner = inner;
  packed.rows = count;
  packed.data.assign(padded * inner, T(0));
  for (int64_t i = 0; i < count; ++i) read_row(hidden, first + i, 0, hidden.columns, &packed.data[i * inner]);
  if (kGroup<T> == 1) return;
  std::vector<T> rows;
  for (int64_t begin = 0; begin < count; begin += kRowBlock) {
    const int64_t columns = padded_columns(packed.block_rows(begin));
    T* block = packed.data.data() + begin * inner;
    rows.assign(block, block + columns * inner);
    pack_columns<T>(0, columns, rows.data(), inner, {block, inner, columns});
  }
}

template <typename T>
void linear_extrapolated_sample(const Head* heads, const PackedHidden<T>* hidden, const RowNoise* noise,
                                const SampleOptions& options, const Tiling& tiling, int64_t part,
                                DrawScratch<T>& scratch, PairState<Accumulator<T>>* states,
                                RowDraws<Accumulator<T>>* draws) {
  using Real = Accumulator<T>;
  const int64_t count = hidden[0].rows;
  for (int64_t row = 0; row < count; ++row) states[row * tiling.parts + part] = {};
  for (int64_t begin = tiling.part_begin(part); begin < tiling.part_end(part); begin += tiling.columns) {
    const int64_t width = std::min(tiling.columns, tiling.vocabulary - begin);
    for (int64_t first = 0; first < count; first += kRowBlock) {
      const Real* z[2];
      for (int model = 0; model < 2; ++model)
        z[model] =
            tile_logits(heads[model], hidden[model], first, begin, width, tiling, scratch, scratch.logits[model]);
      for (int64_t r = 0; r < hidden[0].block_rows(first); ++r) {
        const int64_t row = first + r, place = r * tiling.columns;
        TileRow<Real>(options, noise[row], begin, width, z[0] + place, z[1] + place, states[row * tiling.parts + part],
                      draws[row])
            .fold_and_draw();
      }
    }
  }
  release_products<T>();
}

template <typename Real>
SampledRow<Real> finish_sample(const PairState<Real>* states, int64_t parts, const RowDraws<Real>* draws,
                               int64_t threads, int64_t stride, const RowNoise& noise, const SampleOptions& options) {
  SampledRow<Real> result;
  RowDraws<Real> drawn;
  for (int64_t thread = 0; thread < threads; ++thread) merge(drawn, draws[thread * stride]);
  if (drawn.bad) return result;
  PairState<Real> state = states[0];
  for (int64_t part = 1; part < parts; ++part) merge(state, states[part]);
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

#define DLOGP_INSTANTIATE(T)                                                                                 \
  template void pack_hidden<T>(const Matrix&, int64_t, int64_t, PackedHidden<T>&);                           \
  template void linear_extrapolated_sample<T>(const Head*, const PackedHidden<T>*, const RowNoise*,          \
                                              const SampleOptions&, const Tiling&, int64_t, DrawScratch<T>&, \
                                              PairState<Accumulator<T>>*, RowDraws<Accumulator<T>>*);
DLOGP_INSTANTIATE(c10::BFloat16)
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

#define DLOGP_INSTANTIATE(Real)                                                                                  \
  template SampledRow<Real> finish_sample<Real>(const PairState<Real>*, int64_t, const RowDraws<Real>*, int64_t, \
                                                int64_t, const RowNoise&, const SampleOptions&);
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
