#include "llmkern/int8_matmul.h"

#include "../activation.h"
#include "../common.h"

namespace llmkern {
namespace {

using Optional = std::optional<Tensor>;

// The kernel's name of the result's type: nullopt for what it cannot write; int32 is `sums`.
std::optional<DType> out_dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
    case ScalarType::Int:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      return std::nullopt;
  }
}

const void* vector_of(const char* name, const Optional& t, int64_t elements) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->numel() == elements && t->is_contiguous() && on_device(*t), "int8_matmul: ", name,
                  " must be contiguous with ", elements, " elements, on a_q's device");
  return t->const_data_ptr();
}

Tensor int8_matmul(const Tensor& a_q, const Tensor& w_q, const Optional& a_scale, const Optional& w_scale,
                   const Optional& bias, const Optional& residual, std::string activation, ScalarType out_dtype) {
  const std::optional<Activation> act = activation_of(activation);
  const std::optional<DType> out_type = out_dtype_of(out_dtype);
  const bool served = act && out_type && (!bias || dtype_of(*bias)) && (!residual || dtype_of(*residual));
  if (!served)
    return call_reference<Tensor>("int8_matmul", a_q, w_q, a_scale, w_scale, bias, residual, activation, out_dtype);
  STD_TORCH_CHECK(a_q.dim() > 0 && w_q.dim() == 2 && hidden_of(a_q) == w_q.size(1),
                  "int8_matmul: expected a_q [..., K] and w_q [N, K]");
  STD_TORCH_CHECK(a_q.scalar_type() == ScalarType::Char && w_q.scalar_type() == ScalarType::Char && on_device(w_q),
                  "int8_matmul: a_q and w_q must be int8 and on one device");
  STD_TORCH_CHECK(w_q.stride(1) == 1 || w_q.size(1) <= 1, "int8_matmul: the rows of w_q must be contiguous");
  const RowTensor a = as_rows(a_q);
  const int64_t m = a.rows.count, n = w_q.size(0);
  std::vector<int64_t> shape(a_q.sizes().begin(), a_q.sizes().end());
  shape.back() = n;
  STD_TORCH_CHECK(
      !residual || (residual->sizes() == torch::headeronly::IntHeaderOnlyArrayRef(shape) && on_device(*residual)),
      "int8_matmul: residual must have the result's shape, on a_q's device");
  const RowTensor other = residual ? as_rows(*residual) : RowTensor{};
  Tensor out = new_tensor(a_q, shape, out_dtype);
  launch_int8_matmul(
      {
          .a = static_cast<const int8_t*>(a.tensor.const_data_ptr()),
          .w = static_cast<const int8_t*>(w_q.const_data_ptr()),
          .a_scale = static_cast<const float*>(vector_of("a_scale", a_scale, m)),
          .w_scale = static_cast<const float*>(vector_of("w_scale", w_scale, n)),
          .bias = vector_of("bias", bias, n),
          .residual = residual ? other.tensor.const_data_ptr() : nullptr,
          .out = out.mutable_data_ptr(),
          .a_rows = a.rows,
          .residual_rows = other.rows,
          .n = n,
          .k = w_q.size(1),
          .w_stride = w_q.stride(0),
          .out_dtype = *out_type,
          .bias_dtype = bias ? *dtype_of(*bias) : DType::f32,
          .residual_dtype = residual ? *dtype_of(*residual) : DType::f32,
          .activation = *act,
          .sums = out_dtype == ScalarType::Int,
      },
      Place(a_q));
  return out;
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("int8_matmul", TORCH_BOX(&llmkern::int8_matmul));
}
