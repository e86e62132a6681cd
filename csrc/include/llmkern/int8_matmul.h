// int8_matmul: out[m, n] = act(Σ_k a[m, k] · w[n, k] · a_scale[m] · w_scale[n] + bias[n]) + residual[m, n], the sum of
// integer products exact.  Weight-only, a is floating and is not rounded; the sum is made in fp32.
#pragma once

#include <cstdint>

#include "llmkern/activation.h"
#include "llmkern/dtype.h"
#include "llmkern/gpu.h"
#include "llmkern/plan.h"
#include "llmkern/rows.h"

namespace llmkern {

struct Int8MatmulParams {
  const int8_t* a;       // [a_rows.count, k]; rows at a_rows.offset(m), each contiguous
  const void* x;         // null, or instead of a, x_dtype; rows like a's
  const int8_t* w;       // [n, k]; row j at j * w_stride, contiguous
  const float* a_scale;  // [m]; null for 1
  const float* w_scale;  // [n]; null for 1
  const void* bias;      // [n], bias_dtype; null for 0
  const void* residual;  // [m, n], residual_dtype; rows at residual_rows.offset(m), each contiguous; null for 0
  void* out;             // [m, n], contiguous: out_dtype, or int32 where `sums`
  void* workspace;       // int8_matmul_workspace_bytes(m, n, k, x != null, gpu), 16-byte aligned
  Rows a_rows, residual_rows;
  int64_t n, k;                                          // k at most 131071, so that s32 cannot overflow
  int64_t w_stride;                                      // elements
  DType x_dtype, out_dtype, bias_dtype, residual_dtype;  // x: bf16 or f16
  Activation activation;
  bool sums;  // out is the sums of products themselves, and nothing else is applied
};

// The sums of each part of K, where it is shared out.
constexpr int64_t int8_matmul_workspace_bytes(int64_t m, int64_t n, int64_t k, bool halves, const Gpu& gpu) {
  const Int8MatmulPlan plan = plan_int8_matmul(m, n, k, halves, gpu);
  return plan.parts > 1 ? 4 * plan.parts * m * n : 0;
}

void launch_int8_matmul(const Int8MatmulParams& p, const Gpu& gpu);

}  // namespace llmkern
