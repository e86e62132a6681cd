// activate_backward: the gradients of activations with or without a factor (llmkern/activate.h), of y = act(x) · up:
//   dx  = dy · up · act'(x)
//   dup = dy · act(x)
#pragma once

#include <cstdint>

#include "llmkern/activation.h"
#include "llmkern/dtype.h"
#include "llmkern/gpu.h"
#include "llmkern/rows.h"
#include "llmkern/threads.h"

namespace llmkern {

// Rows are contiguous; row r of an input is at <input>_rows.offset(r), and x_rows.count is the number of rows of all.
struct ActivateBackwardParams {
  const void* dy;  // [rows, hidden], dtype
  const void* x;   // [rows, hidden], dtype
  const void* up;  // [rows, hidden], dtype; null for 1
  void* dx;        // [rows, hidden], dtype, contiguous
  void* dup;       // [rows, hidden], dtype, contiguous; null where there is no up
  Rows dy_rows, x_rows, up_rows;
  int64_t hidden;
  DType dtype;
  Activation activation;  // gelu, gelu_tanh or silu; on the CPU relu too
};

void launch_activate_backward(const ActivateBackwardParams& p, const Threads& threads);
void launch_activate_backward(const ActivateBackwardParams& p, const Gpu& gpu);

}  // namespace llmkern
