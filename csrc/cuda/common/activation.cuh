// Activations on one fp32 value, as the reference defines them (llmkern/activation.h).
#pragma once

#include "launch.cuh"
#include "llmkern/activation.h"

namespace llmkern {

template <Activation kActivation>
__device__ __forceinline__ float activate(float z) {
  if constexpr (kActivation == Activation::gelu) {  // through erfc: 1 + erf cancels where z is negative
    return 0.5f * z * erfcf(z * -0.70710678f);
  } else if constexpr (kActivation ==
                       Activation::gelu_tanh) {  // ½ (1 + tanh u) = 1 / (1 + exp(-2u)), which cancels not
    return z / (1.0f + expf(-1.5957691f * (z + 0.044715f * z * z * z)));
  } else if constexpr (kActivation == Activation::silu) {
    return z / (1.0f + expf(-z));
  } else if constexpr (kActivation == Activation::relu) {
    return z < 0.0f ? 0.0f : z;  // NaN stays
  } else {
    return z;
  }
}

// All of z, with one branch, which is uniform.
template <int kN>
__device__ __forceinline__ void activate(Activation activation, float (&z)[kN]) {
  auto each = [&]<Activation kActivation>() {
#pragma unroll
    for (int i = 0; i < kN; ++i) z[i] = activate<kActivation>(z[i]);
  };
  switch (activation) {
    case Activation::gelu:
      return each.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return each.template operator()<Activation::gelu_tanh>();
    case Activation::silu:
      return each.template operator()<Activation::silu>();
    case Activation::relu:
      return each.template operator()<Activation::relu>();
    case Activation::none:
      break;
  }
}

__device__ __forceinline__ float activate(Activation activation, float z) {
  float one[1] = {z};
  activate(activation, one);
  return one[0];
}

}  // namespace llmkern
