// A decoder layer: the launchers of its parts, one after the other in one piece of scratch memory.
//   norm → q, k, v → head norms → rope → cache → attention → o + residual → norm → gate, up → activation → down + sum
// Rounding to int8 happens where a row is made, not where it is read; a step of decoding copies nothing of the past.
#pragma once

#include <span>

#include "layer.h"
#include "llmkern/add.h"
#include "llmkern/attention_decode.h"
#include "llmkern/kv_cache.h"
#include "llmkern/rope.h"

namespace llmkern::decoder {

inline constexpr int64_t kDecodeQueries = 16;  // up to here attention_decode is faster than attention

using Optional = std::optional<Tensor>;

// An op's arguments that are the same for every layer.
struct Shared {
  Shared(const char* op, const Tensor& hidden, const Tensor& cos, const Tensor& sin, int64_t past, const Optional& mask,
         int64_t head_dim, double eps, double norm_offset, bool interleaved, double sm_scale, int64_t window,
         double softcap, const std::string& activation)
      : op(op),
        hidden(hidden.is_contiguous() ? hidden : torch::stable::contiguous(hidden)),
        cos(cos),
        sin(sin),
        past(past),
        mask(mask),
        head_dim(head_dim),
        eps(static_cast<float>(eps)),
        norm_offset(static_cast<float>(norm_offset)),
        interleaved(interleaved),
        sm_scale(static_cast<float>(sm_scale)),
        window(window),
        softcap(static_cast<float>(softcap)),
        activation(activation_of(activation)) {}

  const char* op;
  Tensor hidden;
  const Tensor &cos, &sin;
  int64_t past;
  const Optional& mask;
  int64_t head_dim;
  float eps, norm_offset;
  bool interleaved;
  float sm_scale;
  int64_t window;
  float softcap;
  std::optional<Activation> activation;
};

inline constexpr size_t kNorms = 4, kLinears = 7;
inline constexpr size_t kCaches = 4;  // k_cache, v_cache, k_cache_scale and v_cache_scale
inline constexpr size_t kParameters =
    kNorms + kLinears * 3;  // from input_norm to down_bias, as decoder_layer_ has them

// All arguments, for one layer.  The tensors stay where they are.
struct Call : Shared {
  Call(const Shared& shared, std::span<const Optional, kCaches> caches,
       std::span<const Optional, kParameters> parameters, const Schemes& schemes)
      : Shared(shared),
        k_cache(caches[0]),
        v_cache(caches[1]),
        k_cache_scale(caches[2]),
        v_cache_scale(caches[3]),
        input_norm(*parameters[0]),
        post_norm(*parameters[1]),
        q_norm(parameters[2]),
        k_norm(parameters[3]),
        q(linear("q", 0, parameters, schemes)),
        k(linear("k", 1, parameters, schemes)),
        v(linear("v", 2, parameters, schemes)),
        o(linear("o", 3, parameters, schemes)),
        gate(linear("gate", 4, parameters, schemes)),
        up(linear("up", 5, parameters, schemes)),
        down(linear("down", 6, parameters, schemes)) {}

  const Optional &k_cache, &v_cache, &k_cache_scale, &v_cache_scale;
  const Tensor &input_norm, &post_norm;
  const Optional &q_norm, &k_norm;
  Linear q, k, v, o, gate, up, down;

  std::array<const Linear*, kLinears> linears() const { return {&q, &k, &v, &o, &gate, &up, &down}; }

 private:
  static Linear linear(const char* name, size_t i, std::span<const Optional, kParameters> parameters,
                       const Schemes& schemes) {
    const auto parts = parameters.subspan(kNorms + 3 * i, 3);
    return {name, *parts[0], parts[1], parts[2], schemes.w8a8(i)};
  }
};

// Where a cache, or rows of projected keys or values, keeps its vectors.
inline HeadStrides strides_of(const Tensor& cache) {
  return {cache.stride(0), cache.stride(1), cache.stride(2)};
}

class DecoderLayer : Layer {
 public:
  DecoderLayer(const Call& call, const Threads& threads)
      : Layer(call.op, call.hidden, call.mask, call.q.n() / call.head_dim, call.k.n() / call.head_dim, call.head_dim,
              call.past + call.hidden.size(1), threads),
        c_(call),
        cached_(call.k_cache.has_value()),
        int8_cache_(call.k_cache_scale.has_value()) {}

  // From `in` to `out`, which may be the same.
  void run(const Matrix& in, const Matrix& out) {
    if (rows_ == 0 || size_ == 0) return;
    allocate([this](Scratch& scratch) { place(scratch); });
    attend(in);
    feed_forward(in, out);
  }

 private:
  Matrix numbers_or_codes(Scratch& scratch, int64_t columns, bool codes) {
    if (!codes) return matrix(scratch, columns);
    return {.codes = scratch.take<int8_t>(rows_ * columns), .scale = scratch.take<float>(rows_)};
  }

  void place(Scratch& scratch) {
    const int64_t q = c_.q.n(), kv = c_.k.n(), inner = c_.gate.n();
    products_.set_workspace(scratch.take(products_.workspace_bytes({c_.q, c_.k, c_.v, c_.o, c_.gate, c_.up, c_.down})));
    x_ = numbers_or_codes(scratch, size_, products_.takes_codes({c_.q, c_.k, c_.v}));
    q_ = matrix(scratch, q), k_ = matrix(scratch, kv), v_ = matrix(scratch, kv);
    attended_ = matrix(scratch, q);
    total_ = matrix(scratch, size_);
    normed_ = numbers_or_codes(scratch, size_, products_.takes_codes({c_.gate, c_.up}));
    gate_ = matrix(scratch, inner), up_ = matrix(scratch, inner);
    inner_ = products_.takes_codes({c_.down}) ? numbers_or_codes(scratch, inner, true) : gate_;
    if (reads_codes()) {
      read_k_ = scratch.take(batch_ * kv_heads_ * keys_ * dim_ * element_bytes());
      read_v_ = scratch.take(batch_ * kv_heads_ * keys_ * dim_ * element_bytes());
    }
    attention_workspace_ = scratch.take(decodes() ? attention_decode_workspace_bytes(decode_params())
                                                  : attention_workspace_bytes(attention_params()));
  }

  void attend(const Matrix& in) {
    norm(norm_params(in, c_.input_norm, x_));
    products_(x_, {c_.q, c_.k, c_.v}, {&q_, &k_, &v_});
    if (c_.q_norm) head_norm(q_, *c_.q_norm, heads_);
    if (c_.k_norm) head_norm(k_, *c_.k_norm, kv_heads_);
    rotate();
    if (cached_) {
      if (int8_cache_) append(k_, c_.k_cache, c_.k_cache_scale);  // else the rotation has put the keys there
      append(v_, c_.v_cache, c_.v_cache_scale);
    }
    if (decodes()) {
      launch_attention_decode(decode_params(), threads_);
    } else {
      if (reads_codes()) {
        read(c_.k_cache, c_.k_cache_scale, read_k_);
        read(c_.v_cache, c_.v_cache_scale, read_v_);
      }
      launch_attention(attention_params(), threads_);
    }
  }

  void feed_forward(const Matrix& in, const Matrix& out) {
    if (products_.native(c_.o)) {
      products_.add(attended_, c_.o, in, total_);
      norm(norm_params(total_, c_.post_norm, normed_));
    } else {
      NormParams p = norm_params(products_.dense(attended_, c_.o), c_.post_norm, normed_);
      add_first(p, in, total_);
      norm(p);
    }
    products_(normed_, {c_.gate, c_.up}, {&gate_, &up_});
    if (!inner_.codes) inner_ = gate_;  // which torch's operator may have moved
    activate(*c_.activation, gate_, &up_, inner_, c_.gate.n());
    if (products_.native(c_.down)) {
      products_.add(inner_, c_.down, total_, out);
    } else {
      const Matrix down = products_.dense(inner_, c_.down);
      launch_add({down.data, total_.data, out.data, rows_ * size_, dtype_}, threads_);
    }
  }

  void norm(NormParams p) const {
    p.eps = c_.eps;
    p.weight_offset = c_.norm_offset;
    launch_norm(p, threads_);
  }

  // Of every head, in place.
  void head_norm(const Matrix& x, const Tensor& weight, int64_t heads) const {
    NormParams p = norm_params(x, weight, x);
    p.x_rows = p.out_rows = {.count = rows_ * heads, .size2 = heads, .stride0 = x.stride, .stride2 = dim_};
    p.hidden = dim_;
    norm(p);
  }

  // The first of the new tokens in a cache of `bytes` for each element.
  void* at_new(const Tensor& cache, int64_t bytes) const {
    return static_cast<char*>(const_cast<void*>(cache.const_data_ptr())) + c_.past * cache.stride(2) * bytes;
  }

  // Queries in place, keys to the cache where it takes them as they are.
  void rotate() {
    const bool to_cache = cached_ && !int8_cache_;
    const auto angles = [](const Tensor& t) {
      return RopeAngles{t.const_data_ptr(), t.size(0) == 1 ? 0 : t.stride(0), t.stride(1)};
    };
    launch_rope(
        {
            .q = {q_.data, q_.data, heads_, in_rows(q_), in_rows(q_)},
            .k = {k_.data, to_cache ? at_new(*c_.k_cache, element_bytes()) : k_.data, kv_heads_, in_rows(k_),
                  to_cache ? strides_of(*c_.k_cache) : in_rows(k_)},
            .cos = angles(c_.cos),
            .sin = angles(c_.sin),
            .batch = batch_,
            .length = length_,
            .dim = dim_,
            .rotary_dim = c_.cos.size(2),
            .width = c_.cos.size(2),
            .dtype = dtype_,
            .angles_dtype = *dtype_of(c_.cos),
            .interleaved = c_.interleaved,
        },
        threads_);
  }

  void append(const Matrix& x, const Optional& cache, const Optional& scale) {
    launch_kv_append(
        {
            .x = x.data,
            .cache = at_new(*cache, scale ? 1 : element_bytes()),
            .scale = scale ? static_cast<float*>(at_new(*scale, sizeof(float))) : nullptr,
            .x_strides = in_rows(x),
            .cache_strides = strides_of(*cache),
            .scale_strides = scale ? strides_of(*scale) : HeadStrides{},
            .batch = batch_,
            .heads = kv_heads_,
            .length = length_,
            .dim = dim_,
            .dtype = dtype_,
        },
        threads_);
  }

  void read(const Optional& cache, const Optional& scale, char* to) {
    launch_kv_read(
        {
            .x = to,
            .cache = const_cast<void*>(cache->const_data_ptr()),
            .scale = static_cast<float*>(const_cast<void*>(scale->const_data_ptr())),
            .x_strides = read_strides(),
            .cache_strides = strides_of(*cache),
            .scale_strides = strides_of(*scale),
            .batch = batch_,
            .heads = kv_heads_,
            .length = keys_,
            .dim = dim_,
            .dtype = dtype_,
        },
        threads_);
  }

  // A few queries and no mask: the kernel that splits the keys among the threads and reads int8 caches as they are.
  bool decodes() const { return cached_ && c_.past > 0 && mask_.data == nullptr && length_ <= kDecodeQueries; }

  // Without a past the tokens see one another as they were projected, rounded by no int8 cache.
  bool reads_codes() const { return int8_cache_ && c_.past > 0 && !decodes(); }

  HeadStrides read_strides() const { return {kv_heads_ * keys_ * dim_, keys_ * dim_, dim_}; }

  int64_t window_left() const { return c_.window < 0 || mask_.data ? -1 : c_.window - 1; }

  AttentionDecodeParams decode_params() const {
    AttentionDecodeParams p{};
    p.q = q_.data;
    p.k_cache = c_.k_cache->const_data_ptr();
    p.v_cache = c_.v_cache->const_data_ptr();
    if (int8_cache_) {
      p.k_scale = static_cast<const float*>(c_.k_cache_scale->const_data_ptr());
      p.v_scale = static_cast<const float*>(c_.v_cache_scale->const_data_ptr());
      p.k_scale_strides = strides_of(*c_.k_cache_scale);
      p.v_scale_strides = strides_of(*c_.v_cache_scale);
    }
    p.out = attended_.data;
    p.workspace = attention_workspace_;
    p.q_strides = in_rows(q_);
    p.k_strides = strides_of(*c_.k_cache);
    p.v_strides = strides_of(*c_.v_cache);
    p.out_strides = in_rows(attended_);
    p.batch = batch_, p.heads = heads_, p.kv_heads = kv_heads_, p.queries = length_;
    p.dim = p.value_dim = dim_;
    p.slots = keys_;
    p.window_left = window_left();
    p.dtype = dtype_;
    p.sm_scale = c_.sm_scale;
    p.softcap = c_.softcap;
    return p;
  }

  AttentionParams attention_params() const {
    AttentionParams p = Layer::attention_params(q_, k_, v_, attended_, c_.sm_scale);
    if (reads_codes()) {
      p.k = read_k_, p.v = read_v_;
      p.k_strides = p.v_strides = read_strides();
    } else if (cached_ && !int8_cache_) {
      p.k = c_.k_cache->const_data_ptr(), p.v = c_.v_cache->const_data_ptr();
      p.k_strides = strides_of(*c_.k_cache), p.v_strides = strides_of(*c_.v_cache);
    }
    p.window_left = window_left();
    p.causal = mask_.data == nullptr;
    p.softcap = c_.softcap;
    return p;
  }

  const Call& c_;
  const bool cached_, int8_cache_;
  Matrix x_, q_, k_, v_, attended_, total_, normed_, gate_, up_, inner_;
  char *read_k_ = nullptr, *read_v_ = nullptr;
};

// Whether the kernels have the activation and the types of everything that the call brings.
inline bool kernels_take(const Call& c) {
  if (!c.activation) return false;
  const ScalarType type = c.hidden.scalar_type();
  for (const Linear* l : c.linears())
    if (!llmkern::kernels_take(*l, type)) return false;
  const bool cache = !c.k_cache || (c.k_cache->scalar_type() == (c.k_cache_scale ? ScalarType::Char : type) &&
                                    c.v_cache->scalar_type() == c.k_cache->scalar_type());
  return cache && kernels_take_mask(c.mask) && kernel_types(c.hidden, Optional(c.cos), c.q_norm, c.k_norm) &&
         kernel_types(c.input_norm, Optional(c.post_norm)) && c.cos.scalar_type() == c.sin.scalar_type();
}

inline void check(const Call& c) {
  const char* const op = c.op;
  STD_TORCH_CHECK(c.hidden.dim() == 3, op, ": hidden must have shape [B, S, H]");
  const int64_t batch = c.hidden.size(0), length = c.hidden.size(1), size = c.hidden.size(2), dim = c.head_dim;
  STD_TORCH_CHECK(dim > 0 && dim <= kMaxHeadDim && c.q.weight.dim() == 2 && c.k.weight.dim() == 2 &&
                      c.q.n() % dim == 0 && c.k.n() >= dim && c.k.n() % dim == 0 && c.q.n() % c.k.n() == 0,
                  op, ": head_dim must be at most ", kMaxHeadDim, " and divide the rows of q_weight and k_weight");
  const int64_t inner = c.gate.weight.dim() == 2 ? c.gate.n() : 0;
  check_linear(op, c.q, c.q.n(), size);
  check_linear(op, c.k, c.k.n(), size);
  check_linear(op, c.v, c.k.n(), size);
  check_linear(op, c.o, size, c.q.n());
  check_linear(op, c.gate, inner, size);
  check_linear(op, c.up, inner, size);
  check_linear(op, c.down, size, inner);
  check_vector(op, "input_norm", c.input_norm, size);
  check_vector(op, "post_norm", c.post_norm, size);
  if (c.q_norm) check_vector(op, "q_norm", *c.q_norm, dim);
  if (c.k_norm) check_vector(op, "k_norm", *c.k_norm, dim);
  for (const Tensor* t : {&c.cos, &c.sin})
    STD_TORCH_CHECK(t->dim() == 3 && (t->size(0) == 1 || t->size(0) == batch) && t->size(1) == length &&
                        t->size(2) == c.cos.size(2) && t->size(2) <= dim && t->size(2) % 2 == 0 && t->stride(2) == 1 &&
                        t->is_cpu(),
                    op, ": cos and sin must have shape [", batch, " or 1, ", length, ", W] with rows contiguous");
  STD_TORCH_CHECK(c.past >= 0 && (c.k_cache || c.past == 0), op, ": past must be 0 where there is no cache");
  STD_TORCH_CHECK(c.k_cache.has_value() == c.v_cache.has_value() &&
                      c.k_cache_scale.has_value() == c.v_cache_scale.has_value() && (c.k_cache || !c.k_cache_scale),
                  op, ": keys and values must both have a cache, with a scale or without");
  for (const Optional* cache : {&c.k_cache, &c.v_cache})
    STD_TORCH_CHECK(!*cache || ((*cache)->dim() == 4 && (*cache)->size(0) == batch &&
                                (*cache)->size(1) == c.k.n() / dim && (*cache)->size(2) >= c.past + length &&
                                (*cache)->size(3) == dim && (*cache)->stride(3) == 1 && (*cache)->is_cpu()),
                    op, ": caches must have shape [B, Hkv, at least ", c.past + length, ", D], on the CPU");
  for (const Optional* scale : {&c.k_cache_scale, &c.v_cache_scale})
    STD_TORCH_CHECK(!*scale || ((*scale)->dim() == 3 && (*scale)->size(0) == batch &&
                                (*scale)->size(1) == c.k.n() / dim && (*scale)->size(2) >= c.past + length &&
                                (*scale)->scalar_type() == ScalarType::Float && (*scale)->is_cpu()),
                    op, ": scales of a cache must be fp32 [B, Hkv, at least ", c.past + length, "], on the CPU");
}

// From the first layer's hidden to `out`, through one layer after the other.
inline void run(std::span<const Call> layers, Tensor& out) {
  const Tensor& hidden = layers[0].hidden;
  const int64_t size = hidden.size(2);
  const Matrix result{.data = out.mutable_data_ptr(), .stride = size};
  Matrix in{.data = const_cast<void*>(hidden.const_data_ptr()), .stride = size};
  const int64_t tokens = hidden.size(0) * hidden.size(1);
  const bool native = std::all_of(layers.begin(), layers.end(),
                                  [tokens](const Call& call) { return are_native(call.linears(), tokens); });
  with_threads(native, [&](const Threads& threads) {
    for (const Call& call : layers) {
      DecoderLayer(call, threads).run(in, result);
      in = result;
    }
  });
}

}  // namespace llmkern::decoder
