#include "llmkern/rms_norm.h"

#include "../common.h"
#include "threads.h"

namespace llmkern {
namespace {

const void* parameter(const char* name, const std::optional<Tensor>& t, int64_t hidden) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == hidden && t->is_contiguous(), "rms_norm: ", name,
                  " must be contiguous with shape [", hidden, "], x's last dimension");
  STD_TORCH_CHECK(t->is_cpu(), "rms_norm: ", name, " must be on the CPU, as x is");
  return t->const_data_ptr();
}

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                double weight_offset) {
  if (!kernel_types(x, weight, bias)) return call_reference<Tensor>("rms_norm", x, weight, bias, eps, weight_offset);
  STD_TORCH_CHECK(x.dim() > 0, "rms_norm: x has no dimensions, expected [..., hidden]");
  const std::optional<Rows> strided = rows_of(x);
  const Tensor rows = strided ? x : torch::stable::contiguous(x);
  const int64_t hidden = x.size(x.dim() - 1);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  launch_rms_norm(
      {
          .x = rows.const_data_ptr(),
          .weight = parameter("weight", weight, hidden),
          .bias = parameter("bias", bias, hidden),
          .out = out.mutable_data_ptr(),
          .rows = strided ? *strided : *rows_of(rows),
          .hidden = hidden,
          .dtype = *dtype_of(x),
          .weight_dtype = weight ? *dtype_of(*weight) : DType::f32,
          .bias_dtype = bias ? *dtype_of(*bias) : DType::f32,
          .eps = static_cast<float>(eps),
          .weight_offset = static_cast<float>(weight_offset),
      },
      kTorchThreads);
  return out;
}

}  // namespace
}  // namespace llmkern

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&llmkern::rms_norm));
}
