// What is drawn from, and the search for the largest score z / T + noise.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/sampling.h"
#include "cluster.cuh"
#include "logits.cuh"
#include "softmax_sums.cuh"

namespace dlogp {

constexpr uint32_t kNoToken = 0xFFFFFFFFu;
// The least noise, −log(33·log 2), a little down: the largest logit has a score of that much more.
constexpr float kLeastGumbel = -3.14f;

// An integer in the order of the numbers; the same for both zeros.
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xFFFFFFFFu : 0x80000000u);
}
__device__ inline float of_key(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 != 0 ? 0x80000000u : 0xFFFFFFFFu));
}

// Of equal scores the first token wins.
struct Winner {
  float score = -INFINITY;
  uint32_t token = kNoToken;

  __device__ bool take(float other_score, uint32_t other_token) {
    const bool wins = other_score > score || (other_score == score && other_token < token);
    if (wins) *this = {other_score, other_token};
    return wins;
  }
};

struct MergeWinners : NothingToPrepare {
  __device__ Winner operator()(Winner a, const Winner& b) const {
    a.take(b.score, b.token);
    return a;
  }
};

// Which logits are drawn from, and with whose noise.
struct Drawn {
  enum class From { kModel, kBase, kExtrapolation };

  From from;
  Stream stream;
  float gamma, least_base, temperature, inverse_temperature;

  __device__ float unscaled(float z, float base_z) const {
    if (from == From::kModel) return z;
    return from == From::kBase ? base_z : extrapolated(z, base_z, gamma, least_base);
  }
  // z / T, with T = 1 for greedy.
  __device__ float scaled(float z) const { return temperature == 1.0f ? z : z / temperature; }
  __device__ float about_scaled(float z) const { return z * inverse_temperature; }
};

// One of four, without an address: what is indexed in memory is slow to reach.
template <typename T>
__device__ inline T chosen(const T (&values)[4], int index) {
  const T first = index & 1 ? values[1] : values[0], second = index & 1 ? values[3] : values[2];
  return index & 2 ? second : first;
}

// A row's noise, in shared memory: as it is read at each use, nobody keeps the ten round keys in registers.
struct SharedNoise {
  uint32_t low_seed, high_seed;
  RowNoise row;

  __device__ uint64_t seed() const {
    const volatile SharedNoise& here = *this;
    return uint64_t(here.high_seed) << 32 | here.low_seed;
  }
  __device__ PhiloxBlock block(Stream stream, uint32_t token) const {
    const NoiseKey key = row.key(seed(), stream);
    return philox(key.counter(token), key.seed);
  }
};

// A thread's part in the search. Nearly every token is passed over by what its noise can be at most; the largest score
// that a thread of the block has met, in `reached`, makes that sharp. It changes no result: a token that may reach it
// is looked at.
class Contest {
 public:
  __device__ Contest(const Drawn& drawn, const SharedNoise& noise, uint32_t* reached)
      : drawn_(drawn), noise_(noise), reached_(reached) {}

  __device__ const Winner& winner() const { return winner_; }

  // Four tokens from `token` on, by their logits before the division by T.
  __device__ void add(uint32_t token, const Group& unscaled) {
    const float bound = reached(), lead = drawn_.about_scaled(unscaled.largest()) - bound + slack(bound);
    if (lead < -float(kLargestGumbel)) return;
    const PhiloxBlock noise = noise_.block(drawn_.stream, token);
    const uint32_t least = min(min(noise.words[0], noise.words[1]), min(noise.words[2], noise.words[3]));
    // The noise is −log u at most: −log(1 − u) ≥ u.
    if (uniform<float>(least) > fast_exp(lead)) return;
#pragma unroll 1
    for (int j = 0; j < kGroupTokens; ++j) add(token + j, drawn_.scaled(chosen(unscaled.z, j)), chosen(noise.words, j));
  }

  // One token, by its logit divided by T.
  __device__ void add(uint32_t token, float s) {
    const float bound = reached();
    if (s - bound + slack(bound) < -float(kLargestGumbel)) return;
    add(token, s, chosen(noise_.block(drawn_.stream, token).words, int(token % 4)));
  }

 private:
  __device__ float reached() const { return of_key(*static_cast<volatile uint32_t*>(reached_)); }
  // More than what the approximations here are off by.
  __device__ static float slack(float bound) { return 1e-3f + fabsf(bound) * 1e-6f; }

  __device__ void add(uint32_t token, float s, uint32_t bits) {
    const float bound = reached();
    if (s - __logf(uniform<float>(bits)) + slack(bound) < bound) return;
    const float score = s + gumbel<float>(bits);
    if (winner_.take(score, token)) atomicMax(reached_, key_of(score));
  }

  const Drawn& drawn_;
  const SharedNoise& noise_;
  uint32_t* const reached_;
  Winner winner_;
};

}  // namespace dlogp
