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
};

// Scores the tokens s ≥ cut of a block that begins at token `first`, a multiple of kBlockTokens.
template <typename Real>
void score_block(int64_t first, const Real* s, int64_t size, Real cut, const NoiseKey& key, Winner& winner) {
  uint32_t bits[kBlockTokens];
  block_noise(key, first, bits);
  if (!may_win(size, s, bits, cut, winner.score)) return;
  for (int64_t i = 0; i < size; ++i) {
    if (!(s[i] >= cut) || s[i] + kLargestGumbel < winner.score) continue;
    const double score = double(s[i]) + gumbel<double>(bits[i]);
    if (winner.loses_to(score, first + i)) winner = {score, first + i};
  }
}

// The same of a greedy draw, given the block's maximum, which is no NaN.
template <typename Real>
void compare_block(int64_t first, const Real* s, int64_t size, Real max, Winner& winner) {
  if (max < winner.score) return;
  const int64_t token = first + (std::find(s, s + size, max) - s);
  if (winner.loses_to(max, token)) winner = {double(max), token};
}

}  // namespace dlogp
