// One row of logits: read from memory in groups of four, and kept in shared memory as it was.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "logits.h"

namespace dlogp {

constexpr int kGroupTokens = 4;

struct Group {
  float z[kGroupTokens];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename Stored>
struct alignas(kGroupTokens * sizeof(Stored)) StoredGroup {
  Stored z[kGroupTokens];

  __device__ Group widened() const { return {{to_float(z[0]), to_float(z[1]), to_float(z[2]), to_float(z[3])}}; }
};

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

  // A whole group that can be read as it is; `token` is a multiple of 4.
  template <typename Stored>
  __device__ bool has_group(int token) const {
    return aligned_ && type_ == kTypeOf<Stored> && token + kGroupTokens <= vocabulary_;
  }
  template <typename Stored>
  __device__ StoredGroup<Stored> group(int token) const {
    return reinterpret_cast<const StoredGroup<Stored>*>(data_)[token / kGroupTokens];
  }
  // Narrowing is exact: Stored is the type of the row, or float.
  template <typename Stored>
  __device__ StoredGroup<Stored> gathered(int token) const {
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

template <typename Stored>
__device__ inline StoredGroup<Stored> group_of(const RowInMemory& row, int token) {
  return row.has_group<Stored>(token) ? row.group<Stored>(token) : row.gathered<Stored>(token);
}

// A block's part of a row, tokens from `first` on, kept in shared memory.
template <typename Stored>
class KeptPart {
 public:
  __device__ KeptPart(const RowInMemory&, int, StoredGroup<Stored>* kept) : kept_(kept) {}

  __device__ void keep(int index, const StoredGroup<Stored>& group) { kept_[index] = group; }
  __device__ Group group(int index) const { return kept_[index].widened(); }
  // Of one token, by its place in the part.
  __device__ float at(int place) const { return to_float(kept_[place / kGroupTokens].z[place % kGroupTokens]); }

 private:
  StoredGroup<Stored>* kept_;
};

// One that is read from memory each time.
template <typename Stored>
class ReadPart {
 public:
  __device__ ReadPart(const RowInMemory& row, int first, StoredGroup<Stored>*) : row_(row), first_(first) {}

  __device__ void keep(int, const StoredGroup<Stored>&) {}
  __device__ Group group(int index) const { return group_of<Stored>(row_, first_ + index * kGroupTokens).widened(); }
  __device__ float at(int place) const { return row_.at(first_ + place); }

 private:
  const RowInMemory row_;
  const int first_;
};

}  // namespace dlogp
