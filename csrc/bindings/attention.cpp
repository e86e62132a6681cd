#include "attention.h"

namespace llmkern {
namespace {

constexpr const char* kOp = "attention";

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& attn_mask,
                                     const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& sinks,
                                     bool causal, double sm_scale, std::vector<int64_t> window, double softcap,
                                     bool return_lse) {
  const AttentionCall call{q, k, v, attn_mask, key_padding_mask, sinks, causal, sm_scale, window, softcap};
  check_heads(kOp, q, k, v);
  const int64_t longest = std::max(q.size(0) * q.size(1) * q.size(2), k.size(2));
  if (!call.has_served_types() || !served_dim(q) || !served_dim(v) || longest > kMaxLength)
    return call_reference<std::tuple<Tensor, Tensor>>(kOp, q, k, v, attn_mask, key_padding_mask, sinks, causal,
                                                      sm_scale, window, softcap, return_lse);
  const Tensor q_ = readable(q), k_ = readable(k), v_ = readable(v);
  AttentionParams p =
      attention_params(kOp, {q_, k_, v_, attn_mask, key_padding_mask, sinks, causal, sm_scale, window, softcap});
  Tensor out = out_like(q, v.size(3));
  Tensor lse = lse_like(q, return_lse);
  p.out = out.mutable_data_ptr();
  p.out_strides = head_strides(out);
  if (return_lse) p.lse = static_cast<float*>(lse.mutable_data_ptr());
  launch_attention(p, Place(q));
  return {out, lse};
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("attention", TORCH_BOX(&llmkern::attention));
}
