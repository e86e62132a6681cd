// Rows: a tensor [..., hidden] whose last dimension is contiguous, as a list of rows.
#pragma once

#include <cstdint>

#include "llmkern/host_device.h"

namespace llmkern {

// The longest row that threads of a GPU share: they count its elements, and a step beyond them, in 32 bits.
constexpr int64_t kGpuMaxRow = 1 << 30;

// The leading dimensions, merged where the strides allow it, are at most three: row r is at index
// (r / (size1 * size2), r / size2 % size1, r % size2).  Strides in elements.
struct Rows {
  int64_t count = 0;
  int64_t size1 = 1, size2 = 1;
  int64_t stride0 = 0, stride1 = 0, stride2 = 0;

  // Elements from the tensor's first element to row r's.
  LLMKERN_HOST_DEVICE int64_t offset(int64_t r) const {
    if (size1 == 1 && size2 == 1) return r * stride0;
    return r / size2 / size1 * stride0 + r / size2 % size1 * stride1 + r % size2 * stride2;
  }
};

// `count` rows of `hidden` elements without gaps.
constexpr Rows dense_rows(int64_t count, int64_t hidden) {
  return {.count = count, .stride0 = hidden};
}

}  // namespace llmkern
