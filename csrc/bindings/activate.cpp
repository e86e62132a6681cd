// The activations of feed-forward layers: one launcher for all.
#include "llmkern/activate.h"

#include "common.h"

namespace llmkern {
namespace {

struct Activated {
  Tensor out;  // or the codes
  Tensor scale;
};

Activated run(Activation activation, bool quantized, const Tensor& x, const std::optional<Tensor>& up) {
  const RowTensor rows = as_rows(x);
  const RowTensor factor = up ? as_rows(*up) : RowTensor{};
  Activated result;
  if (quantized)
    std::tie(result.out, result.scale) = new_codes(x);
  else
    result.out = new_tensor(x, x.sizes(), x.scalar_type());
  launch_activate(
      {
          .x = rows.tensor.const_data_ptr(),
          .up = up ? factor.tensor.const_data_ptr() : nullptr,
          .out = quantized ? nullptr : result.out.mutable_data_ptr(),
          .codes = quantized ? static_cast<int8_t*>(result.out.mutable_data_ptr()) : nullptr,
          .scale = quantized ? static_cast<float*>(result.scale.mutable_data_ptr()) : nullptr,
          .x_rows = rows.rows,
          .up_rows = factor.rows,
          .out_rows = dense_rows(rows.rows.count, hidden_of(x)),
          .hidden = hidden_of(x),
          .dtype = *dtype_of(x),
          .activation = activation,
      },
      Place(x));
  return result;
}

void check_up(const char* op, const Tensor& gate, const Tensor& up) {
  STD_TORCH_CHECK(same_shape(up, gate) && dtype_of(up) == dtype_of(gate) && on_device(gate, up), op,
                  ": up must have gate's shape, dtype and device");
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  if (!kernel_types(gate)) return call_reference<Tensor>("swiglu", gate, up);
  check_up("swiglu", gate, up);
  return run(Activation::silu, false, gate, up).out;
}

using Codes = std::tuple<Tensor, Tensor>;

Codes swiglu_quant(const Tensor& gate, const Tensor& up) {
  if (!kernel_types(gate)) return call_reference<Codes>("swiglu_quant", gate, up);
  STD_TORCH_CHECK(gate.dim() > 0, "swiglu_quant: gate has no dimensions, expected [..., hidden]");
  check_up("swiglu_quant", gate, up);
  check_row("swiglu_quant", "gate", gate);
  const Activated y = run(Activation::silu, true, gate, up);
  return {y.out, y.scale};
}

Tensor gelu(const Tensor& x, std::string approximate) {
  if (!kernel_types(x)) return call_reference<Tensor>("gelu", x, approximate);
  return run(approximate == "tanh" ? Activation::gelu_tanh : Activation::gelu, false, x, std::nullopt).out;
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("swiglu", TORCH_BOX(&llmkern::swiglu));
  m.impl("swiglu_quant", TORCH_BOX(&llmkern::swiglu_quant));
  m.impl("gelu", TORCH_BOX(&llmkern::gelu));
}
