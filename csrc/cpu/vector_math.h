// Branch-free elementary functions that a compiler vectorises, and the attribute that compiles a loop once for each
// instruction set and picks one at load time. Levels of x86-64, not single features: v3 is AVX2 with FMA, and a list of
// features within one string would be as many versions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DLOGP_HAS_CLONES
#define DLOGP_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define DLOGP_CLONES
#endif
#define DLOGP_INLINE inline __attribute__((always_inline))

namespace dlogp {

// e^x for x ≤ 80 with a relative error below 2e-7; 0 below −87. NaN stays NaN.
DLOGP_INLINE float exp_of(float x) {
  const float magic = 12582912.0f;  // 1.5·2²³: adding it rounds to an integer
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  float r = x - n * 0.693359375f;  // ln 2 in two parts, the first of few bits
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const float result = p * scale;
  return x < -87.0f ? 0.0f : result;
}

DLOGP_INLINE double exp_of(double x) { return std::exp(x); }

// tanh with a relative error below 3e-7: an odd polynomial near 0, (1 − e^{−2|x|}) / (1 + e^{−2|x|}) elsewhere.
DLOGP_INLINE float tanh_of(float x) {
  const float magnitude = std::fabs(x);
  const float e = exp_of(-2.0f * magnitude);
  const float far = std::copysign((1.0f - e) / (1.0f + e), x);
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x;
  return magnitude < 0.625f ? near : far;
}

DLOGP_INLINE double tanh_of(double x) { return std::tanh(x); }

}  // namespace dlogp
