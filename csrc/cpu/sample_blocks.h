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
Finiteness block_maxima(int64_t count, const float* z, float* maxima);
Finiteness block_maxima(int64_t count, const double* z, double* maxima);

// The least value that is not −inf; +inf if there is none.
float least_finite(int64_t count, const float* z);
double least_finite(int64_t count, const double* z);

// Copies the values within [low, top], in their order, to `to`, which has room for all; how many they are.
int64_t copy_within(int64_t count, const float* values, float low, float top, float* to);
int64_t copy_within(int64_t count, const double* values, double low, double top, double* to);

// How many tokens of a block have s ≥ cut, and unless they are more than `most`, their places, in order.
int64_t places_from(int64_t count, const float* s, float cut, int64_t most, uint8_t* places);
int64_t places_from(int64_t count, const double* s, double cut, int64_t most, uint8_t* places);

// z[i] = extrapolated(z[i], base_z[i]), read from `from`.
void extrapolate_row(int64_t count, float gamma, float least, const float* from, const float* base_z, float* z);
void extrapolate_row(int64_t count, double gamma, double least, const double* from, const double* base_z, double* z);

// A quotient, not a product with 1 / divisor: logits that are equal after rounding are to be the same in every backend.
void divide_row(int64_t count, float divisor, const float* from, float* z);
void divide_row(int64_t count, double divisor, const double* from, double* z);

// What linear_extrapolated_sample draws by, −inf where a token is not to be drawn: s / divisor in place; (1 + γ) z − γ
// z_B of tokens with z_B > −inf, and whether there are others; (1 + γ) z of those others, without their stand-in.
void divide_scores(int64_t count, float divisor, float* s);
void divide_scores(int64_t count, double divisor, double* s);
bool extrapolated_scores(int64_t count, float gamma, const float* z, const float* base_z, float* s);
bool extrapolated_scores(int64_t count, double gamma, const double* z, const double* base_z, double* s);
void unlikely_scores(int64_t count, float gamma, const float* z, const float* base_z, float* s);
void unlikely_scores(int64_t count, double gamma, const double* z, const double* base_z, double* s);

// The noise of the tokens of a block, from `first_token` on.
void block_noise(const NoiseKey& key, int64_t first_token, uint32_t* bits);

// Whether a token of a block with s ≥ cut may have a score s + gumbel(bits) ≥ best. It errs towards yes.
bool may_win(int64_t count, const float* s, const uint32_t* bits, float cut, double best);
bool may_win(int64_t count, const double* s, const uint32_t* bits, double cut, double best);

// Buckets of equal width below `top`: where each s ≤ top belongs, and its mass e^{s − centre}.
template <typename Acc>
struct Buckets {
  Acc top, per_unit;
  Acc centre;
  int32_t last;
};

void bucket_masses(const Buckets<float>& buckets, int64_t count, const float* s, int32_t* index, float* mass);
void bucket_masses(const Buckets<double>& buckets, int64_t count, const double* s, int32_t* index, double* mass);

}  // namespace dlogp
