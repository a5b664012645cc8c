// The products of linear_sm90.h, and the kernel around them.
//
// Layout. A tile is 128 rows × 256 tokens, of a pair 128 rows × 160 tokens of each model. A block has a producer and
// two consumers, warp groups all: a consumer multiplies 64 rows by the tile's tokens, with the sums in its registers,
// and folds them there (linear_forward.cuh), so no logit is ever in memory. What is multiplied lies in a ring of
// stages, 64 dimensions each, that the producer fills ahead:
//
//            64 dimensions                         tokens of the tile
//         ┌────────────────┐              ┌──────────────────────────────┐
//    128  │ hidden, upper  │ ─ wgmma ──►  │ consumer 0: 64 rows of logits│ ─ fold ─► state
//    rows │ hidden, lower  │ ─ wgmma ──►  │ consumer 1: 64 rows of logits│ ─ fold ─► state
//         └────────────────┘     ▲        └──────────────────────────────┘
//         ┌────────────────┐     │
//  tokens │     weight     │ ────┘   half of it loaded by each of the cluster's two blocks, for both
//         └────────────────┘
//
// The two blocks of a cluster have neighbouring tiles of rows and the same tokens, so the L2 cache gives each weight
// once for both. A stage is full when its bytes have come, and empty when both consumers of both blocks have multiplied
// it. Where all rows are one tile, a cluster is one block.
//
// Schedule. The vocabulary is cut into splits, and a unit is a split times a group of row tiles, one for each block:
// the cluster walks through its tiles, stores a state for every row, and goes on to its next unit. Units that run at
// the same time are of a panel of groups, whose hidden states stay in the L2 cache, and of as few splits as that
// leaves; they are equally long, or clusters would come to a weight that others have used long ago. While one consumer
// folds, the other one has the matrix units to itself.
//
// A row's sums run over dimensions, tokens and splits in an order that depends on D, V and the device alone.
#pragma once

#include <cuda_runtime_api.h>

#include "hopper.cuh"

namespace dlogp::hopper {

constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
constexpr int kTileRows = 128, kDepth = 64, kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <typename Element_, int kModels_>
struct Tile {
  using Element = Element_;
  static constexpr int kModels = kModels_;
  static constexpr int kColumns = tile_columns(kModels), kElements = kColumns / 2;  // of a thread
  static constexpr int kStages = kModels == 1 ? 4 : 6;
  static constexpr int kHiddenBytes = 2 * kTileRows * kDepth, kWeightBytes = 2 * kColumns * kDepth;
  static constexpr int kStageBytes = kHiddenBytes + kWeightBytes;
  static constexpr int kRingBytes = kStages * (kStageBytes + 16);
};

template <typename Arguments>
struct KernelArguments : Arguments {
  int blocks = 2;  // of a cluster
  int panel = 1;   // groups of row tiles
  TensorMap hidden_map[2], weight_map[2], gradient_map;
};

// Where a block's stages and their barriers lie.
template <typename T>
class Ring {
 public:
  __device__ Ring(const void* shared, int blocks) : begin_((shared_address(shared) + 1023) & ~1023u), blocks_(blocks) {}

  __device__ uint32_t hidden(int stage) const { return begin_ + stage * T::kStageBytes; }
  __device__ uint32_t weight(int stage) const { return hidden(stage) + T::kHiddenBytes; }
  __device__ uint32_t full(int stage) const { return begin_ + T::kStages * T::kStageBytes + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return full(T::kStages + stage); }
  // What an epilogue has for itself, at a multiple of 1024 bytes.
  __device__ uint32_t own() const { return (begin_ + T::kRingBytes + 1023) & ~1023u; }

  __device__ void init() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < T::kStages; ++stage) {
        init_barrier(full(stage), 1);
        init_barrier(empty(stage), kConsumers * blocks_);
      }
      publish_barriers();
    }
    cluster_sync();
  }

  // By all threads of a consumer, that it will not read the stage any more: to all blocks, which load into it.
  __device__ void release(int stage) const {
    if (int(threadIdx.x) % 128 < blocks_) arrive_at(empty(stage), threadIdx.x % 128);
  }

 private:
  uint32_t begin_;
  int blocks_;
};

// A stage of the ring, and the parity of its barriers' phase.
template <typename T>
struct Cursor {
  int stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage == T::kStages) stage = 0, parity ^= 1;
  }
};

// The units of a cluster, one after the other.
struct Unit {
  int row, split, first_tile, end_tile;  // row: the first of this block's tile
};

template <typename T>
class Schedule {
 public:
  __device__ Schedule(const LinearArguments& p, int blocks, int panel)
      : cluster_(int(blockIdx.x) / blocks),
        clusters_(int(gridDim.x) / blocks),
        blocks_(blocks),
        panel_(panel),
        splits_(int(p.splits)) {
    const int64_t rows = p.num_rows == nullptr ? p.total_rows : *p.num_rows;
    num_rows = int(min(rows - p.first, p.rows));
    row_groups_ = (num_rows + blocks * kTileRows - 1) / (blocks * kTileRows);
    tiles_ = int((p.vocabulary + T::kColumns - 1) / T::kColumns);
  }

  // Those of this cluster: `for (int unit = first(); unit < end(); unit += step())`.
  __device__ int first() const { return cluster_; }
  __device__ int end() const { return row_groups_ * splits_; }
  __device__ int step() const { return clusters_; }

  __device__ Unit unit(int index) const {
    const int first = index / (panel_ * splits_) * panel_, size = min(row_groups_ - first, panel_);
    const int local = index - first * splits_, split = local / size;
    return {(blocks_ * (first + local % size) + int(cluster_rank())) * kTileRows, split, tile_of(split),
            tile_of(split + 1)};
  }

  int num_rows;

 private:
  // The first of a split; the longer ones, by one tile, come first.
  __device__ int tile_of(int split) const { return tiles_ / splits_ * split + min(split, tiles_ % splits_); }

  int cluster_, clusters_, blocks_, panel_, splits_, row_groups_, tiles_;
};

// One thread fills the ring with all that the block multiplies.
template <typename T, typename Arguments>
__device__ void produce(const KernelArguments<Arguments>& p, const Ring<T>& ring, const Schedule<T>& schedule) {
  const int rank = int(cluster_rank()), part = T::kColumns / p.blocks;  // of the weight's rows, for every block
  Cursor<T> at;
  for (int index = schedule.first(); index < schedule.end(); index += schedule.step()) {
    const Unit unit = schedule.unit(index);
    for (int tile = unit.first_tile; tile < unit.end_tile; ++tile)
      for (int model = 0; model < T::kModels; ++model)
        for (int d = 0; d < p.heads[model].hidden_size; d += kDepth) {
          wait_for(ring.empty(at.stage), at.parity ^ 1);
          arrive_expecting(ring.full(at.stage), T::kStageBytes);
          load_box(ring.hidden(at.stage), p.hidden_map[model], ring.full(at.stage), d, unit.row);
          load_box_for((1 << p.blocks) - 1, ring.weight(at.stage) + rank * part * 2 * kDepth, p.weight_map[model],
                       ring.full(at.stage), d, tile * T::kColumns + rank * part);
          at.advance();
        }
  }
}

// A consumer's products of one tile and model. A stage is released when the next one's products are on their way.
template <typename T>
class Consumer {
 public:
  __device__ Consumer(const Ring<T>& ring, int index) : ring_(ring), index_(index) {}

  __device__ void multiply(int hidden_size, float (&x)[T::kElements]) {
    const int steps = (hidden_size + kDepth - 1) / kDepth;
    int previous = -1;
    for (int step = 0; step < steps; ++step) {
      wait_for(ring_.full(at_.stage), at_.parity);
      const uint64_t hidden = operand_at(ring_.hidden(at_.stage) + index_ * (T::kHiddenBytes / kConsumers));
      const uint64_t weight = operand_at(ring_.weight(at_.stage));
      hold(x);
      begin_products();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)  // 16 elements are 32 bytes, and operands count in 16
        Product<typename T::Element, T::kColumns>::add(x, hidden + 2 * k, weight + 2 * k, step | k);
      commit_products();
      hold(x);
      if (previous >= 0) {
        wait_for_products<1>();
        ring_.release(previous);
      }
      previous = at_.stage;
      at_.advance();
    }
    wait_for_products<0>();
    hold(x);
    ring_.release(previous);
  }

 private:
  const Ring<T>& ring_;
  const int index_;
  Cursor<T> at_;
};

// What an epilogue does with tiles is its own: begin a unit, take a tile's logits, end the unit.
template <typename T, typename Epilogue, typename Arguments>
__device__ void consume(const KernelArguments<Arguments>& p, const Ring<T>& ring, const Schedule<T>& schedule,
                        int index) {
  Consumer<T> consumer(ring, index);
  Epilogue epilogue(p, ring.own(), schedule.num_rows, index);
  float x[T::kElements], base_x[T::kModels == 1 ? 1 : T::kElements];
  for (int at = schedule.first(); at < schedule.end(); at += schedule.step()) {
    const Unit unit = schedule.unit(at);
    epilogue.begin(unit);
    for (int tile = unit.first_tile; tile < unit.end_tile; ++tile) {
      consumer.multiply(int(p.heads[0].hidden_size), x);
      if constexpr (T::kModels == 2) consumer.multiply(int(p.heads[1].hidden_size), base_x);
      epilogue.take(tile * T::kColumns, x, base_x);
    }
    epilogue.end(unit);
  }
}

template <typename T, typename Epilogue, typename Arguments>
__global__ void __launch_bounds__(kThreads, 1) linear_kernel(const __grid_constant__ KernelArguments<Arguments> p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ unsigned char shared[];
  const Ring<T> ring(shared, p.blocks);
  ring.init();
  const Schedule<T> schedule(p, p.blocks, p.panel);
  const int group = __shfl_sync(kWholeWarp, int(threadIdx.x) / 128, 0);
  if (group == 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce(p, ring, schedule);
    __syncwarp();
  } else {
    take_registers<kConsumerRegisters>();
    consume<T, Epilogue>(p, ring, schedule, group - 1);
  }
  cluster_sync();  // no block ends while the other still loads into it
#endif
}

}  // namespace dlogp::hopper
