#pragma once

#include "cuda_on_cpu.h"

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  // Of numbers that bfloat16 has; kernels widen, and narrow what was widened.
  explicit __nv_bfloat16(float x) : bits(uint16_t(__float_as_uint(x) >> 16)) {}
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  const auto rounded = [](float number) {  // to even
    const uint32_t bits = __float_as_uint(number);
    return __nv_bfloat16(__uint_as_float(bits + 0x7FFF + (bits >> 16 & 1)));
  };
  return {rounded(x), rounded(y)};
}
