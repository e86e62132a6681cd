// The activations of feed-forward layers: one launcher for all.
#include "llmkern/activate.h"

#include "common.h"

namespace llmkern {
namespace {

Tensor activated(Activation activation, const Tensor& x, const std::optional<Tensor>& up) {
  const RowTensor rows = as_rows(x);
  const RowTensor factor = up ? as_rows(*up) : RowTensor{};
  Tensor out = new_tensor(x, x.sizes(), x.scalar_type());
  launch_activate(
      {
          .x = rows.tensor.const_data_ptr(),
          .up = up ? factor.tensor.const_data_ptr() : nullptr,
          .out = out.mutable_data_ptr(),
          .codes = nullptr,
          .scale = nullptr,
          .x_rows = rows.rows,
          .up_rows = factor.rows,
          .out_rows = dense_rows(rows.rows.count, hidden_of(x)),
          .hidden = hidden_of(x),
          .dtype = *dtype_of(x),
          .activation = activation,
      },
      Place(x));
  return out;
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  if (!kernel_types(gate)) return call_reference<Tensor>("swiglu", gate, up);
  STD_TORCH_CHECK(same_shape(up, gate) && dtype_of(up) == dtype_of(gate) && on_device(up),
                  "swiglu: up must have gate's shape, dtype and device");
  return activated(Activation::silu, gate, up);
}

Tensor gelu(const Tensor& x, std::string approximate) {
  if (!kernel_types(x)) return call_reference<Tensor>("gelu", x, approximate);
  return activated(approximate == "tanh" ? Activation::gelu_tanh : Activation::gelu, x, std::nullopt);
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("swiglu", TORCH_BOX(&llmkern::swiglu));
  m.impl("gelu", TORCH_BOX(&llmkern::gelu));
}
