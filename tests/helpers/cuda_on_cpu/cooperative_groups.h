#pragma once

#include "cuda_on_cpu.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return unsigned(cuda_on_cpu::block().cluster().shared.size()); }
  unsigned block_rank() const { return unsigned(cuda_on_cpu::block().rank()); }
  void sync() const { cuda_on_cpu::block().sync_cluster(); }
  // Nobody waits for a barrier's first half.
  void barrier_arrive() const {}
  void barrier_wait() const { sync(); }
  template <typename T>
  T* map_shared_rank(T* mine, unsigned rank) const {
    const auto& shared = cuda_on_cpu::block().cluster().shared;
    auto* bytes = reinterpret_cast<unsigned char*>(mine);
    return reinterpret_cast<T*>(bytes - shared[block_rank()] + shared[rank]);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
