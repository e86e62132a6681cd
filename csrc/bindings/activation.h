// Activations by the names that ops take.
#pragma once

#include "llmkern/activation.h"

#include <optional>
#include <string>

namespace llmkern {

// nullopt for a name that the op's Python does not know either.
inline std::optional<Activation> activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"none", "gelu", "gelu_tanh", "silu", "relu"};
  for (int i = 0; i < 5; ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  return std::nullopt;
}

}  // namespace llmkern
