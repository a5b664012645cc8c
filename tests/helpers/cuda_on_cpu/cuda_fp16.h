#pragma once

#include "cuda_on_cpu.h"

using __half = _Float16;

inline float __half2float(__half x) { return float(x); }
