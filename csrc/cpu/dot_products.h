// C (rows, tokens) = hidden · weightᵀ as dot products of rows that lie as they are, on one thread: nothing is packed,
// so that for a few rows of hidden states it takes the time of reading the weight.
//
// A product sums in as many lanes as the processor's vectors have, in one fixed order, so a row's result does not
// depend on the rows around it.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace dlogp {

// Tokens that are taken at once.
constexpr int64_t kDotTokens = 4;

// `weight` has kDotTokens rows, weight_stride apart, `hidden` any number; of both, `inner` elements are read. Writes
// c[row · c_stride + token] for token < tokens.
void dot_products(int64_t tokens, int64_t rows, int64_t inner, const float* weight, int64_t weight_stride,
                  const float* hidden, int64_t hidden_stride, float* c, int64_t c_stride);
void dot_products(int64_t tokens, int64_t rows, int64_t inner, const double* weight, int64_t weight_stride,
                  const double* hidden, int64_t hidden_stride, double* c, int64_t c_stride);
// Where the processor multiplies bfloat16 (multiply.h).
void dot_products(int64_t tokens, int64_t rows, int64_t inner, const c10::BFloat16* weight, int64_t weight_stride,
                  const c10::BFloat16* hidden, int64_t hidden_stride, float* c, int64_t c_stride);

}  // namespace dlogp
