// The kernels and their launchers on clusters that a test chooses, with a stand-in for the driver and the runtime.
#include "linear_sm90.cu"

namespace hopper_on_cpu {
namespace {

int multiprocessors = 0;
bool backwards = false, late_copies = false;
size_t allowed_bytes = 0;
std::string maps, launched, problem;  // of the last launch; the first two are lists in JSON

std::string list(std::initializer_list<uint64_t> numbers) {
  std::string text;
  for (const uint64_t number : numbers) text += (text.empty() ? "[" : ", ") + std::to_string(number);
  return text + "]";
}

// cuTensorMapEncodeTiled.
int encode(dlogp::TensorMap* map, int type, unsigned rank, void* data, const uint64_t* sizes, const uint64_t* strides,
           const unsigned* box, const unsigned* steps, int interleave, int swizzle, int promotion, int fill) {
  maps += (maps.empty() ? "" : ", ") +
          list({uint64_t(type), rank, reinterpret_cast<uint64_t>(data), sizes[0], sizes[1], strides[0], box[0], box[1],
                steps[0], steps[1], uint64_t(interleave), uint64_t(swizzle), uint64_t(promotion), uint64_t(fill)});
  const Matrix matrix = {static_cast<unsigned char*>(data), sizes[0], sizes[1], strides[0], box[1]};
  std::memcpy(map, &matrix, sizeof matrix);
  return 0;
}

}  // namespace
}  // namespace hopper_on_cpu

using namespace hopper_on_cpu;

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, int,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = symbol == std::string("cuTensorMapEncodeTiled");
  *function = known ? reinterpret_cast<void*>(encode) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  allowed_bytes = size_t(value);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) { return *device = 0; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = multiprocessors;
  return cudaSuccess;
}

// The clusters of a grid, one after another.
cudaError_t launch_on_cpu(const cudaLaunchConfig_t& configuration, const std::function<void()>& kernel) {
  const unsigned grid = configuration.gridDim.x, blocks = configuration.attrs->val.clusterDim.x;
  const size_t bytes = configuration.dynamicSmemBytes;
  launched = list({grid, configuration.blockDim.x, blocks, bytes, allowed_bytes});
  for (unsigned index = 0; index < grid / blocks && problem.empty(); ++index) {
    Cluster cluster(int(blocks), int(index), int(grid / blocks), bytes, backwards, late_copies);
    try {
      cluster.run(kernel);
      problem = cluster.problem;
    } catch (const std::exception& error) {
      problem = error.what();
    }
  }
  return cudaSuccess;
}

namespace dlogp::hopper {

unsigned char shared[1];  // which the kernel declares

// Units of the blocks of three clusters for each of `count` shapes, (rows, vocabulary, splits, panel), with room for
// `most`.
template <int kModels>
void list_units(int blocks, const int64_t (*shapes)[4], int count, Unit* units, int most) {
  const auto of_block = [&] {
    for (int i = 0; threadIdx.x == 0 && i < count; ++i) {
      LinearArguments p;
      p.rows = p.total_rows = shapes[i][0];
      p.vocabulary = shapes[i][1];
      p.splits = shapes[i][2];
      const Schedule<Tile<__half, kModels>> schedule(p, blocks, int(shapes[i][3]));
      for (int at = schedule.first(); at < schedule.end(); at += schedule.step())
        units[(int64_t(i) * most + at) * blocks + cluster_rank()] = schedule.unit(at);
    }
  };
  for (int index = 0; index < 3; ++index) Cluster(blocks, index, 3, 0, false, false).run(of_block);
}

}  // namespace dlogp::hopper

extern "C" {

void set_launch(int number, bool reversed, bool late) {
  multiprocessors = number, backwards = reversed, late_copies = late;
  maps = launched = problem = "";
}

// What was launched since, and what went wrong, in JSON.
const char* report() {
  static std::string text;
  text = R"({"launched": )" + launched + R"(, "maps": [)" + maps + R"(], "problem": ")" + problem + R"("})";
  return text.c_str();
}

void list_units(int models, int blocks, const int64_t (*shapes)[4], int count, dlogp::hopper::Unit* units, int most) {
  const auto list_them = models == 1 ? dlogp::hopper::list_units<1> : dlogp::hopper::list_units<2>;
  list_them(blocks, shapes, count, units, most);
}

int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}
