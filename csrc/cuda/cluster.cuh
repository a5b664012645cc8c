// What the threads of a cluster of blocks tell one another. Before compute capability 9.0 a cluster is one block.
//
// A vocabulary is cut into 16 slices whatever the cluster's size is, and what is not associative, a floating sum, is
// summed by slice: so the bits of a result do not depend on how many blocks shared the work.
//
// A block writes what it has to tell into the memory of every block, before a barrier of the cluster; behind it each
// reads its own. So no block has to wait, at its end, for others to have looked into its memory.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>
#include <cstring>

namespace dlogp {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kSlices = 16;

class Cluster {
 public:
#if __CUDA_ARCH__ >= 900
  __device__ static int size() { return int(cooperative_groups::this_cluster().num_blocks()); }
  __device__ static int rank() { return int(cooperative_groups::this_cluster().block_rank()); }
  __device__ static void sync() { cooperative_groups::this_cluster().sync(); }
  // A barrier in two halves: threads wait until all have arrived.
  __device__ static void arrive() { cooperative_groups::this_cluster().barrier_arrive(); }
  __device__ static void wait() { cooperative_groups::this_cluster().barrier_wait(); }
  // The same place in the shared memory of another block.
  template <typename T>
  __device__ static T* in_block(T* mine, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(mine, unsigned(rank));
  }
#else
  __device__ static int size() { return 1; }
  __device__ static int rank() { return 0; }
  __device__ static void sync() { __syncthreads(); }
  __device__ static void arrive() {}
  __device__ static void wait() {}
  template <typename T>
  __device__ static T* in_block(T* mine, int) {
    return mine;
  }
#endif
};

// The state of another lane, word by word.
template <typename State>
__device__ inline State from_lane(const State& state, int lane_mask) {
  static_assert(sizeof(State) % 4 == 0);
  State other;
#pragma unroll
  for (size_t at = 0; at < sizeof(State); at += 4) {
    uint32_t word;
    memcpy(&word, reinterpret_cast<const char*>(&state) + at, 4);
    word = __shfl_xor_sync(0xFFFFFFFFu, word, lane_mask);
    memcpy(reinterpret_cast<char*>(&other) + at, &word, 4);
  }
  return other;
}

// Every lane gets the merge over its kLanes neighbours, always in the same order.
template <int kLanes, typename State, typename Merge>
__device__ inline State across_lanes(State state, Merge merge) {
  merge.template prepare<kLanes>(state);
#pragma unroll
  for (int lane_mask = kLanes / 2; lane_mask > 0; lane_mask /= 2) state = merge(state, from_lane(state, lane_mask));
  return state;
}

// Of a merge that takes states as they are.
struct NothingToPrepare {
  template <int kLanes, typename State>
  __device__ void prepare(State&) const {}
};

// Room in shared memory for reductions of states of up to kBytes; of so many slices of a block. What other blocks write
// is there twice: one that comes back to the first copy has passed the cluster's barrier of the second one, and nobody
// reads the first any more.
template <int kBlockSlices, int kBytes>
struct ReduceRoom {
  alignas(16) unsigned char of_warps[kBlockSlices][kWarps][kBytes];
  alignas(16) unsigned char of_slices[2][kSlices][kBytes];
};

// Merges all threads' states. `merge(a, b)` is symmetric; State{} changes nothing.
template <int kBlockSlices, int kBytes>
class Reduction {
 public:
  using Room = ReduceRoom<kBlockSlices, kBytes>;

  __device__ explicit Reduction(Room& room) : room_(room) {}

  // Every thread of the cluster gets the merge of one state a thread.
  template <typename State, typename Merge>
  __device__ State of_cluster(State mine, Merge merge) {
    add(0, mine, merge);
    __syncthreads();
    tell<State>(1, merge);
    Cluster::sync();
    return total<State>(1, merge);
  }

  // Every thread of the block, without the others.
  template <typename State, typename Merge>
  __device__ State of_block(State mine, Merge merge) {
    add(0, mine, merge);
    __syncthreads();
    const State all = of_warps<State>(0, merge);
    __syncthreads();
    return all;
  }

  // The same in steps, for more than one reduction at a time: the threads' states of the `index`-th of this block's
  // slices; after a barrier of the block, their merges are told to all blocks; after one of the cluster, the total.
  template <typename State, typename Merge>
  __device__ void add(int index, State mine, Merge merge) {
    mine = across_lanes<32>(mine, merge);
    if (threadIdx.x % 32 == 0) at<State>(room_.of_warps[index][threadIdx.x / 32]) = mine;
  }
  template <typename State, typename Merge>
  __device__ void tell(int slices, Merge merge) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= slices) return;
    const State slice = of_warps<State>(warp, merge);
    State& told = at<State>(room_.of_slices[turn_][Cluster::rank() * slices + warp]);
    if (lane < Cluster::size()) *Cluster::in_block(&told, lane) = slice;
  }
  template <typename State, typename Merge>
  __device__ State total(int slices, Merge merge) {
    const int slice = threadIdx.x % kSlices;
    State state{};
    if (slice < slices * Cluster::size()) state = at<State>(room_.of_slices[turn_][slice]);
    turn_ ^= 1;
    return across_lanes<kSlices>(state, merge);
  }

 private:
  template <typename State>
  __device__ static State& at(unsigned char* bytes) {
    static_assert(sizeof(State) <= kBytes);
    return *reinterpret_cast<State*>(bytes);
  }
  template <typename State, typename Merge>
  __device__ State of_warps(int index, Merge merge) const {
    return across_lanes<kWarps>(at<State>(room_.of_warps[index][threadIdx.x % kWarps]), merge);
  }

  Room& room_;
  int turn_ = 0;
};

}  // namespace dlogp
