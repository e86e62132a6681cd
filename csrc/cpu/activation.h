// Activations on one fp32 value, as the reference defines them.  A product has k multiplications for each of these,
// so libm's functions are fast enough.
#pragma once

#include "llmkern/activation.h"

namespace llmkern::LLMKERN_ISA {
namespace {

inline float activate(Activation activation, float z) {
  switch (activation) {
    case Activation::none:
      return z;
    case Activation::gelu:  // through erfc: 1 + erf cancels where z is negative
      return 0.5f * z * __builtin_erfcf(z * -0.70710678f);
    case Activation::gelu_tanh:
      return 0.5f * z * (1.0f + __builtin_tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
    case Activation::silu:
      return z / (1.0f + __builtin_expf(-z));
    case Activation::relu:
      return z < 0.0f ? 0.0f : z;  // NaN stays
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
