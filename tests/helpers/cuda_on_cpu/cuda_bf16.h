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
