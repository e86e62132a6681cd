// Shared by all bindings: converting torch's tensors to params structs, and falling back to the reference.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "device.h"
#include "llmkern/activation.h"
#include "llmkern/dtype.h"
#include "llmkern/rows.h"

namespace llmkern {
namespace {  // as in device.h

// The kernels' name of an element type; nullopt for types they do not have.
inline std::optional<DType> dtype_of(ScalarType type) {
  switch (type) {
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

inline std::optional<DType> dtype_of(const Tensor& t) {
  return dtype_of(t.scalar_type());
}

// DType of an optional tensor; f32 if absent, as the params' field must hold something.
inline DType dtype_or_f32(const std::optional<Tensor>& t) {
  return t ? *dtype_of(*t) : DType::f32;
}

// Returns nullopt for a name that the op's Python refuses too.
inline std::optional<Activation> activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"none", "gelu", "gelu_tanh", "silu", "relu"};
  for (int i = 0; i < 5; ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  return std::nullopt;
}

// Returns whether the kernels have the types of all given tensors.
template <class... Optional>
inline bool kernel_types(const Tensor& t, const Optional&... more) {
  return dtype_of(t).has_value() && (... && (!more.has_value() || dtype_of(*more).has_value()));
}

// The rows of t [..., hidden], or nullopt where it must be copied first: hidden not contiguous, or more than three
// leading dimensions that do not merge.  A tensor without dimensions is one row.
inline std::optional<Rows> rows_of(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t last = t.dim() - 1;
  Rows rows{.count = 1};
  if (t.numel() == 0) {  // any strides will do: no element is read
    for (int64_t d = 0; d < last; ++d) rows.count *= sizes[d];
    return rows;
  }
  if (last < 0) return rows;
  if (strides[last] != 1 && sizes[last] > 1) return std::nullopt;
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

// A tensor, copied where it must be, and its rows.
struct RowTensor {
  Tensor tensor;
  Rows rows;
};

inline RowTensor as_rows(const Tensor& t) {
  if (const std::optional<Rows> rows = rows_of(t)) return {t, *rows};
  const Tensor copy = torch::stable::contiguous(t);
  return {copy, *rows_of(copy)};
}

// With one stride from row to row.
inline RowTensor evenly_spaced(const RowTensor& t) {
  return t.rows.size1 == 1 && t.rows.size2 == 1 ? t : as_rows(torch::stable::contiguous(t.tensor));
}

inline int64_t hidden_of(const Tensor& t) {
  return t.dim() > 0 ? t.size(t.dim() - 1) : 1;
}

// Kernels that share a row among threads count its elements in 32 bits.
inline void check_row(const char* op, const char* name, const Tensor& t) {
#ifdef LLMKERN_GPU
  STD_TORCH_CHECK(hidden_of(t) <= kGpuMaxRow, op, ": ", name, " has rows of ", hidden_of(t), " elements; at most ",
                  kGpuMaxRow, " are taken");
#else
  (void)op, (void)name, (void)t;
#endif
}

// Checks a norm's parameter: absent, or one element for each of x's last dimension.
inline void check_parameter(const char* op, const char* name, const Tensor& x, const std::optional<Tensor>& t) {
  if (!t) return;
  const int64_t hidden = hidden_of(x);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == hidden && t->is_contiguous(), op, ": ", name,
                  " must be contiguous with shape [", hidden, "], x's last dimension");
  STD_TORCH_CHECK(on_device(x, *t), op, ": ", name, " must be on x's device");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), others = b.sizes();
  return std::equal(sizes.begin(), sizes.end(), others.begin(), others.end());
}

// Allocates codes and scales for the rows of x, as quantize_int8 returns them.
inline std::tuple<Tensor, Tensor> new_codes(const Tensor& x) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const Tensor codes = new_tensor(x, shape, ScalarType::Char);
  shape.back() = 1;
  return {codes, new_tensor(x, shape, ScalarType::Float)};
}

// Reads an op's results from the dispatcher's stack.
template <class Result>
struct Results {
  static constexpr size_t kCount = 1;
  static Result of(const StableIValue* stack) { return torch::stable::detail::to<Result>(*stack); }
};

template <class... Each>
struct Results<std::tuple<Each...>> {
  static constexpr size_t kCount = sizeof...(Each);
  static std::tuple<Each...> of(const StableIValue* stack) {
    return [stack]<size_t... i>(std::index_sequence<i...>) {
      return std::tuple<Each...>{torch::stable::detail::to<Each>(stack[i])...};
    }(std::index_sequence_for<Each...>{});
  }
};

// Falls back to the op's definition in Python (llmkern/library.py), so that torch.ops.llmkern.<op> answers every call
// that its schema allows.  Calls through the dispatcher never get here: it asks `refuse` first.
template <class Result, class... Args>
inline Result call_reference(const char* op, const Args&... args) {
  std::array<StableIValue, std::max(sizeof...(Args), Results<Result>::kCount)> stack{
      torch::stable::detail::from(args)...};
  const std::string name = std::string("llmkern_reference::") + op;
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), "", stack.data(), TORCH_ABI_VERSION));
  return Results<Result>::of(stack.data());
}

}  // namespace
}  // namespace llmkern
