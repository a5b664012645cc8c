// What a block that samples a row has in shared memory, and what is merged over threads there.
#pragma once

#include <cstdint>

#include "cluster.cuh"
#include "contest.cuh"
#include "logits.cuh"
#include "softmax_sums.cuh"
#include "weight_buckets.cuh"

namespace dlogp {

// Tokens that a filter may keep are listed, so that later walks look at them alone, and gathered from all blocks: so
// many of a block, and of a row.
constexpr uint32_t kListed = 2048, kGathered = 1536;
// A mass of 1, that of the largest logit. 2²³ tokens of it stay below 2⁶⁴.
constexpr float kMassOne = 0x1p40f;

// How many tokens each of the slices of a vocabulary has.
inline int slice_tokens(int64_t vocabulary) {
  const int64_t slice = (vocabulary + kSlices - 1) / kSlices;
  return int((slice + kGroupTokens - 1) / kGroupTokens * kGroupTokens);
}

struct Add : NothingToPrepare {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

// The largest z / T, and a key at which there are top_k tokens or more.
struct Extent {
  float largest = -INFINITY;
  uint32_t rank_bound = 0;
};

struct MergeExtents : NothingToPrepare {
  __device__ Extent operator()(const Extent& a, const Extent& b) const {
    return {fmaxf(a.largest, b.largest), max(a.rank_bound, b.rank_bound)};
  }
};

// What the first walk finds out about the draft: its token, or else what filters begin with.
struct Draft {
  Winner winner;
  Extent extent;
};

struct MergeDrafts : NothingToPrepare {
  __device__ Draft operator()(const Draft& a, const Draft& b) const {
    return {MergeWinners{}(a.winner, b.winner), MergeExtents{}(a.extent, b.extent)};
  }
};

// The least float that is not below `value`.
__device__ inline float round_up(double value) {
  const float rounded = float(value);
  return double(rounded) < value ? nextafterf(rounded, INFINITY) : rounded;
}

// The keys of −inf and of the least number.
constexpr uint32_t kKeyOfNothing = 0x007FFFFFu, kLeastKey = kKeyOfNothing + 1;

// What a filter adds up.
enum class Weight { kMass, kCount };

// A token that is left, by s = z / T.
struct Candidate {
  uint32_t token;
  float s;
};

struct Decision {
  uint32_t selected;
  float delta_logp;
};

struct SampleRoom {
  ReduceRoom<kSlices, sizeof(SoftmaxSums<true>)> sums;
  ReduceRoom<1, sizeof(Draft)> values;
  BucketRoom buckets;
  PairState<float> state;
  Decision decision;
  SharedNoise noise;
  uint32_t reached[2];  // keys of scores, of the draft and its replacement
  uint32_t listed, told;
  uint32_t list[kListed];  // places in the block's part
  uint32_t told_by[kSlices];
  Candidate gathered[kGathered];
};

}  // namespace dlogp
