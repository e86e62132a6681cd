// The gradients of swiglu and gelu; one launcher for both.
#include "llmkern/activate_backward.h"

#include "common.h"

namespace llmkern {
namespace {

struct Gradients {
  Tensor x, up;
};

Gradients run(const char* op, Activation activation, const Tensor& dy, const Tensor& x,
              const std::optional<Tensor>& up) {
  STD_TORCH_CHECK(same_shape(dy, x) && dtype_of(dy) == dtype_of(x) && on_device(x, dy), op,
                  ": dy must have the shape, dtype and device of the op's first argument");
  STD_TORCH_CHECK(!up || (same_shape(*up, x) && dtype_of(*up) == dtype_of(x) && on_device(x, *up)), op,
                  ": up must have gate's shape, dtype and device");
  const RowTensor given = as_rows(dy), rows = as_rows(x);
  const RowTensor factor = up ? as_rows(*up) : RowTensor{};
  Gradients d{new_tensor(x, x.sizes(), x.scalar_type()), Tensor()};
  if (up) d.up = new_tensor(x, x.sizes(), x.scalar_type());
  launch_activate_backward(
      {
          .dy = given.tensor.const_data_ptr(),
          .x = rows.tensor.const_data_ptr(),
          .up = up ? factor.tensor.const_data_ptr() : nullptr,
          .dx = d.x.mutable_data_ptr(),
          .dup = up ? d.up.mutable_data_ptr() : nullptr,
          .dy_rows = given.rows,
          .x_rows = rows.rows,
          .up_rows = factor.rows,
          .hidden = hidden_of(x),
          .dtype = *dtype_of(x),
          .activation = activation,
      },
      Place(x));
  return d;
}

using Two = std::tuple<Tensor, Tensor>;

Two swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  if (!kernel_types(gate)) return call_reference<Two>("swiglu_backward", dy, gate, up);
  const Gradients d = run("swiglu_backward", Activation::silu, dy, gate, up);
  return {d.x, d.up};
}

Tensor gelu_backward(const Tensor& dy, const Tensor& x, std::string approximate) {
  if (!kernel_types(x)) return call_reference<Tensor>("gelu_backward", dy, x, approximate);
  const Activation activation = approximate == "tanh" ? Activation::gelu_tanh : Activation::gelu;
  return run("gelu_backward", activation, dy, x, std::nullopt).x;
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("swiglu_backward", TORCH_BOX(&llmkern::swiglu_backward));
  m.impl("gelu_backward", TORCH_BOX(&llmkern::gelu_backward));
}
