// What the bindings of linear layers share.
#pragma once

#include "llmkern/linear.h"

#include "../common.h"

namespace llmkern {

// nullopt for a name that the op's Python does not know either.
inline std::optional<Activation> activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"none", "gelu", "gelu_tanh", "silu", "relu"};
  for (int i = 0; i < 5; ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  return std::nullopt;
}

inline Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace llmkern
