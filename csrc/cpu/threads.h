// What threads that share a loop have of their own.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace dlogp {

// Room for every thread that may take part, also where the op is called within a parallel region. The first
// parallel_for of a thread sets the number of its threads, which torch::set_num_threads may have changed elsewhere, so
// that is done before they are counted.
inline int64_t thread_slots() {
  at::internal::lazy_init_num_threads();
  return std::max(at::get_num_threads(), at::get_thread_num() + 1);
}

// That of the calling thread, out of `slots`.
inline int64_t own_slot(int64_t slots) {
  const int64_t slot = at::get_thread_num();
  TORCH_CHECK(slot < slots, "thread ", slot, " takes part, expected less than ", slots, " threads");
  return slot;
}

// One for each thread.
template <typename T>
class PerThread {
 public:
  T& own() { return slots_[own_slot(int64_t(slots_.size()))]; }

 private:
  std::vector<T> slots_ = std::vector<T>(thread_slots());
};

// Calls use(i) for i in [0, count), `grain` of them at least on each thread that takes part.
template <typename Use>
void for_each(int64_t count, int64_t grain, Use use) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) use(i);
  });
}

}  // namespace dlogp
