// As much of the CUDA driver as Triton's host code calls, without a GPU: nothing runs, and what arrives is kept.
//
// A tensor map holds what it was made from; a launch is kept with the bytes of its parameters, whose sizes the test
// says beforehand, since cuLaunchKernelEx is given their addresses alone.

#include <cuda.h>
#include <stdint.h>
#include <string.h>

#define PARAMETER_BYTES 32764  // the most that a kernel of CUDA takes
#define MAX_DEVICES 1024

// As in fake_gpu.py.
typedef struct {
  uint32_t grid[3], block[3];
  uint32_t shared_memory, launches;
  uint64_t stream, function;
  uint8_t parameters[PARAMETER_BYTES];
} Launch;

typedef struct {
  uint64_t address, dimensions[5], strides[4];
  uint32_t box[5], element_strides[5];
  uint8_t type, rank, interleave, swizzle, l2_promotion, fill;
} TensorMap;

_Static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a tensor map has room for what it is made from");

static Launch launch;
static int parameter_count, parameter_sizes[PARAMETER_BYTES];
static struct {
  int shared_memory, multiprocessors;
} devices[MAX_DEVICES];
static uintptr_t functions;

void offline_device(int device, int shared_memory, int multiprocessors) {
  devices[device].shared_memory = shared_memory;
  devices[device].multiprocessors = multiprocessors;
}

void offline_expect(int count, const int* sizes) {
  parameter_count = count;
  memcpy(parameter_sizes, sizes, count * sizeof(int));
}

const Launch* offline_launch(void) { return &launch; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  launch.launches++;
  launch.grid[0] = config->gridDimX, launch.grid[1] = config->gridDimY, launch.grid[2] = config->gridDimZ;
  launch.block[0] = config->blockDimX, launch.block[1] = config->blockDimY, launch.block[2] = config->blockDimZ;
  launch.shared_memory = config->sharedMemBytes;
  launch.stream = (uint64_t)config->hStream;
  launch.function = (uint64_t)function;
  uint8_t* place = launch.parameters;
  for (int i = 0; i < parameter_count; i++) {
    memcpy(place, parameters[i], parameter_sizes[i]);
    place += parameter_sizes[i];
  }
  return CUDA_SUCCESS;
}

static int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
      return 4;
    default:
      return 0;
  }
}

// The conditions of the driver's documentation, of a map that is not interleaved.
static int is_valid(CUtensorMapDataType type, uint32_t rank, void* address, const uint64_t* dimensions,
                    const uint64_t* strides, const uint32_t* box, CUtensorMapSwizzle swizzle) {
  static const uint32_t swizzled_bytes[] = {UINT32_MAX, 32, 64, 128};
  uint32_t inner = bytes_of(type) * box[0];
  if (inner == 0 || inner % 16 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B || inner > swizzled_bytes[swizzle]) return 0;
  if (rank < 1 || rank > 5 || !address || (uint64_t)address % 16) return 0;
  for (uint32_t i = 0; i < rank; i++)
    if (dimensions[i] < 1 || dimensions[i] > UINT64_C(1) << 32 || box[i] < 1 || box[i] > 256) return 0;
  for (uint32_t i = 0; i + 1 < rank; i++)
    if (strides[i] % 16 || strides[i] >= UINT64_C(1) << 40 || strides[i] < (i ? strides[i - 1] : 1)) return 0;
  return 1;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dimensions, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2_promotion,
                                CUtensorMapFloatOOBfill fill) {
  if (!is_valid(type, rank, address, dimensions, strides, box, swizzle)) return CUDA_ERROR_INVALID_VALUE;
  TensorMap map = {.address = (uint64_t)address,
                   .type = type,
                   .rank = rank,
                   .interleave = interleave,
                   .swizzle = swizzle,
                   .l2_promotion = l2_promotion,
                   .fill = fill};
  memcpy(map.dimensions, dimensions, rank * sizeof(*dimensions));
  memcpy(map.strides, strides, (rank - 1) * sizeof(*strides));
  memcpy(map.box, box, rank * sizeof(*box));
  memcpy(map.element_strides, element_strides, rank * sizeof(*element_strides));
  memset(out, 0, sizeof(*out));
  memcpy(out, &map, sizeof(map));
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = devices[device].shared_memory;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = devices[device].multiprocessors;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)++functions;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "unknown error";
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = 13020;  // up to 13.1 Triton itself mends a bit of the tensor maps of small tensors
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// Linked by Triton's host code, and not called in these tests.
CUresult cuCtxGetDevice(CUdevice* device) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) { return CUDA_ERROR_NOT_SUPPORTED; }
