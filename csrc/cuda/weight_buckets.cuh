// What tokens weigh, by their keys: 256 buckets of 64-bit integers in the shared memory of each block, and where the
// weight of all blocks together, from the top bucket down, reaches what is wanted.
#pragma once

#include <cstdint>

#include "cluster.cuh"

namespace dlogp {

constexpr int kBuckets = 256;

// How much is enough, where it is top-p of a mass that is not known yet.
constexpr uint64_t kShare = ~uint64_t(0);

// Where the weight above, from the top bucket down, ceases to be too little.
struct Crossing {
  uint64_t enough;  // within the bucket
  uint32_t bucket;  // kBuckets: nowhere
};

struct BucketRoom {
  // Twice, as in ReduceRoom: 64-bit weights in two words each. The last is what lies below.
  uint32_t low_words[2][kBuckets + 1], high_words[2][kBuckets + 1];
  uint64_t weight_of_warp[kBuckets / 32], weight_below;
  Crossing crossing;
};

class WeightBuckets {
 public:
  __device__ explicit WeightBuckets(BucketRoom& room) : room_(room) {}

  __device__ void clear() {
    for (int i = threadIdx.x; i <= kBuckets; i += kThreads) room_.low_words[turn_][i] = room_.high_words[turn_][i] = 0;
    __syncthreads();
  }

  // A sum of integers is the same in any order. 64-bit atomics in shared memory are slow, so carry by hand.
  __device__ void add(uint32_t bucket, uint64_t added) {
    const uint32_t word = uint32_t(added), before = atomicAdd(&room_.low_words[turn_][bucket], word);
    const uint32_t rest = uint32_t(added >> 32) + uint32_t(before + word < word);
    if (rest != 0) atomicAdd(&room_.high_words[turn_][bucket], rest);
  }

  // Of this block if it works by itself, else of all; after it the other copy is at work. If `enough` is kShare, it is
  // a share `top_p` of the whole. Thread b has bucket b.
  __device__ Crossing crossing(uint64_t enough, double top_p, bool by_itself) {
    if (by_itself)
      __syncthreads();
    else
      Cluster::sync();
    const int bucket = threadIdx.x, lane = threadIdx.x % 32;
    uint64_t weight = 0, until = 0;
    if (bucket < kBuckets) {
      until = weight = weight_of(bucket, by_itself);
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const uint64_t before = __shfl_up_sync(0xFFFFFFFFu, until, distance);
        if (lane >= distance) until += before;
      }
      if (lane == 31) room_.weight_of_warp[bucket / 32] = until;
    }
    if (bucket == kBuckets) room_.weight_below = weight_of(kBuckets, by_itself);
    __syncthreads();
    if (bucket < kBuckets) {
      uint64_t total = room_.weight_below;
      for (int warp = 0; warp < kBuckets / 32; ++warp) {
        const uint64_t of_warp = room_.weight_of_warp[warp];
        if (warp < bucket / 32) until += of_warp;
        total += of_warp;
      }
      if (enough == kShare) enough = max(uint64_t(1), uint64_t(ceil(top_p * double(total))));
      const uint64_t above = until - weight;
      if (above < enough && until >= enough) room_.crossing = {enough - above, uint32_t(bucket)};
      if (bucket == kBuckets - 1 && until < enough) room_.crossing = {0, kBuckets};
    }
    __syncthreads();
    turn_ ^= 1;
    return room_.crossing;
  }

 private:
  // Of all blocks that work together.
  __device__ uint64_t weight_of(int bucket, bool by_itself) {
    uint64_t weight = 0;
    for (int i = 0; i < (by_itself ? 1 : Cluster::size()); ++i) {
      const int rank = by_itself ? Cluster::rank() : i;
      weight += uint64_t(*Cluster::in_block(&room_.high_words[turn_][bucket], rank)) << 32 |
                *Cluster::in_block(&room_.low_words[turn_][bucket], rank);
    }
    return weight;
  }

  BucketRoom& room_;
  int turn_ = 0;  // which copy
};

}  // namespace dlogp
