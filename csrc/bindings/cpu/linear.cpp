// The linear layers: floating, int8 weights, and the product of codes; one launcher for all.
#include "llmkern/linear.h"

#include <string>

#include "../activation.h"
#include "../common.h"
#include "threads.h"

namespace llmkern {
namespace {

using Optional = std::optional<Tensor>;

struct Call {
  const char* op;
  const char* weight_name;
  const Tensor& x;
  const Tensor& weight;
  const Optional& x_scale;
  const Optional& w_scale;
  const Optional& bias;
  const Optional& residual;
  Activation activation;
  ScalarType out_type;
  bool w8a8;
};

bool is_type(ScalarType type, const Optional& t) {
  return !t || t->scalar_type() == type;
}

bool kernel_type(const Optional& t) {
  return !t || dtype_of(*t);
}

const void* vector(const Call& call, const char* name, const Optional& t, int64_t n, const char* per) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->numel() == n && t->is_contiguous(), call.op, ": ", name, " must be contiguous with ", n,
                  " elements, one per row of ", per);
  STD_TORCH_CHECK(t->is_cpu(), call.op, ": ", name, " must be on the CPU");
  return t->const_data_ptr();
}

// With one stride from row to row, as the launcher takes it.
RowTensor evenly_spaced(const Tensor& t) {
  RowTensor rows = as_rows(t);
  if (rows.rows.size1 == 1 && rows.rows.size2 == 1) return rows;
  return as_rows(torch::stable::contiguous(t));
}

Tensor run(const Call& call) {
  const auto& [op, weight_name, x, weight, x_scale, w_scale, bias, residual, activation, out_type, w8a8] = call;
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 2, op, ": expected x [..., K] and ", weight_name, " [N, K]");
  const int64_t n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(hidden_of(x) == k, op, ": ", weight_name, " has K = ", k, ", x's last dimension is ", hidden_of(x));
  STD_TORCH_CHECK(weight.is_cpu(), op, ": ", weight_name, " must be on the CPU, as x is");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  Tensor out = torch::stable::new_empty(x, shape, out_type);
  STD_TORCH_CHECK(!residual || (same_shape(*residual, out) && residual->is_cpu()), op,
                  ": residual must have the result's shape and device");
  const RowTensor rows = as_rows(x);
  const RowTensor added = residual ? evenly_spaced(*residual) : RowTensor{};
  const Tensor stored = weight.stride(1) == 1 || k <= 1 ? weight : torch::stable::contiguous(weight);
  const int64_t bytes = linear_workspace_bytes(rows.rows.count, k, w8a8);
  Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  const bool codes = x.scalar_type() == ScalarType::Char;
  launch_linear(
      {
          .x = codes ? nullptr : rows.tensor.const_data_ptr(),
          .x_q = codes ? static_cast<const int8_t*>(rows.tensor.const_data_ptr()) : nullptr,
          .x_scale = static_cast<const float*>(vector(call, "a_scale", x_scale, rows.rows.count, "a_q")),
          .workspace = static_cast<char*>(workspace.mutable_data_ptr()),
          .segment = {{
              .w = stored.const_data_ptr(),
              .w_scale = static_cast<const float*>(vector(call, "w_scale", w_scale, n, weight_name)),
              .bias = vector(call, "bias", bias, n, weight_name),
              .residual = residual ? added.tensor.const_data_ptr() : nullptr,
              .out = out.mutable_data_ptr(),
              .n = n,
              .w_stride = stored.stride(0),
              .residual_stride = added.rows.stride0,
              .out_stride = n,
              .activation = activation,
          }},
          .rows = rows.rows,
          .k = k,
          .weight_type =
              weight.scalar_type() == ScalarType::Char ? WeightType::s8 : static_cast<WeightType>(*dtype_of(weight)),
          .dtype = dtype_of(x).value_or(DType::f32),
          .out_dtype = dtype_of(out).value_or(DType::f32),
          .bias_dtype = bias ? *dtype_of(*bias) : DType::f32,
          .residual_dtype = residual ? *dtype_of(*residual) : DType::f32,
          .w8a8 = w8a8,
          .sums = out_type == ScalarType::Int,
      },
      kTorchThreads);
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias, std::string activation) {
  const std::optional<Activation> act = activation_of(activation);
  if (!kernel_types(x, Optional(weight), bias) || !act)
    return call_reference<Tensor>("linear", x, weight, bias, activation);
  return run({"linear", "weight", x, weight, {}, {}, bias, {}, *act, x.scalar_type(), false});
}

Tensor int8_linear(const Tensor& x, const Tensor& w_q, const Tensor& w_scale, const Optional& bias,
                   std::string activation, std::string scheme) {
  const std::optional<Activation> act = activation_of(activation);
  if (!kernel_types(x, bias) || !is_type(ScalarType::Char, w_q) || !is_type(ScalarType::Float, w_scale) || !act)
    return call_reference<Tensor>("int8_linear", x, w_q, w_scale, bias, activation, scheme);
  return run({"int8_linear", "w_q", x, w_q, {}, w_scale, bias, {}, *act, x.scalar_type(), scheme == "w8a8"});
}

Tensor int8_matmul(const Tensor& a_q, const Tensor& w_q, const Optional& a_scale, const Optional& w_scale,
                   const Optional& bias, const Optional& residual, std::string activation, ScalarType out_dtype) {
  const std::optional<Activation> act = activation_of(activation);
  const bool codes = is_type(ScalarType::Char, a_q) && is_type(ScalarType::Char, w_q);
  const bool scales = is_type(ScalarType::Float, a_scale) && is_type(ScalarType::Float, w_scale);
  const bool out = out_dtype == ScalarType::Int || dtype_of(out_dtype);
  if (!codes || !scales || !out || !kernel_type(bias) || !kernel_type(residual) || !act)
    return call_reference<Tensor>("int8_matmul", a_q, w_q, a_scale, w_scale, bias, residual, activation, out_dtype);
  return run({"int8_matmul", "w_q", a_q, w_q, a_scale, w_scale, bias, residual, *act, out_dtype, true});
}

}  // namespace
}  // namespace llmkern

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  m.impl("linear", TORCH_BOX(&llmkern::linear));
  m.impl("int8_linear", TORCH_BOX(&llmkern::int8_linear));
  m.impl("int8_matmul", TORCH_BOX(&llmkern::int8_matmul));
}
