// norm_backward: the gradients of rms_norm and layer_norm (llmkern/norm.h).  With n = (x − mean) · rstd (mean 0 for
// rms) and g = dy · (weight + weight_offset):
//   dx      = rstd · (g − n · mean(g · n))              rms
//   dx      = rstd · (g − mean(g) − n · mean(g · n))    layer
//   dweight = Σ_rows dy · n,  dbias = Σ_rows dy
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/gpu.h"
#include "llmkern/norm.h"
#include "llmkern/plan.h"
#include "llmkern/rows.h"
#include "llmkern/threads.h"

namespace llmkern {

struct NormBackwardParams {
  const void* dy;      // [rows, hidden], dtype; rows at dy_rows.offset(r), each contiguous
  const void* x;       // [rows, hidden], dtype; rows at x_rows.offset(r), each contiguous
  const void* weight;  // [hidden], weight_dtype; null for 1 (weight_offset is then ignored)
  void* dx;            // [rows, hidden], dtype, contiguous
  void* dweight;       // [hidden], weight_dtype; null where it is not wanted
  void* dbias;         // [hidden], bias_dtype; null where it is not wanted
  float* workspace;    // norm_backward_workspace_floats(rows, hidden, where it runs); any, for no parameters
  Rows dy_rows, x_rows;
  int64_t hidden;
  DType dtype, weight_dtype, bias_dtype;
  Norm norm;
  float eps;
  float weight_offset;
};

// One row of sums for dweight and one for dbias of each block.
inline int64_t norm_backward_workspace_floats(int64_t rows, int64_t hidden, const Gpu& gpu) {
  return 2 * plan_norm_backward_blocks(rows, kNormBackward, gpu) * hidden;
}

// On the CPU the same for each part of the rows: 16 rows and more, so that its sums cost little beside them, and at
// most 64 parts, whatever the number of threads.
constexpr int64_t norm_backward_parts(int64_t rows) {
  return rows < 16 ? rows > 0 : rows < 64 * 16 ? rows / 16 : 64;
}

inline int64_t norm_backward_workspace_floats(int64_t rows, int64_t hidden, const Threads&) {
  return 2 * norm_backward_parts(rows) * hidden;
}

void launch_norm_backward(const NormBackwardParams& p, const Threads& threads);
void launch_norm_backward(const NormBackwardParams& p, const Gpu& gpu);

}  // namespace llmkern
