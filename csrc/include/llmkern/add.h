// add: out[i] = a[i] + b[i], the sum of two residual streams.
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/threads.h"

namespace llmkern {

struct AddParams {
  const void* a;  // [count], dtype
  const void* b;  // [count], dtype
  void* out;      // [count], dtype; may be a or b
  int64_t count;
  DType dtype;
};

void launch_add(const AddParams& p, const Threads& threads);

}  // namespace llmkern
