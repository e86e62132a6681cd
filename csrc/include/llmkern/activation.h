// Activations of a feed-forward layer.
#pragma once

#include <cstdint>

namespace llmkern {

enum class Activation : int8_t { none, gelu, gelu_tanh, silu, relu, quick_gelu, relu2 };

// Return true if a product's epilogue, and a gradient, has the activation; the CPU's launch_activate has all.
constexpr bool is_in_epilogues(Activation activation) {
  return activation <= Activation::relu;
}

}  // namespace llmkern
