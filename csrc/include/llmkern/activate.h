// activate: gated and plain activations of a feed-forward layer, with or without int8 quantization after them.
//   y   = activation(x) · up            swiglu: silu and the gate as x; gelu: no up
//   out = y in dtype, or codes and scale = quantize_int8(y) from y in fp32
#pragma once

#include <cstdint>

#include "llmkern/activation.h"
#include "llmkern/dtype.h"
#include "llmkern/gpu.h"
#include "llmkern/rows.h"
#include "llmkern/threads.h"

namespace llmkern {

// Rows are contiguous; row r of a tensor is at <tensor>_rows.offset(r), and x_rows.count is the number of rows of all.
// out may be x or up itself.
struct ActivateParams {
  const void* x;   // [rows, hidden], dtype
  const void* up;  // [rows, hidden], dtype; null for 1
  void* out;       // [rows, hidden], dtype; not used where there is a scale
  int8_t* codes;   // [rows, hidden], contiguous
  float* scale;    // [rows]; null where out is wanted
  Rows x_rows, up_rows, out_rows;
  int64_t hidden;
  DType dtype;
  Activation activation;
};

void launch_activate(const ActivateParams& p, const Threads& threads);
void launch_activate(const ActivateParams& p, const Gpu& gpu);

}  // namespace llmkern
