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
  return z;
}

// f.template operator()<kActivation>() with `activation` as a constant.
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
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
