// One row of logits: read from memory in groups of four, and kept in shared memory as it was.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "logits.h"

namespace dlogp {

constexpr int kGroupTokens = 4;

struct Group {
  float z[kGroupTokens];

  __device__ float largest() const { return fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])); }
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename Stored>
struct alignas(kGroupTokens * sizeof(Stored)) StoredGroup {
  Stored z[kGroupTokens];
};

// Read by one load.
template <typename Stored>
__device__ inline Group widened(const StoredGroup<Stored>& place) {
  struct alignas(sizeof(StoredGroup<Stored>)) Words {
    uint32_t word[sizeof(StoredGroup<Stored>) / 4];
  };
  const Words words = reinterpret_cast<const Words&>(place);
  if constexpr (std::is_same_v<Stored, __nv_bfloat16>) {
    // The upper half of a float.
    return {{__uint_as_float(words.word[0] << 16), __uint_as_float(words.word[0] & 0xFFFF0000u),
             __uint_as_float(words.word[1] << 16), __uint_as_float(words.word[1] & 0xFFFF0000u)}};
  } else {
    Stored z[kGroupTokens];
    memcpy(z, &words, sizeof(z));
    return {{to_float(z[0]), to_float(z[1]), to_float(z[2]), to_float(z[3])}};
  }
}

template <typename Stored>
constexpr LogitType kTypeOf = LogitType::kFloat;
template <>
constexpr LogitType kTypeOf<__half> = LogitType::kHalf;
template <>
constexpr LogitType kTypeOf<__nv_bfloat16> = LogitType::kBFloat16;

// Logits of one row where they lie in memory. Beyond the vocabulary they are −inf.
class RowInMemory {
 public:
  __device__ RowInMemory(const LogitRows& rows, bool aligned, int64_t row, int vocabulary)
      : stride_(rows.stride_column), vocabulary_(vocabulary), type_(rows.type), aligned_(aligned) {
    const int64_t begin = row / rows.inner * rows.stride_outer + row % rows.inner * rows.stride_row;
    data_ = static_cast<const char*>(rows.data) + begin * size_of(rows.type);
  }

  __device__ float at(int token) const {
    if (token >= vocabulary_) return -INFINITY;
    const int64_t place = token * stride_;
    switch (type_) {
      case LogitType::kBFloat16:
        return to_float(typed<__nv_bfloat16>()[place]);
      case LogitType::kHalf:
        return to_float(typed<__half>()[place]);
      case LogitType::kFloat:
        break;
    }
    return typed<float>()[place];
  }

  // How many groups from the row's first on can be read as they are.
  template <typename Stored>
  __device__ int whole_groups() const {
    return aligned_ && type_ == kTypeOf<Stored> ? vocabulary_ / kGroupTokens : 0;
  }
  template <typename Stored>
  __device__ const StoredGroup<Stored>* group(int number) const {
    return reinterpret_cast<const StoredGroup<Stored>*>(data_) + number;
  }
  // Narrowing is exact: Stored is the type of the row, or float.
  template <typename Stored>
  __device__ StoredGroup<Stored> gathered(int number) const {
    const int token = number * kGroupTokens;
    return {{Stored(at(token)), Stored(at(token + 1)), Stored(at(token + 2)), Stored(at(token + 3))}};
  }

 private:
  template <typename T>
  __device__ const T* typed() const {
    return reinterpret_cast<const T*>(data_);
  }

  const char* data_;
  int64_t stride_;
  int vocabulary_;
  LogitType type_;
  bool aligned_;
};

// A block's part of a row, from a group of it on, kept in shared memory. What a thread fetches it sees itself when the
// copies that it committed are done, other threads after a barrier behind that.
template <typename Stored>
class KeptPart {
 public:
  __device__ KeptPart(const RowInMemory&, int, StoredGroup<Stored>* kept) : kept_(kept) {}

  // A group is copied as it is, while the thread goes on, or gathered token by token.
  __device__ void fetch(const RowInMemory& row, int number, int index) {
    __pipeline_memcpy_async(&kept_[index], row.group<Stored>(number), sizeof(StoredGroup<Stored>));
  }
  __device__ void gather(const RowInMemory& row, int number, int index) { kept_[index] = row.gathered<Stored>(number); }
  __device__ Group group(int index) const { return widened(kept_[index]); }
  // Of one token, by its place in the part.
  __device__ float at(int place) const { return to_float(kept_[place / kGroupTokens].z[place % kGroupTokens]); }

 private:
  StoredGroup<Stored>* const kept_;
};

// One that is read from memory each time.
template <typename Stored>
class ReadPart {
 public:
  __device__ ReadPart(const RowInMemory& row, int first, StoredGroup<Stored>*)
      : row_(row), first_(first), whole_(row.whole_groups<Stored>()) {}

  __device__ void fetch(const RowInMemory&, int, int) {}
  __device__ void gather(const RowInMemory&, int, int) {}
  __device__ Group group(int index) const {
    const int number = first_ + index;
    return number < whole_ ? widened(*row_.group<Stored>(number)) : widened(row_.gathered<Stored>(number));
  }
  __device__ float at(int place) const { return row_.at(first_ * kGroupTokens + place); }

 private:
  const RowInMemory row_;
  const int first_, whole_;
};

}  // namespace dlogp
