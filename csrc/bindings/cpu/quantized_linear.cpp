// Linear layers with packed weights.
#include "llmkern/linear.h"
#include "packed.h"

namespace llmkern {
namespace {

using Optional = std::optional<Tensor>;

constexpr const char* kOp = "quantized_linear";

Tensor quantized_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Optional& zero,
                        const Optional& offset, const Optional& super_scale, const Optional& super_offset,
                        const Optional& bias, const Optional& residual, std::string code, int64_t n,
                        std::string activation, std::string scheme) {
  const std::optional<Activation> act = activation_of(activation);
  const PackedTensors tensors{codes, scale, zero, offset, super_scale, super_offset, code, n};
  if (!kernel_types(x, bias, residual) || !kernels_take(tensors) || !act || scheme != "a8")
    return call_reference<Tensor>(kOp, x, codes, scale, zero, offset, super_scale, super_offset, bias, residual, code,
                                  n, activation, scheme);
  const PackedWeight weight = packed_weight(kOp, tensors);
  STD_TORCH_CHECK(x.dim() > 0 && hidden_of(x) == tensors.k() && x.is_cpu(), kOp, ": codes have K = ", tensors.k(),
                  ", x's last dimension is ", hidden_of(x));
  STD_TORCH_CHECK(!bias || (bias->numel() == n && bias->is_contiguous() && bias->is_cpu()), kOp,
                  ": bias must be contiguous with ", n, " elements, on the CPU");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  const Tensor out = new_tensor(x, sizes, x.scalar_type());
  STD_TORCH_CHECK(!residual || (same_shape(*residual, out) && residual->is_cpu()), kOp,
                  ": residual must have the result's shape, on the CPU");
  const RowTensor rows = as_rows(x);
  const RowTensor added = residual ? evenly_spaced(as_rows(*residual)) : RowTensor{};
  const Tensor workspace =
      new_tensor(x, {linear_workspace_bytes(rows.rows.count, tensors.k(), true)}, ScalarType::Byte);
  launch_linear(
      {
          .x = rows.tensor.const_data_ptr(),
          .workspace = static_cast<char*>(workspace.mutable_data_ptr()),
          .segment = {{
              .w = nullptr,
              .bias = bias ? bias->const_data_ptr() : nullptr,
              .residual = residual ? added.tensor.const_data_ptr() : nullptr,
              .out = out.mutable_data_ptr(),
              .n = n,
              .w_stride = 0,
              .residual_stride = added.rows.stride0,
              .out_stride = n,
              .activation = *act,
              .packed = weight,
          }},
          .rows = rows.rows,
          .k = tensors.k(),
          .weight_type = WeightType::packed,
          .dtype = *dtype_of(x),
          .out_dtype = *dtype_of(x),
          .bias_dtype = dtype_or_f32(bias),
          .residual_dtype = dtype_or_f32(residual),
      },
      Place(x));
  return out;
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("quantized_linear", TORCH_BOX(&llmkern::quantized_linear));
}
