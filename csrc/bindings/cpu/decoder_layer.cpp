// decoder_layer_: one decoder layer, by its arguments' names.
#include "decoder_layer.h"

namespace llmkern {
namespace {

using decoder::Call;
using Optional = std::optional<Tensor>;

Tensor decoder_layer_(const Tensor& hidden, const Tensor& cos, const Tensor& sin, const Optional& k_cache,
                      const Optional& v_cache, const Optional& k_cache_scale, const Optional& v_cache_scale,
                      int64_t past, const Optional& mask, const Tensor& input_norm, const Tensor& post_norm,
                      const Optional& q_norm, const Optional& k_norm, const Tensor& q_weight, const Optional& q_scale,
                      const Optional& q_bias, const Tensor& k_weight, const Optional& k_scale, const Optional& k_bias,
                      const Tensor& v_weight, const Optional& v_scale, const Optional& v_bias, const Tensor& o_weight,
                      const Optional& o_scale, const Optional& o_bias, const Tensor& gate_weight,
                      const Optional& gate_scale, const Optional& gate_bias, const Tensor& up_weight,
                      const Optional& up_scale, const Optional& up_bias, const Tensor& down_weight,
                      const Optional& down_scale, const Optional& down_bias, int64_t head_dim, double eps,
                      double norm_offset, bool interleaved, double sm_scale, int64_t window, double softcap,
                      std::string activation, std::string scheme) {
  constexpr const char* kOp = "decoder_layer_";
  const std::optional<Activation> gate = activation_of(activation);
  const Schemes schemes(kOp, scheme, 7);
  const Tensor rows = hidden.is_contiguous() ? hidden : torch::stable::contiguous(hidden);
  const Call call{
      .op = kOp,
      .hidden = rows,
      .cos = cos,
      .sin = sin,
      .k_cache = k_cache,
      .v_cache = v_cache,
      .k_cache_scale = k_cache_scale,
      .v_cache_scale = v_cache_scale,
      .past = past,
      .mask = mask,
      .input_norm = input_norm,
      .post_norm = post_norm,
      .q_norm = q_norm,
      .k_norm = k_norm,
      .q = {"q", q_weight, q_scale, q_bias, schemes.w8a8(0)},
      .k = {"k", k_weight, k_scale, k_bias, schemes.w8a8(1)},
      .v = {"v", v_weight, v_scale, v_bias, schemes.w8a8(2)},
      .o = {"o", o_weight, o_scale, o_bias, schemes.w8a8(3)},
      .gate = {"gate", gate_weight, gate_scale, gate_bias, schemes.w8a8(4)},
      .up = {"up", up_weight, up_scale, up_bias, schemes.w8a8(5)},
      .down = {"down", down_weight, down_scale, down_bias, schemes.w8a8(6)},
      .head_dim = head_dim,
      .eps = static_cast<float>(eps),
      .norm_offset = static_cast<float>(norm_offset),
      .interleaved = interleaved,
      .sm_scale = static_cast<float>(sm_scale),
      .window = window,
      .softcap = static_cast<float>(softcap),
      .activation = gate.value_or(Activation::none),
  };
  if (!gate || !kernels_take(call))
    return call_reference<Tensor>(kOp, hidden, cos, sin, k_cache, v_cache, k_cache_scale, v_cache_scale, past, mask,
                                  input_norm, post_norm, q_norm, k_norm, q_weight, q_scale, q_bias, k_weight, k_scale,
                                  k_bias, v_weight, v_scale, v_bias, o_weight, o_scale, o_bias, gate_weight, gate_scale,
                                  gate_bias, up_weight, up_scale, up_bias, down_weight, down_scale, down_bias, head_dim,
                                  eps, norm_offset, interleaved, sm_scale, window, softcap, activation, scheme);
  check(call);
  Tensor out = torch::stable::new_empty(rows, rows.sizes());
  decoder::run({&call, 1}, out);
  return out;
}

}  // namespace
}  // namespace llmkern

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  m.impl("decoder_layer_", TORCH_BOX(&llmkern::decoder_layer_));
}
