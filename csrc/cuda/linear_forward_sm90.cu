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

bool is_transformed(const HeadMatrices& head) { return head.bias != nullptr || head.tanh_scale != 0; }

template <typename Tile>
cudaError_t launch(KernelArguments& p, cudaStream_t stream) {
  EncodeTiled encode = nullptr;
  cudaError_t error = find_encoder(encode);
  for (int model = 0; model < Tile::kModels && error == cudaSuccess; ++model) {
    const HeadMatrices& head = p.heads[model];
    const Matrix hidden = {head.hidden, head.hidden_rows, head.hidden_size, head.stride_hidden};
    const Matrix weight = {head.weight, p.vocabulary, head.hidden_size, head.stride_weight};
    error = describe(encode, p.half, hidden, hopper::kTileRows, p.hidden[model]);
    if (error == cudaSuccess) error = describe(encode, p.half, weight, Tile::kColumns / Tile::kBlocks, p.weight[model]);
  }
  if (error != cudaSuccess) return error;
  const bool transformed = is_transformed(p.heads[0]) || is_transformed(p.heads[1]);
  const Kernel kernel =
      transformed ? hopper::linear_forward_kernel<Tile, true> : hopper::linear_forward_kernel<Tile, false>;
  const void* const function = reinterpret_cast<const void*>(kernel);
  error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {Tile::kBlocks, 1, 1};
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(unsigned(multiprocessors / Tile::kBlocks * Tile::kBlocks));
  configuration.blockDim = dim3(hopper::kThreads);
  configuration.dynamicSmemBytes = size_t(Tile::kSharedBytes);
  configuration.stream = stream;
  configuration.attrs = &attribute;
  configuration.numAttrs = 1;
  return cudaLaunchKernelEx(&configuration, kernel, p);
}

// The number of blocks of a cluster decides who multiplies what, and changes no bit.
template <typename Element>
cudaError_t launch_for(KernelArguments& p, cudaStream_t stream) {
  using hopper::Tile;
  const bool one_tile = p.total_rows <= hopper::kTileRows;
  if (p.models == 1) return one_tile ? launch<Tile<Element, 1, 1>>(p, stream) : launch<Tile<Element, 1, 2>>(p, stream);
  return one_tile ? launch<Tile<Element, 2, 1>>(p, stream) : launch<Tile<Element, 2, 2>>(p, stream);
}

}  // namespace

cudaError_t launch_linear_forward(const LinearForwardArguments& arguments, cudaStream_t stream) {
  KernelArguments p = {};
  static_cast<LinearForwardArguments&>(p) = arguments;
  return arguments.half ? launch_for<__half>(p, stream) : launch_for<__nv_bfloat16>(p, stream);
}

}  // namespace dlogp
