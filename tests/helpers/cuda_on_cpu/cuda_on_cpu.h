// CUDA's device side on the CPU, as far as the kernels of csrc/cuda use it: the kernel's own source runs in tests.
//
// A block is a thread of the operating system, its CUDA threads are fibers that take turns there, and the blocks of a
// cluster run at the same time. A fiber goes on until it reaches a barrier; `backwards` reverses the turns, so that
// what a missing barrier leaves to chance comes out in two ways. Shared memory begins as 0xFF bytes.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __CUDA_ARCH__ 900
#define __host__
#define __device__
#define __global__
#define __shared__ thread_local
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

using std::max;
using std::min;

namespace cuda_on_cpu {

constexpr size_t kSharedBytes = 232448;
constexpr size_t kStackBytes = 32768;

struct Index {
  unsigned x = 0;
};

// A barrier of fibers of one block: the last of `members` to come opens it.
struct Gate {
  int members = 0, waiting = 0;
  uint64_t opened = 0;
};

// A lane that has come to the next exchange but one has passed the gate of the next, so that all have read this one's.
struct Warp {
  Gate gate;
  uint64_t words[2][32];
};

struct Fiber {
  ucontext_t first;
  jmp_buf place;
  bool started = false, done = false, odd_exchange = false;
  const Gate* at = nullptr;  // where it waits
  uint64_t seen = 0;
};

struct ClusterState {
  explicit ClusterState(int blocks) : barrier(blocks), shared(blocks) {}
  std::barrier<> barrier;
  std::vector<unsigned char*> shared;
};

class Block {
 public:
  Block(int threads, int rank, ClusterState& cluster, bool backwards)
      : rank_(rank), cluster_(cluster), backwards_(backwards), fibers_(threads), warps_((threads + 31) / 32) {
    gate_.members = cluster_gate_.members = threads;
    for (Warp& warp : warps_) warp.gate.members = 32;
  }

  // `idle` is asked when all threads wait, and says whether some can go on now.
  void run(const std::function<void()>& body, const std::function<bool()>& idle = [] { return false; });
  int rank() const { return rank_; }
  size_t current() const { return current_; }
  ClusterState& cluster() { return cluster_; }

  void sync() { pass(gate_); }
  int sync_and_count(bool predicate) {
    counted_ += predicate;
    sync();
    const int count = counted_;
    sync();
    counted_ = 0;
    sync();
    return count;
  }
  void sync_cluster() {
    pass(cluster_gate_, [this] { cluster_.barrier.arrive_and_wait(); });
  }
  // What lane `source` of this warp gives.
  uint64_t exchange(uint64_t mine, int source);
  void pass(Gate& gate) {
    pass(gate, [] {});
  }
  void wait_at(const Gate& gate);

 private:
  template <typename Open>
  void pass(Gate& gate, Open open) {
    if (++gate.waiting < gate.members) {
      wait_at(gate);
      return;
    }
    gate.waiting = 0;
    open();
    ++gate.opened;
  }
  void resume(size_t index);
  static void enter();

  const int rank_;
  ClusterState& cluster_;
  const bool backwards_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Gate gate_, cluster_gate_;
  size_t current_ = 0;
  int counted_ = 0;
  jmp_buf scheduler_;
  const std::function<void()>* body_ = nullptr;
};

Block& block();

}  // namespace cuda_on_cpu

extern thread_local cuda_on_cpu::Index threadIdx, blockIdx;

inline void __syncthreads() { cuda_on_cpu::block().sync(); }
inline int __syncthreads_count(int predicate) { return cuda_on_cpu::block().sync_and_count(predicate != 0); }

template <typename T>
T __shfl_from(T value, int source) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = cuda_on_cpu::block().exchange(word, source);
  std::memcpy(&value, &word, sizeof value);
  return value;
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return __shfl_from(value, source);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return __shfl_from(value, int(threadIdx.x % 32) ^ lane_mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const int lane = int(threadIdx.x % 32);
  return __shfl_from(value, lane < int(distance) ? lane : lane - int(distance));
}

// Fibers of a block take turns; nothing comes between.
inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at = before + value;
  return before;
}

inline uint32_t atomicMax(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at = max(before, value);
  return before;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint64_t __float2ull_rn(float x) { return uint64_t(std::nearbyint(x)); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }

struct float2 {
  float x, y;
};

template <typename T>
T __ldg(const T* at) {
  return *at;
}
