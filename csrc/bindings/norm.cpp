// The normalisations: rms and layer, with a residual sum before or not, quantized after or not; one launcher for all.
#include "llmkern/norm.h"

#include "common.h"

namespace llmkern {
namespace {

using Optional = std::optional<Tensor>;

struct Call {
  const char* op;
  Norm norm;
  bool quantized;
  const Tensor& x;
  const Optional& residual;
  const Optional& weight;
  const Optional& bias;
  double eps;
  double weight_offset;
};

struct Normed {
  Tensor out;  // or the codes
  Tensor scale, total;
};

const void* parameter(const Call& call, const char* name, const Optional& t) {
  check_parameter(call.op, name, call.x, t);
  return t ? t->const_data_ptr() : nullptr;
}

Normed run(const Call& call) {
  const auto& [op, norm, quantized, x, residual, weight, bias, eps, weight_offset] = call;
  STD_TORCH_CHECK(x.dim() > 0, op, ": x has no dimensions, expected [..., hidden]");
  STD_TORCH_CHECK(
      !residual || (same_shape(*residual, x) && dtype_of(*residual) == dtype_of(x) && on_device(x, *residual)), op,
      ": residual must have x's shape, dtype and device");
  check_row(op, "x", x);
  const RowTensor rows = as_rows(x);
  const RowTensor other = residual ? as_rows(*residual) : RowTensor{};
  const Rows dense = dense_rows(rows.rows.count, hidden_of(x));
  Normed result;
  if (quantized)
    std::tie(result.out, result.scale) = new_codes(x);
  else
    result.out = new_tensor(x, x.sizes(), x.scalar_type());
  if (residual) result.total = new_tensor(x, x.sizes(), x.scalar_type());
  launch_norm(
      {
          .x = rows.tensor.const_data_ptr(),
          .residual = residual ? other.tensor.const_data_ptr() : nullptr,
          .weight = parameter(call, "weight", weight),
          .bias = parameter(call, "bias", bias),
          .total = residual ? result.total.mutable_data_ptr() : nullptr,
          .out = quantized ? nullptr : result.out.mutable_data_ptr(),
          .codes = quantized ? static_cast<int8_t*>(result.out.mutable_data_ptr()) : nullptr,
          .scale = quantized ? static_cast<float*>(result.scale.mutable_data_ptr()) : nullptr,
          .x_rows = rows.rows,
          .residual_rows = other.rows,
          .total_rows = dense,
          .out_rows = dense,
          .hidden = hidden_of(x),
          .dtype = *dtype_of(x),
          .weight_dtype = dtype_or_f32(weight),
          .bias_dtype = dtype_or_f32(bias),
          .norm = norm,
          .eps = static_cast<float>(eps),
          .weight_offset = static_cast<float>(weight_offset),
      },
      Place(x));
  return result;
}

Tensor rms_norm(const Tensor& x, const Optional& weight, const Optional& bias, double eps, double offset) {
  if (!kernel_types(x, weight, bias)) return call_reference<Tensor>("rms_norm", x, weight, bias, eps, offset);
  return run({"rms_norm", Norm::rms, false, x, {}, weight, bias, eps, offset}).out;
}

Tensor layer_norm(const Tensor& x, const Optional& weight, const Optional& bias, double eps) {
  if (!kernel_types(x, weight, bias)) return call_reference<Tensor>("layer_norm", x, weight, bias, eps);
  return run({"layer_norm", Norm::layer, false, x, {}, weight, bias, eps, 0}).out;
}

using Two = std::tuple<Tensor, Tensor>;

Two add_rms_norm(const Tensor& x, const Tensor& residual, const Optional& weight, const Optional& bias, double eps,
                 double offset) {
  if (!kernel_types(x, weight, bias))
    return call_reference<Two>("add_rms_norm", x, residual, weight, bias, eps, offset);
  const Normed y = run({"add_rms_norm", Norm::rms, false, x, residual, weight, bias, eps, offset});
  return {y.out, y.total};
}

Two add_layer_norm(const Tensor& x, const Tensor& residual, const Optional& weight, const Optional& bias, double eps) {
  if (!kernel_types(x, weight, bias)) return call_reference<Two>("add_layer_norm", x, residual, weight, bias, eps);
  const Normed y = run({"add_layer_norm", Norm::layer, false, x, residual, weight, bias, eps, 0});
  return {y.out, y.total};
}

Two rms_norm_quant(const Tensor& x, const Optional& weight, const Optional& bias, double eps, double offset) {
  if (!kernel_types(x, weight, bias)) return call_reference<Two>("rms_norm_quant", x, weight, bias, eps, offset);
  const Normed y = run({"rms_norm_quant", Norm::rms, true, x, {}, weight, bias, eps, offset});
  return {y.out, y.scale};
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

Three add_rms_norm_quant(const Tensor& x, const Tensor& residual, const Optional& weight, const Optional& bias,
                         double eps, double offset) {
  if (!kernel_types(x, weight, bias))
    return call_reference<Three>("add_rms_norm_quant", x, residual, weight, bias, eps, offset);
  const Normed y = run({"add_rms_norm_quant", Norm::rms, true, x, residual, weight, bias, eps, offset});
  return {y.out, y.scale, y.total};
}

Two layer_norm_quant(const Tensor& x, const Optional& weight, const Optional& bias, double eps) {
  if (!kernel_types(x, weight, bias)) return call_reference<Two>("layer_norm_quant", x, weight, bias, eps);
  const Normed y = run({"layer_norm_quant", Norm::layer, true, x, {}, weight, bias, eps, 0});
  return {y.out, y.scale};
}

Three add_layer_norm_quant(const Tensor& x, const Tensor& residual, const Optional& weight, const Optional& bias,
                           double eps) {
  if (!kernel_types(x, weight, bias))
    return call_reference<Three>("add_layer_norm_quant", x, residual, weight, bias, eps);
  const Normed y = run({"add_layer_norm_quant", Norm::layer, true, x, residual, weight, bias, eps, 0});
  return {y.out, y.scale, y.total};
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("rms_norm", TORCH_BOX(&llmkern::rms_norm));
  m.impl("layer_norm", TORCH_BOX(&llmkern::layer_norm));
  m.impl("add_rms_norm", TORCH_BOX(&llmkern::add_rms_norm));
  m.impl("add_layer_norm", TORCH_BOX(&llmkern::add_layer_norm));
  m.impl("rms_norm_quant", TORCH_BOX(&llmkern::rms_norm_quant));
  m.impl("add_rms_norm_quant", TORCH_BOX(&llmkern::add_rms_norm_quant));
  m.impl("layer_norm_quant", TORCH_BOX(&llmkern::layer_norm_quant));
  m.impl("add_layer_norm_quant", TORCH_BOX(&llmkern::add_layer_norm_quant));
}
