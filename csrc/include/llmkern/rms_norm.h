// rms_norm: out[r, i] = x[r, i] / sqrt(mean_i(x[r, i]²) + eps) · (weight[i] + weight_offset) + bias[i]
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/rows.h"
#include "llmkern/threads.h"

namespace llmkern {

struct RmsNormParams {
  const void* x;       // [rows.count, hidden], dtype; rows at rows.offset(r), each contiguous
  const void* weight;  // [hidden], weight_dtype; null for 1 (weight_offset is then ignored)
  const void* bias;    // [hidden], bias_dtype; null for 0
  void* out;           // [rows.count, hidden], dtype, contiguous
  Rows rows;
  int64_t hidden;
  DType dtype, weight_dtype, bias_dtype;
  float eps;
  float weight_offset;
};

void launch_rms_norm(const RmsNormParams& p, const Threads& threads);

}  // namespace llmkern
