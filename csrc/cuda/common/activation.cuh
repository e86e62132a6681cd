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

// The branch is uniform.
__device__ __forceinline__ float activate(Activation activation, float z) {
  switch (activation) {
    case Activation::gelu:
      return activate<Activation::gelu>(z);
    case Activation::gelu_tanh:
      return activate<Activation::gelu_tanh>(z);
    case Activation::silu:
      return activate<Activation::silu>(z);
    case Activation::relu:
      return activate<Activation::relu>(z);
    case Activation::none:
      break;
  }
  return z;
}

}  // namespace llmkern
