// decoder_layer_: one decoder layer, by its arguments' names.
#include "decoder_layer.h"

namespace llmkern {
namespace {

using decoder::Call;
using decoder::kCaches;
using decoder::kLinears;
using decoder::kParameters;
using decoder::Shared;
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
  const Shared shared(kOp, hidden, cos, sin, past, mask, head_dim, eps, norm_offset, interleaved, sm_scale, window,
                      softcap, activation);
  const std::array<Optional, kCaches> caches{k_cache, v_cache, k_cache_scale, v_cache_scale};
  const std::array<Optional, kParameters> parameters{
      input_norm, post_norm, q_norm,   k_norm,  q_weight,    q_scale,    q_bias,    k_weight,    k_scale,
      k_bias,     v_weight,  v_scale,  v_bias,  o_weight,    o_scale,    o_bias,    gate_weight, gate_scale,
      gate_bias,  up_weight, up_scale, up_bias, down_weight, down_scale, down_bias,
  };
  const Call call(shared, caches, parameters, Schemes(kOp, scheme, kLinears));
  if (!kernels_take(call))
    return call_reference<Tensor>(kOp, hidden, cos, sin, k_cache, v_cache, k_cache_scale, v_cache_scale, past, mask,
                                  input_norm, post_norm, q_norm, k_norm, q_weight, q_scale, q_bias, k_weight, k_scale,
                                  k_bias, v_weight, v_scale, v_bias, o_weight, o_scale, o_bias, gate_weight, gate_scale,
                                  gate_bias, up_weight, up_scale, up_bias, down_weight, down_scale, down_bias, head_dim,
                                  eps, norm_offset, interleaved, sm_scale, window, softcap, activation, scheme);
  check(call);
  Tensor out = torch::stable::new_empty(shared.hidden, shared.hidden.sizes());
  decoder::run({&call, 1}, out);
  return out;
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("decoder_layer_", TORCH_BOX(&llmkern::decoder_layer_));
}
