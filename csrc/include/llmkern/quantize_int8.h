// quantize_int8: per row, scale = max|x| / 127 and codes = x · (127 / max|x|), to nearest even; the op's definition
// (llmkern/ops/quantize_int8.py) to the bit.
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/gpu.h"
#include "llmkern/rows.h"
#include "llmkern/threads.h"

namespace llmkern {

struct QuantizeInt8Params {
  const void* x;  // [rows.count, hidden], dtype; rows at rows.offset(r), each contiguous
  int8_t* codes;  // [rows.count, hidden], contiguous
  float* scale;   // [rows.count]
  Rows rows;
  int64_t hidden;
  DType dtype;
};

void launch_quantize_int8(const QuantizeInt8Params& p, const Threads& threads);
void launch_quantize_int8(const QuantizeInt8Params& p, const Gpu& gpu);

}  // namespace llmkern
