// transpose.cpp with vectors of every width: prints how many elements are not where they belong, for each.
// A width that this processor does not have is taken apart by the compiler, so all of them can run.
#include "../../../csrc/cpu/transpose.cpp"

#include <cstdio>
#include <vector>

namespace {

struct Shape {
  int64_t rows, columns, from_stride, to_stride;
};
const Shape kShapes[] = {{1, 1, 1, 1},     {16, 16, 16, 16}, {15, 17, 20, 16}, {32, 896, 896, 32},
                         {64, 48, 50, 70}, {33, 31, 31, 40}, {100, 5, 8, 100}, {5, 100, 100, 8}};

// Elements that are wrong, and places beside the result that were written.
template <typename T, typename Transpose>
int64_t wrong(const Shape& s, Transpose transpose) {
  const T untouched = 1;
  std::vector<T> from(s.rows * s.from_stride), to(s.columns * s.to_stride, untouched);
  for (size_t i = 0; i < from.size(); ++i) from[i] = T(2 + i);
  transpose(s.rows, s.columns, from.data(), s.from_stride, to.data(), s.to_stride);
  int64_t count = 0;
  for (int64_t c = 0; c < s.columns; ++c)
    for (int64_t r = 0; r < s.to_stride; ++r)
      count += to[c * s.to_stride + r] != (r < s.rows ? from[r * s.from_stride + c] : untouched);
  return count;
}

template <int Bytes>
void print() {
  int64_t words = 0, halves = 0;
  for (const Shape& shape : kShapes) {
    words += wrong<uint32_t>(shape, dlogp::words_of<Bytes>);
    halves += wrong<uint16_t>(shape, dlogp::halves_of<Bytes>);
  }
  std::printf("words %d %lld\nhalves %d %lld\n", Bytes, (long long)words, Bytes, (long long)halves);
}

}  // namespace

int main() {
  print<16>();
  print<32>();
  print<64>();
}
