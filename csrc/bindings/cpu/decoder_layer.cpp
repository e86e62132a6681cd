// decoder_layer_ and decoder_layers_: one layer by its arguments' names, or several by lists of them.
#include <span>

#include "decoder_layer.h"

namespace llmkern {
namespace {

using decoder::Call;
using Optional = std::optional<Tensor>;

// From the first layer's hidden to `out`, through one layer after the other.
void run(std::span<const Call> layers, Tensor& out) {
  const Tensor& hidden = layers[0].hidden;
  const int64_t size = hidden.size(2);
  const Matrix result{.data = out.mutable_data_ptr(), .stride = size};
  Matrix in{.data = const_cast<void*>(hidden.const_data_ptr()), .stride = size};
  bool native = true;
  for (const Call& call : layers)
    for (const Linear* linear : call.linears()) native = native && is_native(*linear, hidden.size(0) * hidden.size(1));
  with_threads(native, [&](const Threads& threads) {
    for (const Call& call : layers) {
      decoder::DecoderLayer(call, threads).run(in, result);
      in = result;
    }
  });
}

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
  run({&call, 1}, out);
  return out;
}

constexpr size_t kParameters = 4 + 7 * 3;  // of a layer, in the order of decoder_layer_'s arguments

Tensor decoder_layers_(const Tensor& hidden, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& caches,
                       int64_t past, const Optional& mask, const std::vector<Optional>& parameters, int64_t head_dim,
                       double eps, double norm_offset, bool interleaved, double sm_scale, int64_t window,
                       double softcap, const std::string& activation, const std::string& scheme) {
  constexpr const char* kOp = "decoder_layers_";
  const size_t count = parameters.size() / kParameters;
  const size_t held = count ? caches.size() / count : 0;
  STD_TORCH_CHECK(count > 0 && parameters.size() == count * kParameters, kOp, ": parameters has ", parameters.size(),
                  " elements, expected ", kParameters, " for each layer");
  STD_TORCH_CHECK(caches.size() == count * held && (held == 0 || held == 2 || held == 4), kOp, ": caches has ",
                  caches.size(), " elements, expected 0, 2 or 4 for each of ", count, " layers");
  const std::optional<Activation> gate = activation_of(activation);
  const std::vector<std::string> schemes = parts_of(scheme, ';');
  STD_TORCH_CHECK(schemes.size() == 1 || schemes.size() == count, kOp, ": scheme is for ", schemes.size(),
                  " layers, expected 1 or ", count);
  const Tensor rows = hidden.is_contiguous() ? hidden : torch::stable::contiguous(hidden);
  const std::vector<Optional> cached(caches.begin(), caches.end());
  const Optional none;
  std::vector<Call> calls;
  calls.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Optional* const tensor = parameters.data() + i * kParameters;
    const auto cache = [&](size_t which) -> const Optional& { return which < held ? cached[i * held + which] : none; };
    const Schemes each(kOp, schemes[schemes.size() == 1 ? 0 : i], 7);
    const auto linear = [&](const char* name, size_t which) -> Linear {
      const Optional* const part = tensor + 4 + 3 * which;
      STD_TORCH_CHECK(part[0], kOp, ": layer ", i, " has no ", name, "_weight");
      return {name, *part[0], part[1], part[2], each.w8a8(which)};
    };
    STD_TORCH_CHECK(tensor[0] && tensor[1], kOp, ": layer ", i, " has no input_norm, or no post_norm");
    calls.push_back({
        .op = kOp,
        .hidden = rows,
        .cos = cos,
        .sin = sin,
        .k_cache = cache(0),
        .v_cache = cache(1),
        .k_cache_scale = cache(2),
        .v_cache_scale = cache(3),
        .past = past,
        .mask = mask,
        .input_norm = *tensor[0],
        .post_norm = *tensor[1],
        .q_norm = tensor[2],
        .k_norm = tensor[3],
        .q = linear("q", 0),
        .k = linear("k", 1),
        .v = linear("v", 2),
        .o = linear("o", 3),
        .gate = linear("gate", 4),
        .up = linear("up", 5),
        .down = linear("down", 6),
        .head_dim = head_dim,
        .eps = static_cast<float>(eps),
        .norm_offset = static_cast<float>(norm_offset),
        .interleaved = interleaved,
        .sm_scale = static_cast<float>(sm_scale),
        .window = window,
        .softcap = static_cast<float>(softcap),
        .activation = gate.value_or(Activation::none),
    });
  }
  if (!gate || !std::all_of(calls.begin(), calls.end(), [](const Call& call) { return kernels_take(call); }))
    return call_reference<Tensor>(kOp, hidden, cos, sin, caches, past, mask, parameters, head_dim, eps, norm_offset,
                                  interleaved, sm_scale, window, softcap, activation, scheme);
  for (const Call& call : calls) check(call);
  Tensor out = torch::stable::new_empty(rows, rows.sizes());
  run(calls, out);
  return out;
}

}  // namespace
}  // namespace llmkern

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  m.impl("decoder_layer_", TORCH_BOX(&llmkern::decoder_layer_));
  m.impl("decoder_layers_", TORCH_BOX(&llmkern::decoder_layers_));
}
