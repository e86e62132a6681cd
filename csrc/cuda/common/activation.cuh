// Activations on one fp32 value, as the reference defines them (llmkern/activation.h).
#pragma once

#include "launch.cuh"
#include "llmkern/activation.h"
#include "ptx.cuh"

namespace llmkern {

// Precision of a result.  fp32: by division and the precise functions.  halves: for results that are rounded to
// 16 bits or to codes, by approximate instructions, whose errors of 2^-22 nothing is left of after that; a third of the
// instructions, and kernels that read two bytes an element are bound by these.
enum class Digits : int8_t { fp32, halves };

template <class T>
constexpr Digits kDigitsOf = sizeof(T) == 2 ? Digits::halves : Digits::fp32;

constexpr float kLog2e = 1.44269504f;

// z / (1 + exp(-w)).  With halves the quotient is taken of a quarter of both, since rcp has no results below 2^-126.
template <Digits kDigits>
__device__ __forceinline__ float times_sigmoid(float z, float w) {
  if constexpr (kDigits == Digits::fp32) return z / (1.0f + expf(-w));
  return 0.25f * z * ptx::rcp_approx_ftz(ptx::ex2_approx_ftz(-kLog2e * w - 2.0f) + 0.25f);
}

// 2^16 Φ(-|z|), scaled since ex2 has no results below 2^-126.  Φ(-|z|) = ½ erfc(|z| / √2), and erfc(x) = t exp(p(t) -
// x²) with t = 1 / (1 + x / 2), a Chebyshev fit whose relative error is 1.2e-7 for every x >= 0 (Press et al.,
// Numerical Recipes, 6.2.2).
__device__ __forceinline__ float scaled_tail(float z) {
  const float x = fabsf(z) * 0.70710678f, t = ptx::rcp_approx_ftz(1.0f + 0.5f * x);
  float p = 0.17087277f;
  p = p * t - 0.82215223f, p = p * t + 1.48851587f, p = p * t - 1.13520398f, p = p * t + 0.27886807f;
  p = p * t - 0.18628806f, p = p * t + 0.09678418f, p = p * t + 0.37409196f, p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  return 0.5f * t * ptx::ex2_approx_ftz((p - x * x) * kLog2e + 16.0f);
}

// z · Φ(z), where Φ(z) = ½ erfc(-z / √2): 1 + erf cancels where z is negative.
template <Digits kDigits>
__device__ __forceinline__ float times_normal(float z) {
  if constexpr (kDigits == Digits::fp32) return 0.5f * z * erfcf(z * -0.70710678f);
  const float beyond = fminf(z, 32.0f) * 0x1p-16f * scaled_tail(z);  // beyond 32 it is 0, of infinity too
  return z > 0.0f ? z - beyond : beyond;
}

template <Activation kActivation, Digits kDigits>
__device__ __forceinline__ float activate(float z) {
  if constexpr (kActivation == Activation::gelu) {
    return times_normal<kDigits>(z);
  } else if constexpr (kActivation == Activation::gelu_tanh) {  // ½ (1 + tanh u) = 1 / (1 + exp(-2u)): no cancellation
    return times_sigmoid<kDigits>(z, 1.5957691f * (z + 0.044715f * z * z * z));
  } else if constexpr (kActivation == Activation::silu) {
    return times_sigmoid<kDigits>(z, z);
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
template <Activation kActivation, Digits kDigits>
__device__ __forceinline__ Activated activate_with_slope(float z) {
  static_assert(kActivation == Activation::gelu || kActivation == Activation::gelu_tanh ||
                kActivation == Activation::silu);
  if constexpr (kActivation == Activation::silu) {
    const float s = times_sigmoid<kDigits>(1.0f, z);
    return {z * s, s * (1.0f + z * (1.0f - s))};
  } else if constexpr (kActivation == Activation::gelu && kDigits == Digits::halves) {
    const float tail = scaled_tail(z), slope = 0.39894228f * z * ptx::ex2_approx_ftz(-0.5f * kLog2e * z * z + 16.0f);
    const float phi = 0x1p-16f * tail;
    return z > 0.0f ? Activated{z * (1.0f - phi), 1.0f - 0x1p-16f * (tail - slope)}
                    : Activated{z * phi, 0x1p-16f * (tail + slope)};
  } else if constexpr (kActivation == Activation::gelu) {
    const float phi = 0.5f * erfcf(z * -0.70710678f), density = 0.39894228f * expf(-0.5f * z * z);
    return {z * phi, phi + z * density};
  } else {  // with 1 - Φ made directly: by subtraction it would lose its digits for large z
    const float twice_u = 1.5957691f * (z + 0.044715f * z * z * z);
    const float phi = times_sigmoid<kDigits>(1.0f, twice_u), rest = times_sigmoid<kDigits>(1.0f, -twice_u);
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

// All of z after one branch: less code than a branch for each.
template <Digits kDigits, int kN>
__device__ __forceinline__ void activate(Activation activation, float (&z)[kN]) {
  with_activation(activation, [&]<Activation kActivation>() {
#pragma unroll
    for (int i = 0; i < kN; ++i) z[i] = activate<kActivation, kDigits>(z[i]);
  });
}

}  // namespace llmkern
