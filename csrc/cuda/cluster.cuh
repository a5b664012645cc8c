// What the threads of a cluster of blocks tell one another. Before compute capability 9.0 a cluster is one block.
//
// A vocabulary is cut into 16 slices whatever the cluster's size is, and what is not associative, a floating sum, is
// summed by slice: so the bits of a result do not depend on how many blocks shared the work.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>
#include <cstring>

namespace dlogp {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kSlices = 16;
// Of the largest state that is reduced.
constexpr int kStateBytes = 56;

class Cluster {
 public:
#if __CUDA_ARCH__ >= 900
  __device__ static int size() { return int(cooperative_groups::this_cluster().num_blocks()); }
  __device__ static int rank() { return int(cooperative_groups::this_cluster().block_rank()); }
  __device__ static void sync() { cooperative_groups::this_cluster().sync(); }
  // The same place in the shared memory of another block.
  template <typename T>
  __device__ static const T* in_block(T* mine, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(mine, unsigned(rank));
  }
#else
  __device__ static int size() { return 1; }
  __device__ static int rank() { return 0; }
  __device__ static void sync() { __syncthreads(); }
  template <typename T>
  __device__ static const T* in_block(T* mine, int) {
    return mine;
  }
#endif
};

// The state of another lane, word by word.
template <typename State>
__device__ inline State from_lane(State state, int lane_mask) {
  static_assert(sizeof(State) % 4 == 0 && sizeof(State) <= kStateBytes);
  uint32_t words[sizeof(State) / 4];
  memcpy(words, &state, sizeof(State));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(0xFFFFFFFFu, word, lane_mask);
  memcpy(&state, words, sizeof(State));
  return state;
}

// Room in shared memory for reductions. What other blocks read is there twice: a block that comes back to the first
// copy has passed the cluster's barrier of the second one, and nobody reads the first any more.
struct ReduceRoom {
  alignas(16) unsigned char of_warps[kWarps][kStateBytes];
  alignas(16) unsigned char of_block[2][kSlices][kStateBytes];
  alignas(16) unsigned char of_cluster[kSlices][kStateBytes];
};

// Every thread of the cluster gets the merge of all threads' states, in one order. `merge(a, b)` is symmetric.
class Reduction {
 public:
  __device__ explicit Reduction(ReduceRoom& room) : room_(room) {}

  // One state a thread; the order in which they merge depends on the cluster's size.
  template <typename State, typename Merge>
  __device__ State all(State mine, Merge merge) {
    of_slice(0, mine, merge);
    return slices<State>(1, merge);
  }

  // The threads' states of the `index`-th of this block's slices.
  template <typename State, typename Merge>
  __device__ void of_slice(int index, State mine, Merge merge) {
#pragma unroll
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) mine = merge(mine, from_lane(mine, lane_mask));
    if (threadIdx.x % 32 == 0) at<State>(room_.of_warps[threadIdx.x / 32]) = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
      State total = at<State>(room_.of_warps[0]);
      for (int warp = 1; warp < kWarps; ++warp) total = merge(total, at<State>(room_.of_warps[warp]));
      at<State>(room_.of_block[turn_][index]) = total;
    }
    __syncthreads();
  }

  // The merge of all blocks' slices, of which each block has `count`.
  template <typename State, typename Merge>
  __device__ State slices(int count, Merge merge) {
    Cluster::sync();
    const int number = count * Cluster::size();
    for (int i = threadIdx.x; i < number; i += kThreads) {
      const State* theirs = Cluster::in_block(&at<State>(room_.of_block[turn_][i % count]), i / count);
      at<State>(room_.of_cluster[i]) = *theirs;
    }
    __syncthreads();
    State& total = at<State>(room_.of_cluster[0]);
    if (threadIdx.x == 0)
      for (int i = 1; i < number; ++i) total = merge(total, at<State>(room_.of_cluster[i]));
    __syncthreads();
    turn_ ^= 1;
    return total;
  }

 private:
  template <typename State>
  __device__ static State& at(unsigned char* bytes) {
    return *reinterpret_cast<State*>(bytes);
  }

  ReduceRoom& room_;
  int turn_ = 0;
};

}  // namespace dlogp
