#include "linear_forward_sm90.cuh"

namespace dlogp {
namespace {

using hopper::KernelArguments;

// The enumerators of cuda.h that a matrix of 16-bit numbers needs, by the driver's binary interface.
constexpr int kFloat16 = 6, kBFloat16 = 9, kNoInterleave = 0, kSwizzle128 = 3, kPromote256 = 3, kZeros = 0;
using EncodeTiled = int (*)(TensorMap*, int type, unsigned rank, void* address, const uint64_t* sizes,
                            const uint64_t* strides, const unsigned* box, const unsigned* element_strides,
                            int interleave, int swizzle, int promotion, int fill);

// Of the driver, which is not linked.
cudaError_t find_encoder(EncodeTiled& encode) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  encode = reinterpret_cast<EncodeTiled>(function);
  return error != cudaSuccess ? error : found == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorNotSupported;
}

struct Matrix {
  const void* data;
  int64_t rows, columns, stride;
};

cudaError_t describe(EncodeTiled encode, bool half, const Matrix& matrix, int box_rows, TensorMap& map) {
  const uint64_t sizes[] = {uint64_t(matrix.columns), uint64_t(matrix.rows)}, strides[] = {uint64_t(2 * matrix.stride)};
  const unsigned box[] = {hopper::kDepth, unsigned(box_rows)}, every[] = {1, 1};
  const int failed = encode(&map, half ? kFloat16 : kBFloat16, 2, const_cast<void*>(matrix.data), sizes, strides, box,
                            every, kNoInterleave, kSwizzle128, kPromote256, kZeros);
  return failed ? cudaErrorInvalidValue : cudaSuccess;
}

using Kernel = void (*)(KernelArguments);

template <int kModels>
Kernel kernel_for(bool half, bool transformed) {
  using namespace hopper;
  if (half)
    return transformed ? linear_forward_kernel<__half, kModels, true> : linear_forward_kernel<__half, kModels, false>;
  return transformed ? linear_forward_kernel<__nv_bfloat16, kModels, true>
                     : linear_forward_kernel<__nv_bfloat16, kModels, false>;
}

bool is_transformed(const HeadMatrices& head) { return head.bias != nullptr || head.tanh_scale != 0; }

template <int kModels>
cudaError_t launch(KernelArguments& p, cudaStream_t stream) {
  using Tile = hopper::Tile<kModels>;
  EncodeTiled encode = nullptr;
  cudaError_t error = find_encoder(encode);
  for (int model = 0; model < kModels && error == cudaSuccess; ++model) {
    const HeadMatrices& head = p.heads[model];
    const Matrix hidden = {head.hidden, head.hidden_rows, head.hidden_size, head.stride_hidden};
    const Matrix weight = {head.weight, p.vocabulary, head.hidden_size, head.stride_weight};
    error = describe(encode, p.half, hidden, hopper::kTileRows, p.hidden[model]);
    if (error == cudaSuccess)
      error = describe(encode, p.half, weight, Tile::kColumns / hopper::kBlocks, p.weight[model]);
  }
  if (error != cudaSuccess) return error;
  const Kernel kernel = kernel_for<kModels>(p.half, is_transformed(p.heads[0]) || is_transformed(p.heads[1]));
  const void* const function = reinterpret_cast<const void*>(kernel);
  error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {hopper::kBlocks, 1, 1};
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(unsigned(multiprocessors / hopper::kBlocks * hopper::kBlocks));
  configuration.blockDim = dim3(hopper::kThreads);
  configuration.dynamicSmemBytes = size_t(Tile::kSharedBytes);
  configuration.stream = stream;
  configuration.attrs = &attribute;
  configuration.numAttrs = 1;
  return cudaLaunchKernelEx(&configuration, kernel, p);
}

}  // namespace

cudaError_t launch_linear_forward(const LinearForwardArguments& arguments, cudaStream_t stream) {
  KernelArguments p = {};
  static_cast<LinearForwardArguments&>(p) = arguments;
  return arguments.models == 1 ? launch<1>(p, stream) : launch<2>(p, stream);
}

}  // namespace dlogp
