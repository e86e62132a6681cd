// What every binding needs: torch's tensors as params structs see them, and the reference for calls no kernel serves.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <string>

#include "llmkern/dtype.h"
#include "llmkern/rows.h"

namespace llmkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels' name of an element type; nullopt for types they do not have.
inline std::optional<DType> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      return std::nullopt;
  }
}

// True where every given tensor has a type that the kernels have.
template <class... Optional>
inline bool kernel_types(const Tensor& t, const Optional&... more) {
  return dtype_of(t).has_value() && (... && (!more.has_value() || dtype_of(*more).has_value()));
}

// The rows of t [..., hidden], or nullopt where it must be copied first: hidden not contiguous, or more than three
// leading dimensions that do not merge.
inline std::optional<Rows> rows_of(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t last = t.dim() - 1;
  if (last < 0 || (strides[last] != 1 && sizes[last] > 1)) return std::nullopt;
  Rows rows{.count = 1};
  int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};  // innermost first
  int used = 0;
  for (int64_t d = last - 1; d >= 0; --d) {
    rows.count *= sizes[d];
    if (sizes[d] == 1) continue;
    if (used > 0 && strides[d] == size[used - 1] * stride[used - 1]) {
      size[used - 1] *= sizes[d];
      continue;
    }
    if (used == 3) return std::nullopt;
    size[used] = sizes[d];
    stride[used++] = strides[d];
  }
  if (used <= 1) {
    rows.stride0 = stride[0];
    return rows;
  }
  rows.size2 = size[0], rows.stride2 = stride[0];
  rows.size1 = size[1], rows.stride1 = stride[1];
  rows.stride0 = stride[2];
  return rows;
}

// The op's definition in Python (llmkern/library.py), on whatever the kernel cannot serve: torch.ops.llmkern.<op>
// answers every call that its schema allows.  The dispatcher never comes here: it asks `refuse` first.
template <class Result, class... Args>
inline Result call_reference(const char* op, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  const std::string name = std::string("llmkern_reference::") + op;
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

}  // namespace llmkern
