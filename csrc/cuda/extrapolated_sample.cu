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
struct LaunchPlan {
  Kernel kernel = nullptr;
  int slice_tokens = 0;
  int blocks = 1;        // of a cluster
  int shared_bytes = 0;  // of a block
};

// What a plan depends on, besides the number of rows. Shared memory is in bytes, `reserved` the system's of a block.
struct Device {
  int index, major, multiprocessors, shared_per_block, shared_per_multiprocessor, reserved;
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
  read(device.reserved, cudaDevAttrReservedSharedMemoryPerBlock);
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

void fill_configuration(const LaunchPlan& plan, int64_t rows, cudaStream_t stream, cudaLaunchConfig_t& configuration,
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

// What a kernel may ask for; the same for every plan, since each sets it for all of the kernel's launches.
// `dynamic_bytes` is what a block can have besides the shared memory that the compiler gave it.
cudaError_t allow(const Device& device, Kernel kernel, int& dynamic_bytes) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, function);
  if (error != cudaSuccess) return error;
  dynamic_bytes = device.shared_per_block - int(attributes.sharedSizeBytes);
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    if (error == cudaSuccess) error = cudaFuncSetAttribute(function, attribute, value);
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_bytes);
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (device.major >= 9) set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// Whether the device can hold such a cluster at all: one of 16 blocks needs 16 multiprocessors side by side, and a
// device that has no room for it may report that as an error.
cudaError_t check_fits(const LaunchPlan& plan) {
  cudaLaunchConfig_t configuration;
  cudaLaunchAttribute attribute;
  fill_configuration(plan, 1, nullptr, configuration, attribute);
  int clusters = 0;
  const cudaError_t error =
      cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(plan.kernel), &configuration);
  if (error != cudaSuccess) {
    cudaGetLastError();  // forget it: another plan may do
    return error;
  }
  return clusters > 0 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

// The smallest cluster of whose blocks two share a multiprocessor, one computing while the other reads; 16 blocks where
// few rows would leave multiprocessors idle. The result does not depend on it.
cudaError_t make_plan(const Device& device, LogitType type, int64_t vocabulary, bool few_rows, LaunchPlan& plan) {
  plan.slice_tokens = slice_tokens(vocabulary);
  const bool clusters = device.major >= 9;
  int dynamic_bytes = 0;
  if (clusters) {
    plan.kernel = kernel_for<true>(type);
    if (const cudaError_t error = allow(device, plan.kernel, dynamic_bytes); error != cudaSuccess) return error;
    const int static_bytes = device.shared_per_block - dynamic_bytes;
    const int of_two = device.shared_per_multiprocessor / 2 - device.reserved - static_bytes;
    constexpr int small_first[] = {1, 2, 4, 8, 16}, large_first[] = {16, 8, 4, 2, 1};
    for (const int room : {of_two, dynamic_bytes}) {
      for (const int blocks : few_rows ? large_first : small_first) {
        plan.blocks = blocks;
        const int64_t tokens = int64_t(kSlices / plan.blocks) * plan.slice_tokens;
        const int64_t bytes = int64_t(sizeof(SampleRoom)) + 2 * tokens * size_of(type);
        if (bytes > room) continue;
        plan.shared_bytes = int(bytes);
        if (check_fits(plan) == cudaSuccess) return cudaSuccess;
      }
    }
  }
  // Read from memory, or the L2 cache, at each walk.
  plan.kernel = kernel_for<false>(clusters ? LogitType::kFloat : type);
  plan.blocks = clusters ? 8 : 1;
  plan.shared_bytes = int(sizeof(SampleRoom));
  if (const cudaError_t error = allow(device, plan.kernel, dynamic_bytes); error != cudaSuccess) return error;
  if (plan.shared_bytes > dynamic_bytes) return cudaErrorInvalidConfiguration;
  return clusters ? check_fits(plan) : cudaSuccess;
}

// Plans are made once: it takes the driver several microseconds.
cudaError_t plan_for(const SampleArguments& arguments, LaunchPlan& plan) {
  using Key = std::tuple<int, LogitType, int64_t, bool>;
  static std::mutex mutex;
  static std::map<int, Device> devices;
  static std::map<Key, LaunchPlan> plans;
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
  LaunchPlan plan;
  if (const cudaError_t error = plan_for(arguments, plan); error != cudaSuccess) return error;
  cudaLaunchConfig_t configuration;
  cudaLaunchAttribute attribute;
  fill_configuration(plan, arguments.rows, stream, configuration, attribute);
  return cudaLaunchKernelEx(&configuration, plan.kernel, completed(arguments), plan.slice_tokens);
}

}  // namespace dlogp
