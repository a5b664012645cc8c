// Vectors as wide as the processor's. One wider than the processor's would be taken apart, so a loop is compiled for
// each width, by DLOGP_FOR_EACH_WIDTH, and picked by `vector_bytes()`.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector_math.h"

namespace dlogp {

// A vector of so many bytes, of numbers.
template <typename T, int Bytes>
struct Lanes {
  using Vector __attribute__((vector_size(Bytes))) = T;
  static constexpr int64_t count = Bytes / int64_t(sizeof(T));

  // By reference: a vector as a result would be a matter of the instruction set.
  static DLOGP_INLINE void load(const T* from, Vector& lanes) { std::memcpy(&lanes, from, sizeof lanes); }
  static DLOGP_INLINE void store(const Vector& lanes, T* to) { std::memcpy(to, &lanes, sizeof lanes); }
  static DLOGP_INLINE T sum(const Vector& lanes) {
    T sums[count];
    std::memcpy(sums, &lanes, sizeof sums);
    for (int64_t half = count / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
  }
};

inline int vector_bytes() {
#ifdef DLOGP_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return 64;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 32;
#endif
  return 16;
}

}  // namespace dlogp

// Defines name_16, name_32 and name_64 out of `definition(attribute, name, bytes)`, as far as there are such vectors.
#ifdef DLOGP_HAS_CLONES
#define DLOGP_FOR_EACH_WIDTH(definition, name)                                               \
  definition(, name##_16, 16) definition(__attribute__((target("avx2,fma"))), name##_32, 32) \
      definition(__attribute__((target("arch=x86-64-v4"))), name##_64, 64)
#define DLOGP_WIDEST(name, T) (vector_bytes() == 64 ? name##_64<T> : vector_bytes() == 32 ? name##_32<T> : name##_16<T>)
#else
#define DLOGP_FOR_EACH_WIDTH(definition, name) definition(, name##_16, 16)
#define DLOGP_WIDEST(name, T) name##_16<T>
#endif
