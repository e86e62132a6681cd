// The linear layers: int8 weights, the product of codes and, on the CPU, floating weights; one launcher for all.
#include "common.h"

#ifdef LLMKERN_GPU
#include "llmkern/int8_matmul.h"
#include "llmkern/quantize_int8.h"
#else
#include "llmkern/linear.h"
#endif

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
  STD_TORCH_CHECK(on_device(call.x, *t), call.op, ": ", name, " must be on x's device");
  return t->const_data_ptr();
}

// Checked arguments of a call, as launchers take them.
struct Arguments {
  Tensor out, weight;
  RowTensor x, residual;
  int64_t n, k;
  const float *x_scale, *w_scale;
  const void* bias;
  DType out_dtype, bias_dtype, residual_dtype;
};

Arguments checked(const Call& call) {
  const auto& [op, weight_name, x, weight, x_scale, w_scale, bias, residual, activation, out_type, w8a8] = call;
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 2, op, ": expected x [..., K] and ", weight_name, " [N, K]");
  const int64_t n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(hidden_of(x) == k, op, ": ", weight_name, " has K = ", k, ", x's last dimension is ", hidden_of(x));
  STD_TORCH_CHECK(on_device(x, weight), op, ": ", weight_name, " must be on x's device");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  const Tensor out = new_tensor(x, shape, out_type);
  STD_TORCH_CHECK(!residual || (same_shape(*residual, out) && on_device(x, *residual)), op,
                  ": residual must have the result's shape and device");
  const RowTensor rows = as_rows(x);
  return {
      .out = out,
      .weight = weight.stride(1) == 1 || k <= 1 ? weight : torch::stable::contiguous(weight),
      .x = rows,
      .residual = residual ? as_rows(*residual) : RowTensor{},
      .n = n,
      .k = k,
      .x_scale = static_cast<const float*>(vector(call, "a_scale", x_scale, rows.rows.count, "a_q")),
      .w_scale = static_cast<const float*>(vector(call, "w_scale", w_scale, n, weight_name)),
      .bias = vector(call, "bias", bias, n, weight_name),
      .out_dtype = dtype_of(out_type).value_or(DType::f32),
      .bias_dtype = dtype_or_f32(bias),
      .residual_dtype = dtype_or_f32(residual),
  };
}

#ifdef LLMKERN_GPU

Tensor run(const Call& call) {
  Arguments a = checked(call);
  const Place place(call.x);
  const Gpu& gpu = place;
  const bool codes = call.x.scalar_type() == ScalarType::Char;
  Int8MatmulParams p{
      .a = codes ? static_cast<const int8_t*>(a.x.tensor.const_data_ptr()) : nullptr,
      .x = codes || call.w8a8 ? nullptr : a.x.tensor.const_data_ptr(),
      .w = static_cast<const int8_t*>(a.weight.const_data_ptr()),
      .a_scale = a.x_scale,
      .w_scale = a.w_scale,
      .bias = a.bias,
      .residual = call.residual ? a.residual.tensor.const_data_ptr() : nullptr,
      .out = a.out.mutable_data_ptr(),
      .workspace = nullptr,
      .a_rows = a.x.rows,
      .residual_rows = a.residual.rows,
      .n = a.n,
      .k = a.k,
      .w_stride = a.weight.stride(0),
      .x_dtype = dtype_of(call.x).value_or(DType::f32),
      .out_dtype = a.out_dtype,
      .bias_dtype = a.bias_dtype,
      .residual_dtype = a.residual_dtype,
      .activation = call.activation,
      .sums = call.out_type == ScalarType::Int,
  };
  std::tuple<Tensor, Tensor> quantized;
  if (call.w8a8 && !codes) {
    quantized = new_codes(call.x);
    auto& [x_q, x_scale] = quantized;
    p.a = static_cast<const int8_t*>(x_q.const_data_ptr());
    p.a_scale = static_cast<const float*>(x_scale.const_data_ptr());
    launch_quantize_int8(
        {
            .x = a.x.tensor.const_data_ptr(),
            .codes = static_cast<int8_t*>(x_q.mutable_data_ptr()),
            .scale = static_cast<float*>(x_scale.mutable_data_ptr()),
            .rows = a.x.rows,
            .hidden = a.k,
            .dtype = p.x_dtype,
        },
        gpu);
    p.a_rows = dense_rows(a.x.rows.count, a.k);
  }
  const int64_t bytes = int8_matmul_workspace_bytes(p.a_rows.count, p.n, p.k, p.x != nullptr, gpu);
  Tensor workspace = new_tensor(call.x, {bytes}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  launch_int8_matmul(p, gpu);
  return a.out;
}

// Weight-only the kernels take 16-bit elements.
bool kernel_scheme(const Tensor& x, const std::string& scheme) {
  return scheme == "w8a8" || x.scalar_type() != ScalarType::Float;
}

#else

Tensor run(const Call& call) {
  Arguments a = checked(call);
  const RowTensor added = call.residual ? evenly_spaced(a.residual) : RowTensor{};
  const int64_t bytes = linear_workspace_bytes(a.x.rows.count, a.k, call.w8a8);
  Tensor workspace = new_tensor(call.x, {bytes}, ScalarType::Byte);
  const bool codes = call.x.scalar_type() == ScalarType::Char;
  const ScalarType weight_type = a.weight.scalar_type();
  launch_linear(
      {
          .x = codes ? nullptr : a.x.tensor.const_data_ptr(),
          .x_q = codes ? static_cast<const int8_t*>(a.x.tensor.const_data_ptr()) : nullptr,
          .x_scale = a.x_scale,
          .workspace = static_cast<char*>(workspace.mutable_data_ptr()),
          .segment = {{
              .w = a.weight.const_data_ptr(),
              .w_scale = a.w_scale,
              .bias = a.bias,
              .residual = call.residual ? added.tensor.const_data_ptr() : nullptr,
              .out = a.out.mutable_data_ptr(),
              .n = a.n,
              .w_stride = a.weight.stride(0),
              .residual_stride = added.rows.stride0,
              .out_stride = a.n,
              .activation = call.activation,
          }},
          .rows = a.x.rows,
          .k = a.k,
          .weight_type =
              weight_type == ScalarType::Char ? WeightType::s8 : static_cast<WeightType>(*dtype_of(weight_type)),
          .dtype = dtype_of(call.x).value_or(DType::f32),
          .out_dtype = a.out_dtype,
          .bias_dtype = a.bias_dtype,
          .residual_dtype = a.residual_dtype,
          .w8a8 = call.w8a8,
          .sums = call.out_type == ScalarType::Int,
      },
      Place(call.x));
  return a.out;
}

bool kernel_scheme(const Tensor&, const std::string&) {
  return true;
}

Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias, std::string activation) {
  const std::optional<Activation> act = activation_of(activation);
  if (!kernel_types(x, Optional(weight), bias) || !act)
    return call_reference<Tensor>("linear", x, weight, bias, activation);
  return run({"linear", "weight", x, weight, {}, {}, bias, {}, *act, x.scalar_type(), false});
}

#endif

Tensor int8_linear(const Tensor& x, const Tensor& w_q, const Tensor& w_scale, const Optional& bias,
                   std::string activation, std::string scheme) {
  const std::optional<Activation> act = activation_of(activation);
  if (!kernel_types(x, bias) || !is_type(ScalarType::Char, w_q) || !is_type(ScalarType::Float, w_scale) || !act ||
      !kernel_scheme(x, scheme))
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

LLMKERN_BINDINGS(m) {
#ifndef LLMKERN_GPU
  m.impl("linear", TORCH_BOX(&llmkern::linear));
#endif
  m.impl("int8_linear", TORCH_BOX(&llmkern::int8_linear));
  m.impl("int8_matmul", TORCH_BOX(&llmkern::int8_matmul));
}
