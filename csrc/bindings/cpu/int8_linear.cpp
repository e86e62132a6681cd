#include "../common.h"
#include "linear.h"
#include "threads.h"

namespace llmkern {
namespace {

Tensor int8_linear(const Tensor& x, const Tensor& w_q, const Tensor& w_scale, const std::optional<Tensor>& bias,
                   std::string activation, std::string scheme) {
  const std::optional<Activation> act = activation_of(activation);
  const bool codes = w_q.scalar_type() == ScalarType::Char && w_scale.scalar_type() == ScalarType::Float;
  if (!kernel_types(x, bias) || !codes || !act)
    return call_reference<Tensor>("int8_linear", x, w_q, w_scale, bias, activation, scheme);
  STD_TORCH_CHECK(x.dim() > 0 && w_q.dim() == 2, "int8_linear: expected x [..., K] and w_q [N, K]");
  const int64_t n = w_q.size(0), k = w_q.size(1);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == k, "int8_linear: w_q has K = ", k, ", x's last dimension is ",
                  x.size(x.dim() - 1));
  STD_TORCH_CHECK(w_scale.numel() == n && w_scale.is_contiguous(), "int8_linear: w_scale must be contiguous with ", n,
                  " elements, one per row of w_q");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n && bias->is_contiguous()),
                  "int8_linear: bias must be contiguous with shape [", n, "], one element per row of w_q");
  STD_TORCH_CHECK(w_q.is_cpu() && w_scale.is_cpu() && (!bias || bias->is_cpu()),
                  "int8_linear: w_q, w_scale and bias must be on the CPU, as x is");
  const auto [rows, taken] = as_rows(x);
  const bool plain = w_q.stride(1) == 1 || k <= 1;
  const Tensor weight = plain ? w_q : torch::stable::contiguous(w_q);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  Tensor out = torch::stable::new_empty(x, shape);
  const bool w8a8 = scheme == "w8a8";
  Tensor workspace = new_workspace(x, linear_workspace_bytes(taken.count, k, w8a8));
  launch_linear(
      {
          .x = rows.const_data_ptr(),
          .workspace = static_cast<char*>(workspace.mutable_data_ptr()),
          .segment = {{
              .w = weight.const_data_ptr(),
              .w_scale = static_cast<const float*>(w_scale.const_data_ptr()),
              .bias = bias ? bias->const_data_ptr() : nullptr,
              .out = out.mutable_data_ptr(),
              .n = n,
              .w_stride = weight.stride(0),
              .out_stride = n,
              .activation = *act,
          }},
          .rows = taken,
          .k = k,
          .weight_type = WeightType::s8,
          .dtype = *dtype_of(x),
          .out_dtype = *dtype_of(x),
          .bias_dtype = bias ? *dtype_of(*bias) : DType::f32,
          .w8a8 = w8a8,
      },
      kTorchThreads);
  return out;
}

}  // namespace
}  // namespace llmkern

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  m.impl("int8_linear", TORCH_BOX(&llmkern::int8_linear));
}
