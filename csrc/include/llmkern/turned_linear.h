// turned_linear: out[r, j] = Σ_i x[r, i] · w[i, j] + bias[j], of a weight that lies as [in, out] (transformers'
// Conv1D). For few rows, where reading the weight sets the pace.
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/threads.h"

namespace llmkern {

struct TurnedLinearParams {
  const void* x;     // [rows, k], dtype as all; row r at r * x_stride, contiguous; apart from out
  const void* w;     // [k, n]; row i at i * w_stride, contiguous
  const void* bias;  // [n]; null for 0
  void* out;         // [rows, n]; row r at r * out_stride
  int64_t rows, n, k;
  int64_t x_stride, w_stride, out_stride;  // elements
  DType dtype;
};

void launch_turned_linear(const TurnedLinearParams& p, const Threads& threads);

}  // namespace llmkern
