// Element types of kernels' operands, as torch-free code sees them.
#pragma once

#include <cstdint>

#include "llmkern/host_device.h"

namespace llmkern {

enum class DType : int8_t { f32, bf16, f16 };

// Storage only; csrc/cpu/vec.h and csrc/cuda/common convert.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LLMKERN_HOST_DEVICE constexpr int size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

// f.template operator()<T>() with the C++ type of `dtype`.
template <class F>
inline auto with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::bf16:
      return f.template operator()<BFloat16>();
    case DType::f16:
      return f.template operator()<Float16>();
  }
  __builtin_unreachable();
}

}  // namespace llmkern
