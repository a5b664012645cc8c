// What stands for the launcher of csrc/cuda/extrapolated_sample.cu: the same kernel, on clusters that a test chooses.
#include "../../../csrc/cuda/extrapolated_sample.cuh"

namespace dlogp {

thread_local __attribute__((aligned(16))) unsigned char dlogp_shared[cuda_on_cpu::kSharedBytes];

namespace {

struct Launch {
  int blocks = 1;
  bool kept = true, backwards = false;
};

Launch launch;

// The clusters of a grid, one after another.
template <typename Stored, bool kKept>
void run(const SampleArguments& arguments, int slice_tokens) {
  const int64_t tokens = int64_t(slice_tokens) * kSlices / launch.blocks;
  const size_t shared_bytes = sizeof(SampleRoom) + (kKept ? 2 * tokens * sizeof(Stored) : 0);
  if (shared_bytes > cuda_on_cpu::kSharedBytes) std::abort();
  cuda_on_cpu::ClusterState cluster(launch.blocks);
  std::barrier together(launch.blocks);
  std::vector<std::jthread> blocks;
  for (int rank = 0; rank < launch.blocks; ++rank)
    blocks.emplace_back([&, rank] {
      cuda_on_cpu::Block block(kThreads, rank, cluster, launch.backwards);
      cluster.shared[rank] = dlogp_shared;
      for (int row = 0; row < int(arguments.rows); ++row) {
        std::memset(dlogp_shared, 0xFF, shared_bytes);
        blockIdx.x = unsigned(row * launch.blocks + rank);
        together.arrive_and_wait();
        block.run([&] { extrapolated_sample_kernel<Stored, kKept>(arguments, slice_tokens); });
        together.arrive_and_wait();  // nobody leaves while others may look into its memory
      }
    });
}

void run(LogitType type, const SampleArguments& arguments, int slice_tokens) {
  if (!launch.kept) return run<float, false>(arguments, slice_tokens);
  switch (type) {
    case LogitType::kBFloat16:
      return run<__nv_bfloat16, true>(arguments, slice_tokens);
    case LogitType::kHalf:
      return run<__half, true>(arguments, slice_tokens);
    case LogitType::kFloat:
      return run<float, true>(arguments, slice_tokens);
  }
}

}  // namespace

cudaError_t launch_extrapolated_sample(const SampleArguments& arguments, cudaStream_t) {
  run(kept_type(arguments), completed(arguments), slice_tokens(arguments.vocabulary));
  return cudaSuccess;
}

}  // namespace dlogp

extern "C" {

void set_launch(int blocks, bool kept, bool backwards) { dlogp::launch = {blocks, kept, backwards}; }

int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}
