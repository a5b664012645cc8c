// Noise from a counter: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), and what
// sampling makes of its bits.
//
// The 32 bits of token v are word v % 4 of the block with counter (v / 4, row_id, step, stream) and the 64-bit seed as
// key. So they depend on nothing else: not on the batch, the tiles, or the device. Of a part of a vocabulary, v is the
// token's place in the whole.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace dlogp {

struct PhiloxBlock {
  uint32_t words[4];
};

DLOGP_HOST_DEVICE inline void philox_round(PhiloxBlock& x, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = uint64_t(0xD2511F53u) * x.words[0], product1 = uint64_t(0xCD9E8D57u) * x.words[2];
  x = {uint32_t(product1 >> 32) ^ x.words[1] ^ key0, uint32_t(product1), uint32_t(product0 >> 32) ^ x.words[3] ^ key1,
       uint32_t(product0)};
}

DLOGP_HOST_DEVICE inline PhiloxBlock philox(PhiloxBlock counter, uint64_t seed) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    philox_round(counter, key0, key1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

enum class Stream : uint32_t { kDraft = 0, kReplacement = 1, kRandom = 2 };

// Whose noise it is: all of a token's counter and key but the token. Tokens are counted from block `first_block` on.
struct NoiseKey {
  uint64_t seed;
  uint32_t row_id, step;
  Stream stream;
  uint32_t first_block = 0;

  DLOGP_HOST_DEVICE uint32_t block_of(int64_t token) const { return first_block + uint32_t(token / 4); }
  DLOGP_HOST_DEVICE PhiloxBlock counter(int64_t token) const {
    return {{block_of(token), row_id, step, uint32_t(stream)}};
  }
};

DLOGP_HOST_DEVICE inline uint32_t noise_bits(const NoiseKey& key, int64_t token) {
  return philox(key.counter(token), key.seed).words[token % 4];
}

// u = (bits + ½)·2⁻³², in (0, 1); exact in double.
template <typename Acc>
DLOGP_HOST_DEVICE inline Acc uniform(uint32_t bits) {
  return (Acc(bits) + Acc(0.5)) * Acc(0x1p-32);
}

// −log(−log(1 − u)). The smaller of u and 1 − u is the one to look at: both are exact up to the rounding of Acc, so
// the tail reaches probabilities of 2⁻³².
template <typename Acc>
DLOGP_HOST_DEVICE inline Acc gumbel(uint32_t bits) {
  const Acc exponential = bits < 0x80000000u ? -std::log1p(-uniform<Acc>(bits)) : -std::log(uniform<Acc>(~bits));
  return -std::log(exponential);
}

// No noise is larger: 33·log 2, a little up.
constexpr double kLargestGumbel = 22.8739;

}  // namespace dlogp
