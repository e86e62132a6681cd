// The activations that a product's epilogue can apply.
#pragma once

#include <cstdint>

namespace llmkern {

enum class Activation : int8_t { none, gelu, gelu_tanh, silu, relu };

}  // namespace llmkern
