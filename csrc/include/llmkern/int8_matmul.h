// int8_matmul: out[m, n] = act(Σ_k a[m, k] · w[n, k] · a_scale[m] · w_scale[n] + bias[n]) + residual[m, n], the sum of
// integer products exact.
#pragma once

#include <cstdint>

#include "llmkern/activation.h"
#include "llmkern/dtype.h"
#include "llmkern/gpu.h"
#include "llmkern/rows.h"

namespace llmkern {

struct Int8MatmulParams {
  const int8_t* a;       // [a_rows.count, k]; rows at a_rows.offset(m), each contiguous
  const int8_t* w;       // [n, k]; row j at j * w_stride, contiguous
  const float* a_scale;  // [m]; null for 1
  const float* w_scale;  // [n]; null for 1
  const void* bias;      // [n], bias_dtype; null for 0
  const void* residual;  // [m, n], residual_dtype; rows at residual_rows.offset(m), each contiguous; null for 0
  void* out;             // [m, n], contiguous: out_dtype, or int32 where `sums`
  Rows a_rows, residual_rows;
  int64_t n, k;      // k at most 131071, so that s32 cannot overflow
  int64_t w_stride;  // elements
  DType out_dtype, bias_dtype, residual_dtype;
  Activation activation;
  bool sums;  // out is the sums of products themselves, and nothing else is applied
};

void launch_int8_matmul(const Int8MatmulParams& p, const Gpu& gpu);

}  // namespace llmkern
