// The logits that a token is drawn from, in pieces: those of one row over T, or extrapolated from two.
#pragma once

#include <algorithm>
#include <vector>

#include "matrix.h"
#include "sample_blocks.h"

namespace dlogp {

// What a call may ask for at once; a multiple of kBlockTokens.
constexpr int64_t kPiece = 1024;

// Nothing is stored: every piece is computed from the inputs again, the same to the bit however the row is cut.
template <typename Acc>
class ScaledLogits {
 public:
  ScaledLogits(const Matrix& logits, int64_t row, Acc temperature)
      : logits_(logits), row_(row), temperature_(temperature) {}
  ScaledLogits(const Matrix& logits, const Matrix& base_logits, int64_t row, Acc gamma, Acc least, Acc temperature)
      : logits_(logits), base_(&base_logits), row_(row), gamma_(gamma), least_(least), temperature_(temperature) {}

  int64_t vocabulary() const { return logits_.columns; }
  int64_t blocks() const { return sample_blocks(vocabulary()); }

  // Logits [begin, begin + count), count ≤ kPiece: in place where they need no change, else in `buffer`.
  const Acc* piece(int64_t begin, int64_t count, Acc* buffer) const {
    const Acc* z = unscaled(logits_, begin, count, buffer);
    if (base_ != nullptr) {
      Acc base_buffer[kPiece];
      extrapolate_row(count, gamma_, least_, z, unscaled(*base_, begin, count, base_buffer), buffer);
      z = buffer;
    }
    if (temperature_ == 1) return z;
    divide_row(count, temperature_, z, buffer);
    return buffer;
  }

  const Acc* block(int64_t index, Acc* buffer) const { return piece(index * kBlockTokens, block_size(index), buffer); }
  int64_t block_size(int64_t index) const { return std::min(kBlockTokens, vocabulary() - index * kBlockTokens); }

 private:
  const Acc* unscaled(const Matrix& matrix, int64_t begin, int64_t count, Acc* buffer) const {
    const Acc* in_place = row_in_place<Acc>(matrix, row_, begin);
    if (in_place != nullptr) return in_place;
    read_row(matrix, row_, begin, count, buffer);
    return buffer;
  }

  const Matrix& logits_;
  const Matrix* base_ = nullptr;
  int64_t row_;
  Acc gamma_ = 0, least_ = 0;
  Acc temperature_;
};

// The maximum of each block of 64 logits, and of all.
template <typename Acc>
struct BlockMaxima {
  std::vector<Acc> values;
  Acc largest;

  void find_largest() { largest = *std::max_element(values.begin(), values.end()); }
};

// Calls use(block, s, size) for the blocks, in order, of which wanted(maximum) holds at the time. Logits are computed a
// piece at a time, those of pieces without such a block not at all.
template <typename Acc, typename Wanted, typename Use>
void for_blocks(const ScaledLogits<Acc>& logits, const BlockMaxima<Acc>& maxima, Wanted wanted, Use use) {
  constexpr int64_t per_piece = kPiece / kBlockTokens;
  Acc buffer[kPiece];
  for (int64_t first = 0; first < logits.blocks(); first += per_piece) {
    const int64_t end = std::min(first + per_piece, logits.blocks()), begin = first * kBlockTokens;
    const Acc* s = nullptr;
    for (int64_t block = first; block < end; ++block) {
      if (!wanted(maxima.values[block])) continue;
      if (s == nullptr) s = logits.piece(begin, std::min(kPiece, logits.vocabulary() - begin), buffer);
      use(block, s + (block - first) * kBlockTokens, logits.block_size(block));
    }
  }
}

}  // namespace dlogp
