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

struct Activated {
  float value, slope;
};

// The activation and its derivative.
template <Activation kActivation>
__device__ __forceinline__ Activated activate_with_slope(float z) {
  static_assert(kActivation == Activation::gelu || kActivation == Activation::gelu_tanh ||
                kActivation == Activation::silu);
  if constexpr (kActivation == Activation::silu) {
    const float s = 1.0f / (1.0f + expf(-z));
    return {z * s, s * (1.0f + z * (1.0f - s))};
  } else if constexpr (kActivation == Activation::gelu) {
    const float phi = 0.5f * erfcf(z * -0.70710678f), density = 0.39894228f * expf(-0.5f * z * z);
    return {z * phi, phi + z * density};
  } else {  // with 1 - Φ made directly: by subtraction it would lose its digits for large z
    const float twice_u = 1.5957691f * (z + 0.044715f * z * z * z);
    const float phi = 1.0f / (1.0f + expf(-twice_u)), rest = 1.0f / (1.0f + expf(twice_u));
    return {z * phi, phi + z * phi * rest * 1.5957691f * (1.0f + 0.134145f * z * z)};
  }
}

// f.template operator()<activation>(), by a branch that is uniform; not called for none, nor for what is not in
// epilogues.
template <class F>
__device__ __forceinline__ void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return f.template operator()<Activation::gelu_tanh>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::none:
    case Activation::quick_gelu:
    case Activation::relu2:
      return;
  }
}

__device__ __forceinline__ float activate(Activation activation, float z) {
  with_activation(activation, [&]<Activation kActivation>() { z = activate<kActivation>(z); });
  return z;
}

// All of z after one branch: less code than a branch for each.
template <int kN>
__device__ __forceinline__ void activate(Activation activation, float (&z)[kN]) {
  with_activation(activation, [&]<Activation kActivation>() {
#pragma unroll
    for (int i = 0; i < kN; ++i) z[i] = activate<kActivation>(z[i]);
  });
}

}  // namespace llmkern
