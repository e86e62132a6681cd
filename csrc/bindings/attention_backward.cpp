#include "llmkern/attention_backward.h"

#include "attention.h"

namespace llmkern {
namespace {

constexpr const char* kOp = "attention_backward";

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// [batch, heads, queries] in fp32 without gaps, or null where it has no elements.
const float* row_numbers(const char* name, const Tensor& t, const Tensor& q) {
  if (t.numel() == 0) return nullptr;
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(2) == q.size(2) &&
                      t.scalar_type() == ScalarType::Float && on_device(q, t),
                  kOp, ": ", name, " must be float32 of shape [", q.size(0), ", ", q.size(1), ", ", q.size(2),
                  "], on q's device");
  return static_cast<const float*>(t.const_data_ptr());
}

void check_like_out(const char* name, const Tensor& t, const Tensor& q, const Tensor& v) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(2) == q.size(2) &&
                      t.size(3) == v.size(3) && t.scalar_type() == q.scalar_type() && on_device(q, t),
                  kOp, ": ", name, " must be what attention of q and v returns, in shape, dtype and device");
}

Five attention_backward(const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& key_padding_mask,
                        const std::optional<Tensor>& sinks, const Tensor& out, const Tensor& lse, bool causal,
                        double sm_scale, std::vector<int64_t> window, double softcap, bool mask_grad) {
  const AttentionCall asked{q, k, v, attn_mask, key_padding_mask, sinks, causal, sm_scale, window, softcap};
  check_heads(kOp, q, k, v);
  const int64_t longest = std::max(q.size(0) * q.size(1) * q.size(2), k.size(2));
  if (!asked.has_served_types() || !served_dim(q) || !served_dim(v) || longest > kMaxLength)
    return call_reference<Five>(kOp, dout, dlse, q, k, v, attn_mask, key_padding_mask, sinks, out, lse, causal,
                                sm_scale, window, softcap, mask_grad);
  check_like_out("dout", dout, q, v);
  check_like_out("out", out, q, v);
  const Tensor q_ = readable(q), k_ = readable(k), v_ = readable(v);
  const Tensor dout_ = readable(dout), out_ = readable(out);
  const Tensor dlse_ = torch::stable::contiguous(dlse), lse_ = torch::stable::contiguous(lse);
  AttentionParams forward =
      attention_params(kOp, {q_, k_, v_, attn_mask, key_padding_mask, sinks, causal, sm_scale, window, softcap});
  forward.out = const_cast<void*>(out_.const_data_ptr());  // it is only read
  forward.lse = const_cast<float*>(row_numbers("lse", lse_, q));
  forward.out_strides = head_strides(out_);
  Tensor dq = new_tensor(q, q.sizes(), q.scalar_type());
  Tensor dk = new_tensor(k, k.sizes(), k.scalar_type());
  Tensor dv = new_tensor(v, v.sizes(), v.scalar_type());
  Tensor dsinks = sinks ? new_tensor(q, sinks->sizes(), sinks->scalar_type()) : new_tensor(q, {0}, q.scalar_type());
  const bool dmask_wanted = attn_mask && mask_grad;
  Tensor dmask =
      dmask_wanted ? new_tensor(q, attn_mask->sizes(), attn_mask->scalar_type()) : new_tensor(q, {0}, q.scalar_type());
  const Place place(q);
  const int64_t floats = attention_backward_workspace_floats(forward, dmask_wanted, place);
  Tensor workspace = new_tensor(q, {floats}, ScalarType::Float);
  auto mask_size = [&](int64_t d) { return attn_mask ? attn_mask->size(d) : 1; };
  launch_attention_backward(
      {
          .forward = forward,
          .dout = dout_.const_data_ptr(),
          .dlse = row_numbers("dlse", dlse_, q),
          .dq = dq.mutable_data_ptr(),
          .dk = dk.mutable_data_ptr(),
          .dv = dv.mutable_data_ptr(),
          .dmask = dmask_wanted ? dmask.mutable_data_ptr() : nullptr,
          .dsinks = sinks ? dsinks.mutable_data_ptr() : nullptr,
          .workspace = static_cast<float*>(workspace.mutable_data_ptr()),
          .dout_strides = head_strides(dout_),
          .mask_sizes = {mask_size(0), mask_size(1), mask_size(2), mask_size(3)},
      },
      place);
  return {dq, dk, dv, dmask, dsinks};
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("attention_backward", TORCH_BOX(&llmkern::attention_backward));
}
