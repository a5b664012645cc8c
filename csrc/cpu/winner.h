// The token with the largest score so far: s plus its noise, s alone where the draw is greedy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "sample_blocks.h"

namespace dlogp {

struct Winner {
  double score = -std::numeric_limits<double>::infinity();
  int64_t token = -1;

  // Among equal scores the first token wins, whatever the order in which they come. −inf never wins.
  bool loses_to(double other, int64_t other_token) const {
    return other > score || (other == score && other_token < token);
  }

  // With a token whose score is s + gumbel(bits).
  void compare(double s, uint32_t bits, int64_t other_token) {
    if (s + kLargestGumbel < score) return;
    const double other = s + gumbel<double>(bits);
    if (loses_to(other, other_token)) *this = {other, other_token};
  }
};

// With so few tokens the noise of each is computed alone, not that of the whole block.
constexpr int64_t kFewTokens = 8;

// Of those at `places` in a block, all s ≥ cut.
template <typename Acc>
void score_few(int64_t first, const Acc* s, int64_t count, const uint8_t* places, Acc cut, const NoiseKey& key,
               Winner& winner) {
  Acc few[kFewTokens];
  uint32_t bits[kFewTokens];
  for (int64_t i = 0; i < count; ++i) {
    few[i] = s[places[i]];
    bits[i] = noise_bits(key, first + places[i]);
  }
  if (!may_win(count, few, bits, cut, winner.score)) return;
  for (int64_t i = 0; i < count; ++i) winner.compare(double(few[i]), bits[i], first + places[i]);
}

// Scores the tokens s ≥ cut of a block that begins at token `first`, a multiple of kBlockTokens.
template <typename Acc>
void score_block(int64_t first, const Acc* s, int64_t size, Acc cut, const NoiseKey& key, Winner& winner) {
  uint8_t places[kFewTokens];
  const int64_t kept = places_from(size, s, cut, kFewTokens, places);
  if (kept <= kFewTokens) return score_few(first, s, kept, places, cut, key, winner);
  uint32_t bits[kBlockTokens];
  block_noise(key, first, bits);
  if (!may_win(size, s, bits, cut, winner.score)) return;
  for (int64_t i = 0; i < size; ++i) {
    if (s[i] >= cut) winner.compare(double(s[i]), bits[i], first + i);
  }
}

// The same of a greedy draw, given the block's maximum, which is no NaN.
template <typename Acc>
void compare_block(int64_t first, const Acc* s, int64_t size, Acc max, Winner& winner) {
  if (max < winner.score) return;
  const int64_t token = first + (std::find(s, s + size, max) - s);
  if (winner.loses_to(max, token)) winner = {double(max), token};
}

}  // namespace dlogp
