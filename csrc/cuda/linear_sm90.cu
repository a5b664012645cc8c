#include <algorithm>
#include <bit>

#include "linear_forward.cuh"
#include "linear_gradient.cuh"

namespace dlogp {
namespace {

// Of a panel's hidden states, and groups of row tiles that it has at most: the L2 cache holds that much beside the
// weights that stream through it, and of a pair half, whose models take turns.
constexpr int64_t kPanelBytes = int64_t(32) << 20, kPanelGroups = 16;

// The enumerators of cuda.h that a matrix of 16-bit numbers needs, by the driver's binary interface.
constexpr int kFloat16 = 6, kBFloat16 = 9, kNoInterleave = 0, kSwizzle128 = 3, kPromote256 = 3, kZeros = 0;
using EncodeTiled = int (*)(TensorMap*, int type, unsigned rank, void* address, const uint64_t* sizes,
                            const uint64_t* strides, const unsigned* box, const unsigned* element_strides,
                            int interleave, int swizzle, int promotion, int fill);

// Of the driver, which is not linked.
cudaError_t find_encoder(EncodeTiled& encode) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const char* const name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
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

bool is_transformed(const LinearArguments& p) {
  const auto transformed = [](const HeadMatrices& head) { return head.bias != nullptr || head.tanh_scale != 0; };
  return transformed(p.heads[0]) || transformed(p.heads[1]);
}

int panel_groups(const LinearArguments& p, int blocks) {
  const int64_t group_bytes = 2 * blocks * hopper::kTileRows * (p.heads[0].hidden_size + p.heads[1].hidden_size);
  const int64_t fitting = std::clamp<int64_t>(kPanelBytes / p.models / group_bytes, 1, kPanelGroups);
  return int(std::bit_floor(uint64_t(fitting)));  // a pass is of whole panels (triton/hopper.py)
}

template <typename Tile, typename Epilogue, typename Arguments>
cudaError_t launch(hopper::KernelArguments<Arguments>& p, EncodeTiled encode, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (int model = 0; model < Tile::kModels && error == cudaSuccess; ++model) {
    const HeadMatrices& head = p.heads[model];
    const Matrix hidden = {head.hidden, head.hidden_rows, head.hidden_size, head.stride_hidden};
    const Matrix weight = {head.weight, p.vocabulary, head.hidden_size, head.stride_weight};
    error = describe(encode, p.half, hidden, hopper::kTileRows, p.hidden_map[model]);
    if (error == cudaSuccess) error = describe(encode, p.half, weight, Tile::kColumns / p.blocks, p.weight_map[model]);
  }
  if (error != cudaSuccess) return error;
  constexpr int kSharedBytes = Tile::kRingBytes + Epilogue::kOwnBytes + 2 * 1024;  // both begin at multiples of 1024
  const auto kernel = hopper::linear_kernel<Tile, Epilogue, Arguments>;
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kSharedBytes);
  if (error != cudaSuccess) return error;
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(p.blocks), 1, 1};
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(unsigned(multiprocessors / p.blocks * p.blocks));
  configuration.blockDim = dim3(hopper::kThreads);
  configuration.dynamicSmemBytes = size_t(kSharedBytes);
  configuration.stream = stream;
  configuration.attrs = &attribute;
  configuration.numAttrs = 1;
  return cudaLaunchKernelEx(&configuration, kernel, p);
}

template <typename Element, int kModels, template <typename, bool> typename Epilogue, typename Arguments>
cudaError_t launch_for(hopper::KernelArguments<Arguments>& p, EncodeTiled encode, cudaStream_t stream) {
  using Tile = hopper::Tile<Element, kModels>;
  // Both decide who multiplies what when, and change no bit.
  p.blocks = p.total_rows > hopper::kTileRows ? 2 : 1;
  p.panel = panel_groups(p, p.blocks);
  return is_transformed(p) ? launch<Tile, Epilogue<Tile, true>>(p, encode, stream)
                           : launch<Tile, Epilogue<Tile, false>>(p, encode, stream);
}

}  // namespace

cudaError_t launch_linear_forward(const LinearForwardArguments& arguments, cudaStream_t stream) {
  using hopper::Forward;
  hopper::KernelArguments<LinearForwardArguments> p = {arguments};
  EncodeTiled encode = nullptr;
  if (const cudaError_t error = find_encoder(encode); error != cudaSuccess) return error;
  if (p.models == 1)
    return p.half ? launch_for<__half, 1, Forward>(p, encode, stream)
                  : launch_for<__nv_bfloat16, 1, Forward>(p, encode, stream);
  return p.half ? launch_for<__half, 2, Forward>(p, encode, stream)
                : launch_for<__nv_bfloat16, 2, Forward>(p, encode, stream);
}

cudaError_t launch_linear_gradient(const LinearGradientArguments& arguments, cudaStream_t stream) {
  using hopper::Gradient;
  hopper::KernelArguments<LinearGradientArguments> p = {arguments};
  EncodeTiled encode = nullptr;
  if (const cudaError_t error = find_encoder(encode); error != cudaSuccess) return error;
  const Matrix gradient = {p.gradient, p.rows, p.vocabulary, p.stride_gradient};
  if (const cudaError_t error = describe(encode, p.half, gradient, 64, p.gradient_map); error != cudaSuccess)
    return error;
  return p.half ? launch_for<__half, 1, Gradient>(p, encode, stream)
                : launch_for<__nv_bfloat16, 1, Gradient>(p, encode, stream);
}

}  // namespace dlogp
