// int8_linear: out[m, n] = act(Σ_k x[m, k] · w_q[n, k] · w_scale[n] + bias[n]), the weight int8 and x floating point;
// or, under W8A8, with each row of x rounded to int8 first and the sum of integer products exact.
#pragma once

#include <cstdint>

#include "llmkern/activation.h"
#include "llmkern/dtype.h"
#include "llmkern/rows.h"
#include "llmkern/threads.h"

namespace llmkern {

struct Int8LinearParams {
  const void* x;         // [rows.count, k], dtype; rows at rows.offset(r), each contiguous
  const int8_t* w_q;     // [n, k]; row j at j * w_stride, contiguous
  const float* w_scale;  // [n]
  const void* bias;      // [n], bias_dtype; null for 0
  void* out;             // [rows.count, n], dtype, contiguous
  char* workspace;       // rows.count * int8_linear_row_bytes(k, w8a8) bytes, 64-byte aligned
  Rows rows;
  int64_t n, k;
  int64_t w_stride;  // elements
  DType dtype, bias_dtype;
  Activation activation;
  bool w8a8;  // false: weight-only
};

// Bytes in the workspace per row of x: a header (scale and compensation), then the row in fp32, or its codes under
// W8A8, padded with zeros to whole vectors of any instruction set.
constexpr int64_t int8_linear_row_bytes(int64_t k, bool w8a8) {
  return 64 + (k + 63) / 64 * 64 * (w8a8 ? 1 : 4);
}

void launch_int8_linear(const Int8LinearParams& p, const Threads& threads);

}  // namespace llmkern
