// The loops of sampling over a few logits that lie side by side, vectorised for float.
//
// Sampling looks at a row in blocks of 64 tokens: their maxima say which blocks can hold a token that is kept, or one
// that can still win, and their noise is 16 blocks of Philox.
#pragma once

#include <cstdint>

#include "../common/philox.h"

namespace dlogp {

constexpr int64_t kBlockTokens = 64;

constexpr int64_t sample_blocks(int64_t count) { return (count + kBlockTokens - 1) / kBlockTokens; }

// What there is among logits that may not be finite; a NaN or +inf counts as special.
struct Finiteness {
  bool special = false, masked = false;
};

// The maximum of each block.
template <typename Acc>
Finiteness block_maxima(int64_t count, const Acc* z, Acc* maxima);

// The least value that is not −inf; +inf if there is none.
template <typename Acc>
Acc least_finite(int64_t count, const Acc* z);

// Copies the values within [low, top], in their order, to `to`, which has room for all; how many they are.
template <typename Acc>
int64_t copy_within(int64_t count, const Acc* values, Acc low, Acc top, Acc* to);

// How many tokens of a block have s ≥ cut, and unless they are more than `most`, their places, in order.
template <typename Acc>
int64_t places_from(int64_t count, const Acc* s, Acc cut, int64_t most, uint8_t* places);

// z[i] = extrapolated(z[i], base_z[i]), read from `from`.
template <typename Acc>
void extrapolate_row(int64_t count, Acc gamma, Acc least, const Acc* from, const Acc* base_z, Acc* z);

// A quotient, not a product with 1 / divisor: logits that are equal after rounding are to be the same in every backend.
template <typename Acc>
void divide_row(int64_t count, Acc divisor, const Acc* from, Acc* z);

// What linear_extrapolated_sample draws by, −inf where a token is not to be drawn: s / divisor in place; (1 + γ) z − γ
// z_B of tokens with z_B > −inf, and whether there are others; (1 + γ) z of those others, without their stand-in.
template <typename Acc>
void divide_scores(int64_t count, Acc divisor, Acc* s);
template <typename Acc>
bool extrapolated_scores(int64_t count, Acc gamma, const Acc* z, const Acc* base_z, Acc* s);
template <typename Acc>
void unlikely_scores(int64_t count, Acc gamma, const Acc* z, const Acc* base_z, Acc* s);

// The noise of the tokens of a block, from `first_token` on.
void block_noise(const NoiseKey& key, int64_t first_token, uint32_t* bits);

// Whether a token of a block with s ≥ cut may have a score s + gumbel(bits) ≥ best. It errs towards yes.
template <typename Acc>
bool may_win(int64_t count, const Acc* s, const uint32_t* bits, Acc cut, double best);

// Buckets of equal width below `top`: where each s ≤ top belongs, and its mass e^{s − centre}.
template <typename Acc>
struct Buckets {
  Acc top, per_unit;
  Acc centre;
  int32_t last;
};

template <typename Acc>
void bucket_masses(const Buckets<Acc>& buckets, int64_t count, const Acc* s, int32_t* index, Acc* mass);

}  // namespace dlogp
