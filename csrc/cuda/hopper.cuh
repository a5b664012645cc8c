// Hopper's instructions that CUDA C++ has no name for: barriers in shared memory, tiles copied by the tensor memory
// accelerator (TMA), and products by whole warp groups (wgmma). One function each, one PTX instruction or two.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "linear_sm90.h"

namespace dlogp::hopper {

// Where a thread's shared memory lies, as PTX counts.
__device__ inline uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Which of the cluster's blocks this is.
__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A barrier that completes a phase after `arrivals` and after all bytes that are expected have come.
__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// At the same barrier of a block of the cluster. Not `.release.cluster`: that waits for all memory, between two stages
// of products, and took a third of the kernel's speed; products that are done have read their stage.
__device__ inline void arrive_at(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

// Until the phase of this parity is complete.
__device__ inline void wait_for(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred complete;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A box of a matrix, from (row, column) on, into the shared memory of this block, or of all in `blocks`, a bit each, at
// the same address, where it counts for the same barrier. What lies outside of the matrix is 0.
__device__ inline void load_box(uint32_t to, const TensorMap& matrix, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(&matrix), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

__device__ inline void load_box_for(uint16_t blocks, uint32_t to, const TensorMap& matrix, uint32_t barrier, int column,
                                    int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
      "l"(&matrix), "r"(barrier), "h"(blocks), "r"(column), "r"(row)
      : "memory");
}

// A box from shared memory into a matrix; what lies outside of it is left out. To be waited for, until no more than
// `kLeft` boxes of this thread are still read, before their memory is written again.
__device__ inline void store_box(const TensorMap& matrix, uint32_t from, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\ncp.async.bulk.commit_group;" ::"l"(
          &matrix),
      "r"(from), "r"(column), "r"(row)
      : "memory");
}
template <int kLeft>
__device__ inline void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}

// What this thread has written to shared memory can be stored by `store_box` after the next barrier.
__device__ inline void publish_for_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of the 128 threads of a warp group.
__device__ inline void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory"); }

// Four matrices of 8 × 8 numbers of 16 bits, a word of each from every lane, to the rows that the lanes have addresses
// of.
__device__ inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// Registers of each thread of a warp group, from here on.
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Products of a warp group: begin, multiply any number of times, commit; all but the last `kLeft` commits are done
// after wait. Between begin and wait the accumulators belong to the matrix units.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Keeps the compiler from moving what reads or writes accumulators over this line.
template <int kCount>
__device__ inline void hold(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// An operand in shared memory: rows of 128 bytes, swizzled; eight of them make an atom.
__device__ inline uint64_t operand_at(uint32_t address) {
  constexpr uint64_t kAtomBytes = 1024, kSwizzle128 = 1;
  return (uint64_t(address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | (kAtomBytes >> 4) << 32 | kSwizzle128 << 62;
}

// x (64 rows, kColumns) = a (64, 16) · b (kColumns, 16)ᵀ, or that added to x where `keep` is not 0. Element i of a
// thread: column 8·⌊i/4⌋ + 2·(lane mod 4) + i mod 2 of row 16·warp + ⌊lane/4⌋, or where i mod 4 > 1, 8 rows below.
template <typename T, int kColumns>
struct Product;

#define X(i) "+f"(x[i])
#define X8(i) X(i), X(i + 1), X(i + 2), X(i + 3), X(i + 4), X(i + 5), X(i + 6), X(i + 7)
#define X40(i) X8(i), X8(i + 8), X8(i + 16), X8(i + 24), X8(i + 32)
#define X80 X40(0), X40(40)
#define X128 X80, X40(80), X8(120)
#define REGISTERS_80                                                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"   \
  "%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define REGISTERS_128                                                                                              \
  REGISTERS_80                                                                                                     \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,"     \
  "%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126," \
  "%127"
#define DEFINE_PRODUCT(T, TYPE, COLUMNS, COUNT, A, B, KEEP)                                                     \
  template <>                                                                                                   \
  struct Product<T, COLUMNS> {                                                                                  \
    static __device__ inline void add(float (&x)[COUNT], uint64_t a, uint64_t b, int keep) {                    \
      asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " KEEP                                               \
                   ", 0;\n"                                                                                     \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" REGISTERS_##COUNT \
                   "}," A ", " B ", keep, 1, 1, 0, 0;\n}"                                                       \
                   : X##COUNT                                                                                   \
                   : "l"(a), "l"(b), "r"(keep));                                                                \
    }                                                                                                           \
  };
DEFINE_PRODUCT(__nv_bfloat16, "bf16", 256, 128, "%128", "%129", "%130")
DEFINE_PRODUCT(__nv_bfloat16, "bf16", 160, 80, "%80", "%81", "%82")
DEFINE_PRODUCT(__half, "f16", 256, 128, "%128", "%129", "%130")
DEFINE_PRODUCT(__half, "f16", 160, 80, "%80", "%81", "%82")
#undef DEFINE_PRODUCT
#undef REGISTERS_128
#undef REGISTERS_80
#undef X128
#undef X80
#undef X40
#undef X8
#undef X

}  // namespace dlogp::hopper
