#pragma once

#include "cuda_on_cpu.h"

using __half = _Float16;

inline float __half2float(__half x) { return float(x); }

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
