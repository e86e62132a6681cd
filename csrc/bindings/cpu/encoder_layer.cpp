// encoder_layer: the launchers of an encoder layer's parts, one after the other in one piece of scratch memory.
//   q, k, v → attention → o → sum and norm → up → activation → down → sum and norm
#include "layer.h"
#include "llmkern/quantize_int8.h"

namespace llmkern {
namespace {

constexpr const char* kOp = "encoder_layer";

using Optional = std::optional<Tensor>;

struct Call {
  const Tensor& hidden;
  const Optional& mask;
  const Tensor& attention_norm;
  const Optional& attention_norm_bias;
  const Tensor& output_norm;
  const Optional& output_norm_bias;
  Linear q, k, v, o, up, down;
  int64_t heads;
  float eps, sm_scale;
  Activation activation;
};

class EncoderLayer : Layer {
 public:
  EncoderLayer(const Call& call, const Threads& threads)
      : Layer(kOp, call.hidden, call.mask, call.heads, call.heads, call.q.n() / call.heads, call.hidden.size(1),
              threads),
        c_(call) {}

  void run(Tensor& out) {
    if (rows_ == 0 || size_ == 0) return;
    allocate([this](Scratch& scratch) { place(scratch); });
    products_(quantized(input(), size_, {c_.q, c_.k, c_.v}), {c_.q, c_.k, c_.v}, {&q_, &k_, &v_});
    launch_attention(attention_params(q_, k_, v_, attended_, c_.sm_scale), threads_);
    norm(attended_, c_.o, input(), o_, c_.attention_norm, c_.attention_norm_bias, h_);
    const Matrix activated = up();
    norm(activated, c_.down, h_, down_, c_.output_norm, c_.output_norm_bias,
         {.data = out.mutable_data_ptr(), .stride = size_});
  }

 private:
  void place(Scratch& scratch) {
    const int64_t inner = c_.up.n(), across = heads_ * dim_;
    products_.set_workspace(scratch.take(products_.workspace_bytes({c_.q, c_.k, c_.v, c_.o, c_.up, c_.down})));
    codes_.codes = scratch.take<int8_t>(rows_ * std::max(size_, inner));
    codes_.scale = scratch.take<float>(rows_);
    q_ = matrix(scratch, across), k_ = matrix(scratch, across), v_ = matrix(scratch, across);
    attended_ = matrix(scratch, across);
    o_ = matrix(scratch, size_), h_ = matrix(scratch, size_), down_ = matrix(scratch, size_);
    inner_ = matrix(scratch, inner);
    const AttentionParams attention = attention_params(q_, k_, v_, attended_, c_.sm_scale);
    attention_workspace_ = scratch.take(attention_workspace_bytes(attention));
  }

  // x, or its codes where all the layers that read it round it: once for all.
  Matrix quantized(const Matrix& x, int64_t columns, std::initializer_list<Linear> layers) {
    if (!products_.takes_codes(layers)) return x;
    launch_quantize_int8(
        {
            .x = x.data,
            .codes = codes_.codes,
            .scale = codes_.scale,
            .rows = rows(x),
            .hidden = columns,
            .dtype = dtype_,
        },
        threads_);
    return codes_;
  }

  // The activated input of `down`, as numbers or codes.
  Matrix up() {
    const Matrix x = quantized(h_, size_, {c_.up});
    if (products_.native(c_.up)) {
      products_(x, {c_.up}, {&inner_}, c_.activation);
      return inner_;
    }
    products_(x, {c_.up}, {&inner_});
    const Matrix activated = products_.takes_codes({c_.down}) ? codes_ : inner_;
    activate(c_.activation, inner_, nullptr, activated, c_.up.n());
    return activated;
  }

  // out = layer_norm(x · lᵀ + residual); the sum is kept in `total`.
  void norm(const Matrix& x, const Linear& l, const Matrix& residual, Matrix& total, const Tensor& weight,
            const Optional& bias, const Matrix& out) {
    const bool added = products_.native(l);
    added ? products_.add(x, l, residual, total) : products_(x, {l}, {&total});
    NormParams p = norm_params(total, weight, out);
    if (!added) add_first(p, residual, total);
    p.norm = Norm::layer;
    p.bias = bias ? bias->const_data_ptr() : nullptr;
    p.bias_dtype = dtype_or_f32(bias);
    p.eps = c_.eps;
    launch_norm(p, threads_);
  }

  const Call& c_;
  Matrix codes_, q_, k_, v_, attended_, o_, h_, inner_, down_;
};

bool kernels_take(const Call& c) {
  for (const Linear* l : {&c.q, &c.k, &c.v, &c.o, &c.up, &c.down})
    if (!kernels_take(*l, c.hidden.scalar_type())) return false;
  return kernels_take_mask(c.mask) && kernel_types(c.hidden, c.attention_norm_bias, c.output_norm_bias) &&
         kernel_types(c.attention_norm, Optional(c.output_norm));
}

void check(const Call& c) {
  STD_TORCH_CHECK(c.hidden.dim() == 3, kOp, ": hidden must have shape [B, S, H]");
  const int64_t size = c.hidden.size(2), across = c.q.weight.dim() == 2 ? c.q.n() : 0;
  STD_TORCH_CHECK(c.heads > 0 && across > 0 && across % c.heads == 0 && across / c.heads <= kMaxHeadDim, kOp,
                  ": the rows of q_weight must be a multiple of heads, at most ", kMaxHeadDim, " for each");
  const int64_t inner = c.up.weight.dim() == 2 ? c.up.n() : 0;
  for (const Linear* l : {&c.q, &c.k, &c.v}) check_linear(kOp, *l, across, size);
  check_linear(kOp, c.o, size, across);
  check_linear(kOp, c.up, inner, size);
  check_linear(kOp, c.down, size, inner);
  check_vector(kOp, "attention_norm", c.attention_norm, size);
  check_vector(kOp, "output_norm", c.output_norm, size);
  if (c.attention_norm_bias) check_vector(kOp, "attention_norm_bias", *c.attention_norm_bias, size);
  if (c.output_norm_bias) check_vector(kOp, "output_norm_bias", *c.output_norm_bias, size);
}

Tensor encoder_layer(const Tensor& hidden, const Optional& mask, const Tensor& attention_norm,
                     const Optional& attention_norm_bias, const Tensor& output_norm, const Optional& output_norm_bias,
                     const Tensor& q_weight, const Optional& q_scale, const Optional& q_bias, const Tensor& k_weight,
                     const Optional& k_scale, const Optional& k_bias, const Tensor& v_weight, const Optional& v_scale,
                     const Optional& v_bias, const Tensor& o_weight, const Optional& o_scale, const Optional& o_bias,
                     const Tensor& up_weight, const Optional& up_scale, const Optional& up_bias,
                     const Tensor& down_weight, const Optional& down_scale, const Optional& down_bias, int64_t heads,
                     double eps, double sm_scale, std::string activation, std::string scheme) {
  const std::optional<Activation> act = activation_of(activation);
  const Schemes schemes(kOp, scheme, 6);
  const Tensor rows = hidden.is_contiguous() ? hidden : torch::stable::contiguous(hidden);
  const Call call{
      .hidden = rows,
      .mask = mask,
      .attention_norm = attention_norm,
      .attention_norm_bias = attention_norm_bias,
      .output_norm = output_norm,
      .output_norm_bias = output_norm_bias,
      .q = {"q", q_weight, q_scale, q_bias, schemes.w8a8(0)},
      .k = {"k", k_weight, k_scale, k_bias, schemes.w8a8(1)},
      .v = {"v", v_weight, v_scale, v_bias, schemes.w8a8(2)},
      .o = {"o", o_weight, o_scale, o_bias, schemes.w8a8(3)},
      .up = {"up", up_weight, up_scale, up_bias, schemes.w8a8(4)},
      .down = {"down", down_weight, down_scale, down_bias, schemes.w8a8(5)},
      .heads = heads,
      .eps = static_cast<float>(eps),
      .sm_scale = static_cast<float>(sm_scale),
      .activation = act.value_or(Activation::none),
  };
  if (!act || !kernels_take(call))
    return call_reference<Tensor>(kOp, hidden, mask, attention_norm, attention_norm_bias, output_norm, output_norm_bias,
                                  q_weight, q_scale, q_bias, k_weight, k_scale, k_bias, v_weight, v_scale, v_bias,
                                  o_weight, o_scale, o_bias, up_weight, up_scale, up_bias, down_weight, down_scale,
                                  down_bias, heads, eps, sm_scale, activation, scheme);
  check(call);
  Tensor out = torch::stable::new_empty(call.hidden, call.hidden.sizes());
  const std::array linears{&call.q, &call.k, &call.v, &call.o, &call.up, &call.down};
  with_threads(are_native(linears, hidden.size(0) * hidden.size(1)),
               [&](const Threads& threads) { EncoderLayer(call, threads).run(out); });
  return out;
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("encoder_layer", TORCH_BOX(&llmkern::encoder_layer));
}
