#pragma once

#define CUDART_VERSION 13000

#include <cstddef>
#include <functional>

using cudaError_t = int;
using cudaStream_t = void*;

constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801;

inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }

// Launching a kernel on clusters of blocks, as far as csrc/cuda does it; hopper_on_cpu has these.
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
constexpr int cudaEnableDefault = 0;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, int flags,
                                             cudaDriverEntryPointQueryResult* found);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t launch_on_cpu(const cudaLaunchConfig_t& configuration, const std::function<void()>& kernel);

template <typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* configuration, void (*kernel)(Arguments),
                               const Arguments& arguments) {
  return launch_on_cpu(*configuration, [&] { kernel(arguments); });
}
