#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "extrapolated_sample.cuh"
#include "extrapolated_sample.h"

namespace dlogp {
namespace {

using Kernel = void (*)(SampleArguments, int);

// How a kernel is launched for a vocabulary.
struct Plan {
  Kernel kernel = nullptr;
  int slice_tokens = 0;
  int blocks = 1;        // of a cluster
  int shared_bytes = 0;  // of a block
};

// What a plan depends on, besides the number of rows.
struct Device {
  int index, major, multiprocessors, shared_per_block, shared_per_multiprocessor;
};

cudaError_t describe_current(Device& device) {
  cudaError_t error = cudaGetDevice(&device.index);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device.index);
  };
  read(device.major, cudaDevAttrComputeCapabilityMajor);
  read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(device.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return error;
}

template <bool kKept>
Kernel kernel_for(LogitType type) {
  switch (type) {
    case LogitType::kBFloat16:
      return extrapolated_sample_kernel<__nv_bfloat16, kKept>;
    case LogitType::kHalf:
      return extrapolated_sample_kernel<__half, kKept>;
    case LogitType::kFloat:
      break;
  }
  return extrapolated_sample_kernel<float, kKept>;
}

void fill_configuration(const Plan& plan, int64_t rows, cudaStream_t stream, cudaLaunchConfig_t& configuration,
                        cudaLaunchAttribute& attribute) {
  configuration = {};
  configuration.gridDim = dim3(unsigned(rows * plan.blocks));
  configuration.blockDim = dim3(kThreads);
  configuration.dynamicSmemBytes = size_t(plan.shared_bytes);
  configuration.stream = stream;
  if (plan.blocks == 1) return;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(plan.blocks), 1, 1};
  configuration.attrs = &attribute;
  configuration.numAttrs = 1;
}

// Whether the device can hold such a cluster at all: one of 16 blocks needs 16 multiprocessors side by side.
bool fits(const Plan& plan) {
  cudaLaunchConfig_t configuration;
  cudaLaunchAttribute attribute;
  fill_configuration(plan, 1, nullptr, configuration, attribute);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(plan.kernel), &configuration) !=
      cudaSuccess) {
    cudaGetLastError();  // forget it
    return false;
  }
  return clusters > 0;
}

// What a kernel may ask for; the same for every plan, since each sets it for all of the kernel's launches.
cudaError_t allow(const Device& device, Kernel kernel) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    if (error == cudaSuccess) error = cudaFuncSetAttribute(function, attribute, value);
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (device.major >= 9) set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// The smallest cluster of whose blocks two share a multiprocessor, one computing while the other reads; 16 blocks where
// few rows would leave multiprocessors idle. The result does not depend on it.
cudaError_t make_plan(const Device& device, LogitType type, int64_t vocabulary, bool few_rows, Plan& plan) {
  constexpr int reserved = 1024;  // of each block, by the system
  const int of_two = device.shared_per_multiprocessor / 2 - reserved;
  plan.slice_tokens = slice_tokens(vocabulary);
  if (device.major >= 9) {
    plan.kernel = kernel_for<true>(type);
    if (const cudaError_t error = allow(device, plan.kernel); error != cudaSuccess) return error;
    constexpr int small_first[] = {1, 2, 4, 8, 16}, large_first[] = {16, 8, 4, 2, 1};
    for (const int room : {of_two, device.shared_per_block}) {
      for (const int blocks : few_rows ? large_first : small_first) {
        plan.blocks = blocks;
        const int64_t tokens = int64_t(kSlices / plan.blocks) * plan.slice_tokens;
        const int64_t bytes = int64_t(sizeof(SampleRoom)) + 2 * tokens * size_of(type);
        if (bytes > room) continue;
        plan.shared_bytes = int(bytes);
        if (fits(plan)) return cudaSuccess;
      }
    }
  }
  // Read from memory, or the L2 cache, at each walk.
  const bool clusters = device.major >= 9;
  plan.kernel = kernel_for<false>(clusters ? LogitType::kFloat : type);
  plan.blocks = clusters ? 8 : 1;
  plan.shared_bytes = int(sizeof(SampleRoom));
  return allow(device, plan.kernel);
}

// Plans are made once: it takes the driver several microseconds.
cudaError_t plan_for(const SampleArguments& arguments, Plan& plan) {
  using Key = std::tuple<int, LogitType, int64_t, bool>;
  static std::mutex mutex;
  static std::map<int, Device> devices;
  static std::map<Key, Plan> plans;
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (devices.count(index) == 0) {
    Device device;
    if (const cudaError_t error = describe_current(device); error != cudaSuccess) return error;
    devices[index] = device;
  }
  const Device& device = devices[index];
  const bool few_rows = arguments.vocabulary >= 16384 && 2 * kSlices * arguments.rows <= device.multiprocessors;
  const LogitType type = kept_type(arguments);
  const Key key = {index, type, arguments.vocabulary, few_rows};
  const auto known = plans.find(key);
  if (known != plans.end()) {
    plan = known->second;
    return cudaSuccess;
  }
  const cudaError_t error = make_plan(device, type, arguments.vocabulary, few_rows, plan);
  if (error == cudaSuccess) plans[key] = plan;
  return error;
}

}  // namespace

cudaError_t launch_extrapolated_sample(const SampleArguments& arguments, cudaStream_t stream) {
  Plan plan;
  if (const cudaError_t error = plan_for(arguments, plan); error != cudaSuccess) return error;
  cudaLaunchConfig_t configuration;
  cudaLaunchAttribute attribute;
  fill_configuration(plan, arguments.rows, stream, configuration, attribute);
  return cudaLaunchKernelEx(&configuration, plan.kernel, completed(arguments), plan.slice_tokens);
}

}  // namespace dlogp
