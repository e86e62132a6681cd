// One row's int8 codes and scale, as the op quantize_int8 defines both to the bit (llmkern/ops/quantize_int8.py).
#pragma once

#include "reduce.cuh"

namespace llmkern {

struct RowCodes {
  float scale, inverse;
  bool usable;

  // Construct from the bits of the row's largest magnitude.
  __device__ explicit RowCodes(uint32_t most) {
    const float amax = __uint_as_float(most);
    scale = amax < 0x1p-118f ? 0.0f : amax / 127.0f;
    usable = scale > 0.0f && scale < __uint_as_float(0x7f800000);
    inverse = 127.0f / amax;
  }

  template <int kN>
  __device__ __forceinline__ void store(int8_t* codes, const float (&values)[kN]) const {
    struct Elements {
      int8_t element[kN];
    } elements;
#pragma unroll
    for (int i = 0; i < kN; ++i)
      elements.element[i] = usable ? static_cast<int8_t>(__float2int_rn(values[i] * inverse)) : int8_t{0};
    bits_as<Packed<int8_t, kN>>(elements).store(codes);
  }
};

// The larger of `most` and the values' magnitudes, as bits.
template <int kN>
__device__ __forceinline__ uint32_t largest(uint32_t most, const float (&values)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) most = MaxBits()(most, __float_as_uint(values[i]) & 0x7fffffff);
  return most;
}

}  // namespace llmkern
