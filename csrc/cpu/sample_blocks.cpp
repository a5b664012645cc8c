#include "sample_blocks.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/sampling.h"
#include "vector_math.h"

namespace dlogp {
namespace {

template <typename Acc>
DLOGP_INLINE Finiteness finiteness_of(int64_t count, const Acc* z) {
  constexpr Acc infinity = std::numeric_limits<Acc>::infinity();
  int32_t special = 0, masked = 0;
#pragma omp simd reduction(+ : special, masked)
  for (int64_t i = 0; i < count; ++i) {
    special += z[i] < infinity ? 0 : 1;
    masked += z[i] == kMaskedLogit<Acc> ? 1 : 0;
  }
  return {special != 0, masked != 0};
}

// Calls use(place) where `inside` is 1, in order; most runs of eight have none.
template <typename Use>
DLOGP_INLINE void for_inside(const uint8_t (&inside)[kBlockTokens], Use use) {
  for (int64_t i = 0; i < kBlockTokens; i += 8) {
    uint64_t eight = 0;
    for (int j = 0; j < 8; ++j) eight |= uint64_t(inside[i + j]) << 8 * j;
    for (; eight != 0; eight &= eight - 1) use(i + std::countr_zero(eight) / 8);
  }
}

// A possible token keeps a score that can win, however far its logit overflowed.
template <typename Acc>
DLOGP_INLINE Acc above_masked(Acc score) {
  constexpr Acc lowest = std::numeric_limits<Acc>::lowest();
  return score > lowest ? score : lowest;
}

}  // namespace

// Ten rounds one after the other in the body of the loop over the counters, which the compiler then vectorises.
DLOGP_CLONES void block_noise(const NoiseKey& key, int64_t first_token, uint32_t* bits) {
  const uint32_t first = key.block_of(first_token), row_id = key.row_id, step = key.step;
  const uint32_t stream = uint32_t(key.stream), key0 = uint32_t(key.seed), key1 = uint32_t(key.seed >> 32);
  constexpr int counters = kBlockTokens / 4;
  uint32_t words[4][counters];
#pragma omp simd
  for (int c = 0; c < counters; ++c) {
    uint32_t x0 = first + c, x1 = row_id, x2 = step, x3 = stream;
#pragma GCC unroll 10
    for (uint32_t round = 0; round < 10; ++round) {
      const uint32_t high0 = uint32_t((uint64_t(0xD2511F53u) * x0) >> 32), low0 = 0xD2511F53u * x0;
      const uint32_t high1 = uint32_t((uint64_t(0xCD9E8D57u) * x2) >> 32), low1 = 0xCD9E8D57u * x2;
      x0 = high1 ^ x1 ^ (key0 + round * 0x9E3779B9u);
      x2 = high0 ^ x3 ^ (key1 + round * 0xBB67AE85u);
      x1 = low1;
      x3 = low0;
    }
    words[0][c] = x0;
    words[1][c] = x1;
    words[2][c] = x2;
    words[3][c] = x3;
  }
  for (int c = 0; c < counters; ++c)
    for (int lane = 0; lane < 4; ++lane) bits[4 * c + lane] = words[lane][c];
}

}  // namespace dlogp

#define DLOGP_LOOPS "sample_loops.h"
#include "for_each_accumulator.h"
