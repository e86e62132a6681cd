// Activations of fp32 values, as the reference defines them.
#pragma once

#include "llmkern/activation.h"
#include "math.h"

namespace llmkern::LLMKERN_ISA {
namespace {

template <Activation kActivation>
inline F32 activate(F32 z) {
  if constexpr (kActivation == Activation::gelu) return gelu(z);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh(z);
  if constexpr (kActivation == Activation::silu) return silu(z);
  if constexpr (kActivation == Activation::relu) return z < 0.0f ? F32{} : z;  // NaN stays
  if constexpr (kActivation == Activation::quick_gelu) return quick_gelu(z);
  if constexpr (kActivation == Activation::relu2) return z < 0.0f ? F32{} : z * z;
  return z;
}

struct Activated {
  F32 value, slope;
};

// share · (1 − share), of share = 1 / (1 + e): without cancellation where e is small, without 0 · ∞ where it is not.
inline F32 share_times_rest(F32 e, F32 share) {
  return share * (e > 1.0f ? 1.0f - share : e * share);
}

// The activation of z and its derivative, which like its definition is NaN at infinity.
template <Activation kActivation>
inline Activated activate_with_slope(F32 z) {
  if constexpr (kActivation == Activation::relu) {
    return {activate<kActivation>(z), z > 0.0f ? broadcast(1.0f) : z * 0.0f};
  } else if constexpr (kActivation == Activation::silu) {
    const F32 e = exp(-z), share = 1.0f / (1.0f + e);
    return {z * share, share + z * share_times_rest(e, share)};
  } else if constexpr (kActivation == Activation::gelu) {
    const F32 share = normal(z);
    return {z * share, share + z * (exp_or_0(z * z * -0.5f) * 0x1.988454p-2f)};
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    F32 near = z > 16.0f ? broadcast(16.0f) : z;  // beyond, the derivative is 0 or 1, and z³ may overflow; NaN stays
    near = near < -16.0f ? broadcast(-16.0f) : near;
    const F32 square = near * near;
    const F32 e = exp(near * (square * -0x1.2444f2p-4f - 0x1.988454p+0f)), share = 1.0f / (1.0f + e);
    const F32 slope = square * 0x1.b6676cp-3f + 0x1.988454p+0f;  // 2 √(2/π) (1 + 3 · 0.044715 x²)
    return {z * share, share + near * (share_times_rest(e, share) * slope)};
  }
  return {z, broadcast(1.0f)};
}

// f.template operator()<kActivation>() with `activation`, one of those in epilogues, as a constant.
template <class F>
inline auto with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none:
      return f.template operator()<Activation::none>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return f.template operator()<Activation::gelu_tanh>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::quick_gelu:
    case Activation::relu2:
      break;
  }
  __builtin_unreachable();
}

template <class F>
inline auto with_any_activation(Activation activation, const F& f) {
  if (activation == Activation::quick_gelu) return f.template operator()<Activation::quick_gelu>();
  if (activation == Activation::relu2) return f.template operator()<Activation::relu2>();
  return with_activation(activation, f);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
