// Activations of a feed-forward layer.
#pragma once

#include <cstdint>

namespace llmkern {

enum class Activation : int8_t { none, gelu, gelu_tanh, silu, relu, quick_gelu, relu2 };

// Whether a product's epilogue, and a gradient, has it; the CPU's launch_activate has them all.
constexpr bool is_in_epilogues(Activation activation) {
  return activation <= Activation::relu;
}

}  // namespace llmkern
