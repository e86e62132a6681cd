// norm: rms_norm and layer_norm, with or without a residual sum before them and int8 quantization after them.
//   v   = x, or x + residual rounded to dtype, which is also written to total
//   y   = v · rstd · (weight + weight_offset) + bias            rms:   rstd = 1/sqrt(mean(v²) + eps)
//   y   = (v − mean(v)) · rstd · (weight + weight_offset) + bias  layer: rstd = 1/sqrt(var(v) + eps)
//   out = y in dtype, or codes and scale = quantize_int8(y) from y in fp32
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/gpu.h"
#include "llmkern/rows.h"
#include "llmkern/threads.h"

namespace llmkern {

enum class Norm : int8_t { rms, layer };

// Rows are contiguous; row r of a tensor is at <tensor>_rows.offset(r), and x_rows.count is the number of rows of all.
// total and out may be x or residual themselves.
struct NormParams {
  const void* x;         // [rows, hidden], dtype
  const void* residual;  // [rows, hidden], dtype; null for none
  const void* weight;    // [hidden], weight_dtype; null for 1 (weight_offset is then ignored)
  const void* bias;      // [hidden], bias_dtype; null for 0
  void* total;           // [rows, hidden], dtype; written with a residual only, and then not null
  void* out;             // [rows, hidden], dtype; not used where there is a scale
  int8_t* codes;         // [rows, hidden], contiguous
  float* scale;          // [rows]; null where out is wanted
  Rows x_rows, residual_rows, total_rows, out_rows;
  int64_t hidden;
  DType dtype, weight_dtype, bias_dtype;
  Norm norm;
  float eps;
  float weight_offset;
};

void launch_norm(const NormParams& p, const Threads& threads);
void launch_norm(const NormParams& p, const Gpu& gpu);

}  // namespace llmkern
