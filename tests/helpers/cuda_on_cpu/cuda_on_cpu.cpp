#include "cuda_on_cpu.h"

thread_local cuda_on_cpu::Index threadIdx, blockIdx;

namespace cuda_on_cpu {
namespace {

thread_local Block* current_block = nullptr;
thread_local std::vector<std::unique_ptr<char[]>> stacks;  // of fibers, one block after the other

}  // namespace

Block& block() { return *current_block; }

void Block::enter() {
  Block& self = block();
  (*self.body_)();
  self.fibers_[self.current_].done = true;
  _longjmp(self.scheduler_, 1);
}

__attribute__((noinline)) void Block::wait_at(const Gate& gate) {
  Fiber& fiber = fibers_[current_];
  fiber.at = &gate;
  fiber.seen = gate.opened;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler_, 1);
  fiber.at = nullptr;
}

__attribute__((noinline)) void Block::resume(size_t index) {
  Fiber& fiber = fibers_[index];
  current_ = index;
  threadIdx.x = unsigned(index);
  if (_setjmp(scheduler_) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  while (stacks.size() <= index) stacks.push_back(std::make_unique_for_overwrite<char[]>(kStackBytes));
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = stacks[index].get();
  fiber.first.uc_stack.ss_size = kStackBytes;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, enter, 0);
  setcontext(&fiber.first);
}

uint64_t Block::exchange(uint64_t mine, int source) {
  Warp& warp = warps_[threadIdx.x / 32];
  Fiber& fiber = fibers_[current_];
  uint64_t* const words = warp.words[fiber.odd_exchange];
  fiber.odd_exchange = !fiber.odd_exchange;
  words[threadIdx.x % 32] = mine;
  pass(warp.gate);
  return words[source];
}

void Block::run(const std::function<void()>& body, const std::function<bool()>& idle) {
  current_block = this;
  body_ = &body;
  for (Fiber& fiber : fibers_) fiber.started = fiber.done = false;
  for (size_t left = fibers_.size(); left > 0;) {
    bool any = false;
    for (size_t turn = 0; turn < fibers_.size(); ++turn) {
      const size_t index = backwards_ ? fibers_.size() - 1 - turn : turn;
      Fiber& fiber = fibers_[index];
      if (fiber.done || (fiber.at != nullptr && fiber.at->opened == fiber.seen)) continue;
      resume(index);
      any = true;
      left -= fiber.done;
    }
    if (!any && !idle()) {
      std::fprintf(stderr, "cuda_on_cpu: all threads of a block wait, and some have left or are at other barriers\n");
      std::abort();
    }
  }
}

}  // namespace cuda_on_cpu
