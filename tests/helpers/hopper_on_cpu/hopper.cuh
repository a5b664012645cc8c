// csrc/cuda/hopper.cuh on the CPU: a cluster of blocks, its barriers, copies and products.
//
// All threads of a cluster are fibers of one cuda_on_cpu::Block. What the hardware does beside them comes as late as it
// may: a product when its warp group waits for it, a store when its thread does and, if so wished, a copy when no
// thread can go on without one. A copy into what products still read, and a product of what copies still write, is a
// problem; so are waiting for ever, and a block that ends before all is done.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <list>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda_on_cpu.h"
#include "linear_sm90.h"

size_t __cvta_generic_to_shared(const void*);
inline void __syncwarp() {}

// The header itself, for what is not an instruction there.
#define hopper ptx
#include "cuda/hopper.cuh"
#undef hopper

#define __CUDA_ARCH_FEAT_SM90_ALL
#undef __shared__  // memory_ is shared memory
#define __shared__

namespace hopper_on_cpu {

constexpr int kThreads = 384, kWarpGroup = 128;           // of a block
constexpr uint32_t kBegin = 1040, kRow = 128, kAtom = 8;  // of shared memory, unlike an atom; bytes of a row; its rows

struct Range {
  uint32_t begin, end;
  bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
  bool holds(const Range& other) const { return begin <= other.begin && other.end <= end; }
};

// What a TensorMap holds here, of a matrix of 16-bit elements.
struct Matrix {
  unsigned char* data;
  uint64_t columns, rows, stride;  // stride in bytes
  uint32_t box_rows;
};

struct Barrier {
  cuda_on_cpu::Gate gate;  // which has opened as often as a phase was completed
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;  // still to come

  void count(int arrived, int64_t expected) {
    pending -= arrived;
    bytes += expected;
    if (pending != 0 || bytes != 0) return;
    pending = arrivals;
    ++gate.opened;
  }
};

// Into shared memory.
struct Copy {
  int block;
  Range to;
  Matrix from;
  uint32_t barrier;
  int column, row;
};

// From shared memory.
struct Store {
  Matrix to;
  uint32_t from;
  int column, row;
};

// One thread's elements of a product, which reads whole rows of both operands.
struct Product {
  float* x;
  uint64_t a, b;
  int columns, keep, group;  // group: of those that were committed together
  void (*multiply)(const Product&);

  bool reads(const Range& range) const { return rows_at(a, 64).overlaps(range) || rows_at(b, columns).overlaps(range); }
  static Range rows_at(uint64_t operand, int rows) {
    const uint32_t begin = uint32_t(operand & 0x3FFF) << 4 & ~(kRow - 1);
    return {begin, begin + uint32_t(rows) * kRow};
  }
};

class Cluster {
 public:
  Cluster(int blocks, int index, int clusters, size_t shared_bytes, bool backwards, bool late_copies)
      : index_(index),
        clusters_(clusters),
        shared_{kBegin, kBegin + uint32_t(shared_bytes)},
        backwards_(backwards),
        late_copies_(late_copies),
        block_(blocks * kThreads, 0, state_, backwards),
        of_blocks_(blocks),
        of_threads_(blocks * kThreads) {
    for (OfBlock& block : of_blocks_) {
      block.memory.assign(shared_.end, 0xFF);
      for (auto& gate : block.warp_groups) gate.members = kWarpGroup;
      for (auto& gate : block.named) gate.members = kWarpGroup;
    }
  }

  // Whose fibers run.
  static Cluster& current() { return *running(); }

  void run(const std::function<void()>& kernel) {
    running() = this;
    const auto body = [&] {
      kernel();
      if (!mine_as_thread().stores.empty()) fail("a thread ends before its stores have been read");
      ++mine().ended;
    };
    block_.run(body, [this] {
      if (copies_.empty()) throw std::runtime_error(problem.empty() ? "all threads wait for ever" : problem);
      land_a_copy();
      return true;
    });
    if (!copies_.empty()) fail("a block ends before a copy has come");
  }

  void fail(const std::string& what) {
    if (problem.empty()) problem = what;
  }
  std::string problem;  // the first one

  unsigned thread() const { return unsigned(block_.current()) % kThreads; }
  int rank() const { return int(block_.current()) / kThreads; }
  unsigned block_of_grid() const { return unsigned(index_ * of_blocks_.size() + rank()); }
  unsigned blocks_of_grid() const { return unsigned(clusters_ * of_blocks_.size()); }
  void sync() { block_.sync(); }

  Barrier& barrier(uint32_t address, int block) {
    if (of_blocks_[block].ended == kThreads) fail("a block has ended before its barriers are done");
    if (!shared_.holds({address, address + 8}) || address % 8 != 0) fail("a barrier lies outside");
    return of_blocks_[block].barriers[address];
  }
  void arrive(Barrier& barrier, int bytes) {
    if (barrier.pending == 0) fail("more arrive at a barrier than it counts");
    barrier.count(1, bytes);
  }
  void wait(Barrier& barrier, int parity) {
    while (int(barrier.gate.opened & 1) == parity) block_.wait_at(barrier.gate);
  }

  void copy(unsigned blocks, uint32_t to, const dlogp::TensorMap& map, uint32_t barrier, int column, int row) {
    Matrix from;
    std::memcpy(&from, &map, sizeof from);
    const Range range = {to, to + from.box_rows * kRow};
    if (!shared_.holds(range) || to % (kAtom * kRow) != 0) fail("a copy goes outside of a stage");
    for (int block = 0; block < int(of_blocks_.size()); ++block)
      if (blocks >> block & 1) {
        copies_.push_back({block, range, from, barrier, column, row});
        if (!late_copies_) land_a_copy();
      }
  }

  void add(Product product) {
    product.group = mine_as_thread().commits;
    mine_as_thread().products.push_back(product);
  }
  void commit() { ++mine_as_thread().commits; }
  void finish_products(int left) {
    auto& [products, commits, stores] = mine_as_thread();
    auto& gate = mine().warp_groups[thread() / kWarpGroup];
    block_.pass(gate);  // a warp group multiplies together
    while (!products.empty() && products.front().group < commits - left) {
      for (const Copy& copy : copies_)
        if (copy.block == rank() && products.front().reads(copy.to)) fail("products read what a copy still writes");
      products.front().multiply(products.front());
      products.pop_front();
    }
    block_.pass(gate);
  }

  void sync_group(int gate) { block_.pass(mine().named[gate]); }
  void store(const dlogp::TensorMap& map, uint32_t from, int column, int row) {
    Store store = {{}, from, column, row};
    std::memcpy(&store.to, &map, sizeof store.to);
    mine_as_thread().stores.push_back(store);
  }
  void finish_stores(size_t left) {
    auto& stores = mine_as_thread().stores;
    for (; stores.size() > left; stores.pop_front()) {
      const auto& [to, from, column, first_row] = stores.front();
      for (int64_t i = 0; i < to.box_rows && first_row + i < int64_t(to.rows); ++i)
        for (int64_t byte = 0; byte < kRow && 2 * column + byte < 2 * int64_t(to.columns); byte += 2)
          std::memcpy(to.data + (first_row + i) * to.stride + 2 * column + byte,
                      chunk(rank(), uint32_t(from + i * kRow + byte / 16 * 16)) + byte % 16, 2);
    }
  }
  // A word, not swizzled.
  void write(uint32_t address, uint32_t word) {
    if (!shared_.holds({address, address + 4})) fail("a word is written outside");
    std::memcpy(&mine().memory[address], &word, 4);
  }

  // The 16 bytes at an address, swizzled.
  unsigned char* chunk(int block, uint32_t address) {
    return &of_blocks_[block].memory[address ^ (address >> 3 & 0x70)];
  }

 private:
  struct OfThread {
    std::list<Product> products;
    int commits = 0;
    std::list<Store> stores;
  };
  struct OfBlock {
    std::vector<unsigned char> memory;
    std::map<uint32_t, Barrier> barriers;
    cuda_on_cpu::Gate warp_groups[kThreads / kWarpGroup], named[16];
    int ended = 0;  // threads
  };

  static Cluster*& running() {
    static Cluster* cluster = nullptr;
    return cluster;
  }
  OfBlock& mine() { return of_blocks_[rank()]; }
  OfThread& mine_as_thread() { return of_threads_[block_.current()]; }

  // The first copy, or if threads run backwards the last; what lies outside of the matrix is 0.
  void land_a_copy() {
    const auto next = backwards_ ? std::prev(copies_.end()) : copies_.begin();
    const auto [block, to, from, barrier_address, column, first_row] = *next;
    copies_.erase(next);
    for (int thread = 0; thread < kThreads; ++thread)
      for (const Product& product : of_threads_[block * kThreads + thread].products)
        if (product.reads(to)) fail("a copy goes where products still read");
    for (uint32_t i = 0; i < from.box_rows; ++i) {
      unsigned char row[kRow] = {};
      const int64_t n = first_row + int64_t(i), columns = int64_t(from.columns) - column;
      if (n < int64_t(from.rows) && columns > 0)
        std::memcpy(row, from.data + n * from.stride + 2 * column, min(2 * columns, int64_t(kRow)));
      for (uint32_t byte = 0; byte < kRow; byte += 16)
        std::memcpy(chunk(block, to.begin + i * kRow + byte), row + byte, 16);
    }
    barrier(barrier_address, block).count(0, -int64_t(to.end - to.begin));
  }

  const int index_, clusters_;
  const Range shared_;
  const bool backwards_, late_copies_;
  cuda_on_cpu::ClusterState state_{1};
  cuda_on_cpu::Block block_;
  std::vector<OfBlock> of_blocks_;
  std::vector<OfThread> of_threads_;
  std::list<Copy> copies_;  // that have not come
};

}  // namespace hopper_on_cpu

namespace dlogp::hopper {

using hopper_on_cpu::Cluster;
using ptx::operand_at;

// Here for CUDA's: a coordinate of the thread that has its turn.
template <auto kOf>
struct Coordinates {
  struct {
    operator unsigned() const { return (Cluster::current().*kOf)(); }
  } x;
};
constexpr Coordinates<&Cluster::thread> threadIdx = {};
constexpr Coordinates<&Cluster::block_of_grid> blockIdx = {};
constexpr Coordinates<&Cluster::blocks_of_grid> gridDim = {};

inline uint32_t shared_address(const void*) { return hopper_on_cpu::kBegin; }
inline uint32_t cluster_rank() { return uint32_t(Cluster::current().rank()); }
inline void cluster_sync() { Cluster::current().sync(); }

inline auto& own_barrier(uint32_t address) { return Cluster::current().barrier(address, Cluster::current().rank()); }
inline void init_barrier(uint32_t barrier, int arrivals) {
  own_barrier(barrier) = {.arrivals = arrivals, .pending = arrivals};
}
inline void publish_barriers() {}
inline void arrive_expecting(uint32_t barrier, int bytes) { Cluster::current().arrive(own_barrier(barrier), bytes); }
inline void arrive_at(uint32_t barrier, uint32_t block) {
  Cluster::current().arrive(Cluster::current().barrier(barrier, int(block)), 0);
}
inline void wait_for(uint32_t barrier, int parity) { Cluster::current().wait(own_barrier(barrier), parity); }

inline void load_box_for(uint16_t blocks, uint32_t to, const TensorMap& matrix, uint32_t barrier, int column, int row) {
  Cluster::current().copy(blocks, to, matrix, barrier, column, row);
}
inline void load_box(uint32_t to, const TensorMap& matrix, uint32_t barrier, int column, int row) {
  load_box_for(uint16_t(1 << cluster_rank()), to, matrix, barrier, column, row);
}

inline void store_box(const TensorMap& matrix, uint32_t from, int column, int row) {
  Cluster::current().store(matrix, from, column, row);
}
template <int kLeft>
void wait_for_stores() {
  Cluster::current().finish_stores(kLeft);
}
inline void publish_for_stores() {}
inline void sync_group(int group) { Cluster::current().sync_group(group); }
inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const int lane = int(threadIdx.x) % 32;
  const uint32_t words[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)  // a matrix each, whose rows eight of the lanes have addresses of
    Cluster::current().write(__shfl_from(address, 8 * i + lane / 4) + 4 * (lane % 4), words[i]);
}

template <int>
void take_registers() {}
template <int>
void give_registers() {}
template <int kCount>
void hold(float (&)[kCount]) {}

inline float exp2_of(float x) { return std::exp2(x); }

inline void begin_products() {}
inline void commit_products() { Cluster::current().commit(); }
template <int kLeft>
void wait_for_products() {
  Cluster::current().finish_products(kLeft);
}

inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float to_float(__half x) { return __half2float(x); }

// 16 elements of a row of an operand.
template <typename T>
void read(uint64_t operand, int row, float (&elements)[16]) {
  using namespace hopper_on_cpu;
  const uint32_t begin = uint32_t(operand & 0x3FFF) << 4, atom_bytes = uint32_t(operand >> 32 & 0x3FFF) << 4;
  for (int half = 0; half < 2; ++half) {
    T chunk[8];
    const uint32_t address = begin + row / kAtom * atom_bytes + row % kAtom * kRow + 16 * half;
    std::memcpy(chunk, Cluster::current().chunk(int(cluster_rank()), address), sizeof chunk);
    for (int i = 0; i < 8; ++i) elements[8 * half + i] = to_float(chunk[i]);
  }
}

template <typename T, int kColumns>
struct Product {
  static void add(float (&x)[kColumns / 2], uint64_t a, uint64_t b, int keep) {
    if (a >> 62 != 1 || b >> 62 != 1) Cluster::current().fail("an operand is not swizzled by 128 bytes");
    Cluster::current().add({x, a, b, kColumns, keep, 0, multiply});
  }

 private:
  static void multiply(const hopper_on_cpu::Product& product) {
    const int thread = int(threadIdx.x) % 128, row = thread / 32 * 16 + thread % 32 / 4;
    float rows[2][16], column[16];
    for (int r = 0; r < 2; ++r) read<T>(product.a, row + 8 * r, rows[r]);
    for (int i = 0; i < kColumns / 2; i += 4)
      for (int odd = 0; odd < 2; ++odd) {
        read<T>(product.b, 2 * i + 2 * (thread % 4) + odd, column);
        for (int r = 0; r < 2; ++r) {
          float& sum = product.x[i + 2 * r + odd];
          if (product.keep == 0) sum = 0;
          for (int k = 0; k < 16; ++k) sum += rows[r][k] * column[k];
        }
      }
  }
};

}  // namespace dlogp::hopper
