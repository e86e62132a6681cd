// add: out[i] = a[i] · multiplier + constant + b[i], kept between low and high: sums of residual streams, and factors.
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/threads.h"

namespace llmkern {

struct AddParams {
  const void* a;  // [count], dtype
  const void* b;  // [count], dtype; null for 0
  void* out;      // [count], dtype; may be a or b
  int64_t count;
  DType dtype;
  float multiplier = 1.0f, constant = 0.0f;
  float low = -__builtin_inff(), high = __builtin_inff();  // NaN stays NaN
};

void launch_add(const AddParams& p, const Threads& threads);

}  // namespace llmkern
