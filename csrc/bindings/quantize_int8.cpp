#include "llmkern/quantize_int8.h"

#include "common.h"

namespace llmkern {
namespace {

using Codes = std::tuple<Tensor, Tensor>;

Codes quantize_int8(const Tensor& x) {
  if (!kernel_types(x)) return call_reference<Codes>("quantize_int8", x);
  STD_TORCH_CHECK(x.dim() > 0, "quantize_int8: x has no dimensions, expected [..., hidden]");
  check_row("quantize_int8", "x", x);
  const auto [tensor, rows] = as_rows(x);
  auto [codes, scale] = new_codes(x);
  launch_quantize_int8(
      {
          .x = tensor.const_data_ptr(),
          .codes = static_cast<int8_t*>(codes.mutable_data_ptr()),
          .scale = static_cast<float*>(scale.mutable_data_ptr()),
          .rows = rows,
          .hidden = hidden_of(x),
          .dtype = *dtype_of(x),
      },
      Place(x));
  return {codes, scale};
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("quantize_int8", TORCH_BOX(&llmkern::quantize_int8));
}
