// The gradients of rms_norm and layer_norm; one launcher for both.
#include "llmkern/norm_backward.h"

#include "common.h"

namespace llmkern {
namespace {

using Optional = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// Allocates a gradient like the parameter; it has 0 elements if there is none.
Tensor new_gradient(const char* op, const char* name, const Tensor& x, const Optional& parameter) {
  if (!parameter) return new_tensor(x, {0}, x.scalar_type());
  check_parameter(op, name, x, parameter);
  return new_tensor(x, {hidden_of(x)}, parameter->scalar_type());
}

Three run(const char* op, Norm norm, const Tensor& dy, const Tensor& x, const Optional& weight, const Optional& bias,
          double eps, double weight_offset) {
  STD_TORCH_CHECK(x.dim() > 0 && same_shape(dy, x) && dtype_of(dy) == dtype_of(x) && on_device(x, dy), op,
                  ": dy must have the shape, dtype and device of x [..., hidden]");
  check_row(op, "x", x);
  const RowTensor rows = as_rows(x), given = as_rows(dy);
  Tensor dx = new_tensor(x, x.sizes(), x.scalar_type());
  Tensor dweight = new_gradient(op, "weight", x, weight), dbias = new_gradient(op, "bias", x, bias);
  const Place place(x);
  const int64_t floats = norm_backward_workspace_floats(rows.rows.count, hidden_of(x), place);
  Tensor workspace = new_tensor(x, {weight || bias ? floats : 0}, ScalarType::Float);
  launch_norm_backward(
      {
          .dy = given.tensor.const_data_ptr(),
          .x = rows.tensor.const_data_ptr(),
          .weight = weight ? weight->const_data_ptr() : nullptr,
          .dx = dx.mutable_data_ptr(),
          .dweight = weight ? dweight.mutable_data_ptr() : nullptr,
          .dbias = bias ? dbias.mutable_data_ptr() : nullptr,
          .workspace = static_cast<float*>(workspace.mutable_data_ptr()),
          .dy_rows = given.rows,
          .x_rows = rows.rows,
          .hidden = hidden_of(x),
          .dtype = *dtype_of(x),
          .weight_dtype = dtype_or_f32(weight),
          .bias_dtype = dtype_or_f32(bias),
          .norm = norm,
          .eps = static_cast<float>(eps),
          .weight_offset = static_cast<float>(weight_offset),
      },
      place);
  return {dx, dweight, dbias};
}

Three rms_norm_backward(const Tensor& dy, const Tensor& x, const Optional& weight, const Optional& bias, double eps,
                        double offset) {
  if (!kernel_types(x, weight, bias))
    return call_reference<Three>("rms_norm_backward", dy, x, weight, bias, eps, offset);
  return run("rms_norm_backward", Norm::rms, dy, x, weight, bias, eps, offset);
}

Three layer_norm_backward(const Tensor& dy, const Tensor& x, const Optional& weight, const Optional& bias, double eps) {
  if (!kernel_types(x, weight, bias)) return call_reference<Three>("layer_norm_backward", dy, x, weight, bias, eps);
  return run("layer_norm_backward", Norm::layer, dy, x, weight, bias, eps, 0);
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("rms_norm_backward", TORCH_BOX(&llmkern::rms_norm_backward));
  m.impl("layer_norm_backward", TORCH_BOX(&llmkern::layer_norm_backward));
}
