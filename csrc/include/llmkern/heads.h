// Pointer and strides of a tensor [batch, heads, length, dim] of contiguous vectors.
#pragma once

#include <cstdint>

#include "llmkern/host_device.h"

namespace llmkern {

struct HeadStrides {
  int64_t batch, head, position;  // elements

  LLMKERN_HOST_DEVICE int64_t offset(int64_t b, int64_t h, int64_t t) const {
    return b * batch + h * head + t * position;
  }
};

}  // namespace llmkern
