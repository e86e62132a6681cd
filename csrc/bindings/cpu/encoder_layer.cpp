// encoder_layer: the launchers of an encoder layer's parts, one after the other in one piece of scratch memory.
//   q, k, v → attention → o → sum and norm → up → activation → down → sum and norm
#include "layer.h"
#include "llmkern/activate.h"
#include "llmkern/attention.h"
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

class EncoderLayer {
 public:
  explicit EncoderLayer(const Call& call)
      : c_(call),
        dtype_(*dtype_of(call.hidden)),
        batch_(call.hidden.size(0)),
        length_(call.hidden.size(1)),
        size_(call.hidden.size(2)),
        rows_(batch_ * length_),
        across_(call.q.n()),
        mask_(mask_of(kOp, call.mask, {batch_, call.heads, length_, length_})),
        products_(call.hidden, rows_) {}

  Tensor run() {
    Tensor out = torch::stable::new_empty(c_.hidden, c_.hidden.sizes());
    if (rows_ == 0 || size_ == 0) return out;
    Scratch counted;
    place(counted);
    Tensor block = torch::stable::new_empty(c_.hidden, {counted.used()}, ScalarType::Byte);
    Scratch scratch(static_cast<char*>(block.mutable_data_ptr()));
    place(scratch);
    const Matrix hidden{.data = const_cast<void*>(c_.hidden.const_data_ptr()), .stride = size_};
    products_(quantized(hidden, size_, {c_.q, c_.k, c_.v}), {c_.q, c_.k, c_.v}, {&q_, &k_, &v_});
    launch_attention(attention_params(), kTorchThreads);
    products_(attended_, {c_.o}, {&o_});
    norm(o_, hidden, c_.attention_norm, c_.attention_norm_bias, h_);
    products_(quantized(h_, size_, {c_.up}), {c_.up}, {&inner_});
    products_(activated(), {c_.down}, {&down_});
    norm(down_, h_, c_.output_norm, c_.output_norm_bias, {.data = out.mutable_data_ptr(), .stride = size_});
    return out;
  }

 private:
  Matrix matrix(Scratch& scratch, int64_t columns) {
    return {.data = scratch.take(rows_ * columns * (dtype_ == DType::f32 ? 4 : 2)), .stride = columns};
  }

  void place(Scratch& scratch) {
    const int64_t inner = c_.up.n();
    products_.set_workspace(scratch.take(products_.workspace_bytes({c_.q, c_.k, c_.v, c_.o, c_.up, c_.down})));
    codes_.codes = scratch.take<int8_t>(rows_ * std::max(size_, inner));
    codes_.scale = scratch.take<float>(rows_);
    q_ = matrix(scratch, across_), k_ = matrix(scratch, across_), v_ = matrix(scratch, across_);
    attended_ = matrix(scratch, across_);
    o_ = matrix(scratch, size_), h_ = matrix(scratch, size_), down_ = matrix(scratch, size_);
    inner_ = matrix(scratch, inner);
    attention_workspace_ = scratch.take(attention_workspace_bytes(attention_params()));
  }

  // x, or its codes where all the layers that read it round it: once for all.
  Matrix quantized(const Matrix& x, int64_t columns, std::initializer_list<Linear> layers) {
    if (!products_.takes_codes(layers)) return x;
    launch_quantize_int8(
        {
            .x = x.data,
            .codes = codes_.codes,
            .scale = codes_.scale,
            .rows = {.count = rows_, .stride0 = x.stride},
            .hidden = columns,
            .dtype = dtype_,
        },
        kTorchThreads);
    return codes_;
  }

  // act(inner), as numbers in their place or as codes.
  Matrix activated() {
    const bool codes = products_.takes_codes({c_.down});
    const Rows rows{.count = rows_, .stride0 = inner_.stride};
    launch_activate(
        {
            .x = inner_.data,
            .up = nullptr,
            .out = codes ? nullptr : inner_.data,
            .codes = codes ? codes_.codes : nullptr,
            .scale = codes ? codes_.scale : nullptr,
            .x_rows = rows,
            .up_rows = {},
            .out_rows = rows,
            .hidden = c_.up.n(),
            .dtype = dtype_,
            .activation = c_.activation,
        },
        kTorchThreads);
    return codes ? codes_ : inner_;
  }

  // out = layer_norm(x + residual); the sum takes x's place.
  void norm(const Matrix& x, const Matrix& residual, const Tensor& weight, const Optional& bias, const Matrix& out) {
    const auto rows = [this](const Matrix& m) { return Rows{.count = rows_, .stride0 = m.stride}; };
    launch_norm(
        {
            .x = x.data,
            .residual = residual.data,
            .weight = weight.const_data_ptr(),
            .bias = bias ? bias->const_data_ptr() : nullptr,
            .total = x.data,
            .out = out.data,
            .codes = nullptr,
            .scale = nullptr,
            .x_rows = rows(x),
            .residual_rows = rows(residual),
            .total_rows = rows(x),
            .out_rows = rows(out),
            .hidden = size_,
            .dtype = dtype_,
            .weight_dtype = *dtype_of(weight),
            .bias_dtype = bias ? *dtype_of(*bias) : DType::f32,
            .norm = Norm::layer,
            .eps = c_.eps,
            .weight_offset = 0.0f,
        },
        kTorchThreads);
  }

  HeadStrides in_rows(const Matrix& x) const { return {length_ * x.stride, across_ / c_.heads, x.stride}; }

  AttentionParams attention_params() const {
    AttentionParams p{};
    p.q = q_.data, p.k = k_.data, p.v = v_.data;
    p.out = attended_.data;
    p.workspace = attention_workspace_;
    p.q_strides = in_rows(q_), p.k_strides = in_rows(k_), p.v_strides = in_rows(v_);
    p.out_strides = in_rows(attended_);
    p.mask = mask_.data;
    p.mask_strides = {mask_.stride[0], mask_.stride[1], mask_.stride[2], mask_.stride[3]};
    p.mask_dtype = mask_.dtype;
    p.mask_is_bool = mask_.is_bool;
    p.batch = batch_, p.heads = p.kv_heads = c_.heads, p.queries = p.keys = length_;
    p.dim = p.value_dim = across_ / c_.heads;
    p.window_left = p.window_right = -1;
    p.dtype = dtype_;
    p.sm_scale = c_.sm_scale;
    return p;
  }

  const Call& c_;
  const DType dtype_;
  const int64_t batch_, length_, size_, rows_, across_;
  const Mask mask_;
  Products products_;
  Matrix codes_, q_, k_, v_, attended_, o_, h_, inner_, down_;
  char* attention_workspace_ = nullptr;
};

bool kernels_take(const Call& c) {
  for (const Linear* l : {&c.q, &c.k, &c.v, &c.o, &c.up, &c.down})
    if (!kernels_take(*l, c.hidden.scalar_type())) return false;
  const bool mask = !c.mask || c.mask->scalar_type() == ScalarType::Bool || dtype_of(*c.mask);
  return mask && kernel_types(c.hidden, c.attention_norm_bias, c.output_norm_bias) &&
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
  const Schemes schemes(scheme);
  STD_TORCH_CHECK(schemes.count() == 1 || schemes.count() == 6, kOp, ": scheme has ", schemes.count(),
                  " parts, expected 1 or 6");
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
  return EncoderLayer(call).run();
}

}  // namespace
}  // namespace llmkern

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  m.impl("encoder_layer", TORCH_BOX(&llmkern::encoder_layer));
}
