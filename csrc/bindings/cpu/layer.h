// What the bindings of whole layers share: scratch memory, linear layers of any kind of weight and number of rows, and
// the parts that every kind of layer has.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "../../cpu/layers/team.h"
#include "../common.h"
#include "llmkern/activate.h"
#include "llmkern/attention.h"
#include "llmkern/linear.h"
#include "llmkern/norm.h"
#include "threads.h"

namespace llmkern {

// With a floating-point weight and without instructions that multiply pairs of it, more rows than these are multiplied
// by torch's own operator (oneDNN, MKL), which then reads the weight about as fast and multiplies faster.
inline constexpr int64_t kFewRows = 16;

// A linear layer, as an op's arguments <name>_weight, <name>_scale and <name>_bias.
struct Linear {
  const char* name;
  const Tensor& weight;
  const std::optional<Tensor>& scale;
  const std::optional<Tensor>& bias;
  bool w8a8;  // of an int8 weight: is its input rounded to int8 as well?

  int64_t n() const { return weight.size(0); }
  int64_t k() const { return weight.size(1); }
  bool int8() const { return scale.has_value(); }
  WeightType type() const {
    if (int8()) return WeightType::s8;
    return weight.scalar_type() == ScalarType::Float      ? WeightType::f32
           : weight.scalar_type() == ScalarType::BFloat16 ? WeightType::bf16
                                                          : WeightType::f16;
  }
  bool takes_codes() const { return w8a8 && int8(); }
};

inline std::vector<std::string> parts_of(const std::string& list, char separator) {
  std::vector<std::string> parts;
  for (size_t begin = 0, end; begin <= list.size(); begin = end + 1) {
    end = std::min(list.find(separator, begin), list.size());
    parts.push_back(list.substr(begin, end - begin));
  }
  return parts;
}

// A layer's argument `scheme`, "w8a8" or "w8a16": one for all of its linear layers, or one for each, with commas.
class Schemes {
 public:
  Schemes(const char* op, const std::string& schemes, size_t layers) {
    for (const std::string& part : parts_of(schemes, ',')) w8a8_.push_back(part == "w8a8");
    STD_TORCH_CHECK(w8a8_.size() == 1 || w8a8_.size() == layers, op, ": scheme has ", w8a8_.size(),
                    " parts, expected 1 or ", layers);
  }

  // Of the i-th linear layer in the order of the op's arguments.
  bool w8a8(size_t i) const { return w8a8_[w8a8_.size() == 1 ? 0 : i]; }

 private:
  std::vector<bool> w8a8_;
};

// Is this a layer for the launchers: a weight in `dtype` or int8 codes, and a bias in `dtype`?
inline bool kernels_take(const Linear& l, ScalarType dtype) {
  const bool weight = l.int8()
                          ? l.weight.scalar_type() == ScalarType::Char && l.scale->scalar_type() == ScalarType::Float
                          : l.weight.scalar_type() == dtype;
  return weight && (!l.bias || l.bias->scalar_type() == dtype);
}

// Checks what would be read: `l` maps k numbers to n.
inline void check_linear(const char* op, const Linear& l, int64_t n, int64_t k) {
  const bool sizes = l.weight.dim() == 2 && l.weight.size(0) == n && l.weight.size(1) == k;
  STD_TORCH_CHECK(sizes && l.weight.is_cpu() && (l.weight.stride(1) == 1 || k <= 1), op, ": ", l.name,
                  "_weight must have contiguous rows and shape [", n, ", ", k, "], on the CPU");
  STD_TORCH_CHECK(!l.scale || (l.scale->numel() == n && l.scale->is_contiguous() && l.scale->is_cpu()), op, ": ",
                  l.name, "_scale must be contiguous with ", n, " elements, on the CPU");
  STD_TORCH_CHECK(!l.bias || (l.bias->numel() == n && l.bias->is_contiguous() && l.bias->is_cpu()), op, ": ", l.name,
                  "_bias must be contiguous with ", n, " elements, on the CPU");
}

inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t n) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n && t.is_contiguous() && t.is_cpu(), op, ": ", name,
                  " must be contiguous with shape [", n, "], on the CPU");
}

// A mask [B, heads, queries, keys] by its strides, 0 where it is broadcast.
struct Mask {
  const void* data = nullptr;
  int64_t stride[4] = {};
  DType dtype = DType::f32;
  bool is_bool = false;
};

inline bool kernels_take_mask(const std::optional<Tensor>& mask) {
  return !mask || mask->scalar_type() == ScalarType::Bool || dtype_of(*mask);
}

inline Mask mask_of(const char* op, const std::optional<Tensor>& mask, const int64_t (&full)[4]) {
  if (!mask) return {};
  STD_TORCH_CHECK(mask->dim() == 4 && mask->is_cpu(), op, ": mask must have 4 dimensions, on the CPU");
  Mask out{.data = mask->const_data_ptr(), .is_bool = mask->scalar_type() == ScalarType::Bool};
  if (!out.is_bool) out.dtype = *dtype_of(*mask);
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(mask->size(d) == 1 || mask->size(d) == full[d], op, ": mask must broadcast to [B, heads, S, keys]");
    out.stride[d] = mask->size(d) == 1 ? 0 : mask->stride(d);
  }
  return out;
}

// Pieces of one block of memory.  Without a block it only counts: the same calls give the size and then the pieces.
class Scratch {
 public:
  explicit Scratch(char* block = nullptr) : block_(block) {}

  template <class T = char>
  T* take(int64_t count) {
    char* piece = block_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(block_ ? piece : nullptr);
  }

  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

// Memory for a layer's scratch, kept for the next layer: the system would take every large block back and clear the
// pages of the next one, which takes as long as the products do.
class KeptMemory {
 public:
  char* at_least(int64_t bytes) {
    if (bytes > bytes_ || bytes_ > kMostKept) {
      memory_.reset();
      bytes_ = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, bytes_)));
      STD_TORCH_CHECK(memory_ || bytes == 0, "there is no memory for ", bytes,
                      " bytes of a layer's intermediate results");
    }
    return memory_.get();
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kMostKept = int64_t{256} << 20;  // a larger block is freed by the next call

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };

  std::unique_ptr<char, Free> memory_;
  int64_t bytes_ = 0;
};

inline KeptMemory& kept_memory() {
  thread_local KeptMemory memory;
  return memory;
}

// Rows of numbers, `stride` elements apart, or their int8 codes (contiguous) with a scale for each row.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
  int8_t* codes = nullptr;
  float* scale = nullptr;
};

// Is this layer, of so many rows, multiplied by launch_linear?
inline bool is_native(const Linear& l, int64_t rows) {
  return l.int8() || rows <= kFewRows || linear_takes_many_rows(l.type()) || linear_keeps_rows_alone();
}

template <class Linears>
bool are_native(const Linears& linears, int64_t rows) {
  return std::all_of(linears.begin(), linears.end(), [rows](const Linear* l) { return is_native(*l, rows); });
}

// f(threads) with the threads for the launchers: a team, unless torch's operators need them for layers that are not
// `native`.
template <class F>
void with_threads(bool native, const F& f) {
  native ? Team::lead(kTorchThreads, torch::stable::get_num_threads(), f) : f(kTorchThreads);
}

// The linear layers of one call.
class Products {
 public:
  Products(const Tensor& like, int64_t rows, const Threads& threads)
      : like_(like), dtype_(*dtype_of(like)), rows_(rows), threads_(threads) {}

  // Is this layer multiplied by launch_linear?
  bool native(const Linear& l) const { return is_native(l, rows_); }

  // Does every one of these layers round its input to codes, so that whoever makes the input may do it?
  bool takes_codes(std::initializer_list<Linear> layers) const {
    for (const Linear& l : layers)
      if (!l.takes_codes()) return false;
    return true;
  }

  int64_t workspace_bytes(std::initializer_list<Linear> layers) const {
    int64_t most = 0;
    for (const Linear& l : layers)
      if (native(l)) most = std::max(most, linear_workspace_bytes(rows_, l.k(), l.takes_codes()));
    return most;
  }

  void set_workspace(char* workspace) { workspace_ = workspace; }

  // out[i] = activation(x · layers[i]ᵀ + bias).  Where torch multiplies, out[i] is pointed at its result, and nothing
  // is activated.
  void operator()(const Matrix& x, std::initializer_list<Linear> layers, std::initializer_list<Matrix*> outs,
                  Activation activation = Activation::none) {
    auto out = outs.begin();
    LinearParams p;
    p.segments = 0;
    for (const Linear& l : layers) {
      if (!native(l)) {
        **out = dense(x, l);
      } else {
        if (p.segments && (p.weight_type != l.type() || p.w8a8 != l.takes_codes())) launch(p);
        if (p.segments == 0) p = params(x, l);
        p.segment[p.segments] = segment(l, **out);
        p.segment[p.segments++].activation = activation;
      }
      ++out;
    }
    if (p.segments) launch(p);
  }

  // out = x · lᵀ + bias + residual, for a layer that is `native`.
  void add(const Matrix& x, const Linear& l, const Matrix& residual, const Matrix& out) {
    LinearParams p = params(x, l);
    p.segment[0] = segment(l, out);
    p.segment[0].residual = residual.data;
    p.segment[0].residual_stride = residual.stride;
    p.segments = 1;
    launch(p);
  }

  // x · lᵀ + bias by torch's operator; x has numbers.
  Matrix dense(const Matrix& x, const Linear& l) {
    const Tensor in =
        torch::stable::from_blob(x.data, {rows_, l.k()}, {x.stride, 1}, like_.device(), like_.scalar_type());
    std::array<StableIValue, 3> stack{torch::stable::detail::from(in), torch::stable::detail::from(l.weight),
                                      torch::stable::detail::from(l.bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    results_.push_back(torch::stable::detail::to<Tensor>(stack[0]));
    return {.data = results_.back().mutable_data_ptr(), .stride = l.n()};
  }

 private:
  LinearParams params(const Matrix& x, const Linear& l) const {
    LinearParams p;
    p.x = x.codes ? nullptr : x.data;
    p.x_q = x.codes;
    p.x_scale = x.scale;
    p.workspace = workspace_;
    p.segments = 0;
    p.rows = {.count = rows_, .stride0 = x.codes ? l.k() : x.stride};
    p.k = l.k();
    p.weight_type = l.type();
    p.dtype = p.out_dtype = p.bias_dtype = p.residual_dtype = dtype_;
    p.w8a8 = l.takes_codes();
    return p;
  }

  static LinearSegment segment(const Linear& l, const Matrix& out) {
    return {
        .w = l.weight.const_data_ptr(),
        .w_scale = l.scale ? static_cast<const float*>(l.scale->const_data_ptr()) : nullptr,
        .bias = l.bias ? l.bias->const_data_ptr() : nullptr,
        .out = out.data,
        .n = l.n(),
        .w_stride = l.weight.stride(0),
        .out_stride = out.stride,
    };
  }

  void launch(LinearParams& p) const {
    launch_linear(p, threads_);
    p.segments = 0;
  }

  const Tensor& like_;
  DType dtype_;
  int64_t rows_;
  const Threads& threads_;
  char* workspace_ = nullptr;
  std::vector<Tensor> results_;  // of torch's operator, kept until the layer is done
};

// The parts of a layer of any kind, over the rows of hidden [B, S, H].
class Layer {
 protected:
  Layer(const char* op, const Tensor& hidden, const std::optional<Tensor>& mask, int64_t heads, int64_t kv_heads,
        int64_t dim, int64_t keys, const Threads& threads)
      : hidden_(hidden),
        threads_(threads),
        dtype_(*dtype_of(hidden)),
        batch_(hidden.size(0)),
        length_(hidden.size(1)),
        size_(hidden.size(2)),
        rows_(batch_ * length_),
        heads_(heads),
        kv_heads_(kv_heads),
        dim_(dim),
        keys_(keys),
        mask_(mask_of(op, mask, {batch_, heads, length_, keys})),
        products_(hidden, rows_, threads) {}

  int64_t element_bytes() const { return dtype_ == DType::f32 ? 4 : 2; }

  Matrix input() const { return {.data = const_cast<void*>(hidden_.const_data_ptr()), .stride = size_}; }

  Matrix matrix(Scratch& scratch, int64_t columns) const {
    return {.data = scratch.take(rows_ * columns * element_bytes()), .stride = columns};
  }

  // Calls place(scratch), which takes what the layer needs: to count, and then for good.
  template <class Place>
  void allocate(const Place& place) {
    Scratch counted;
    place(counted);
    Scratch scratch(kept_memory().at_least(counted.used()));
    place(scratch);
  }

  Rows rows(const Matrix& x) const { return {.count = rows_, .stride0 = x.stride}; }

  // Heads of a matrix [B * S, heads * dim].
  HeadStrides in_rows(const Matrix& x) const { return {length_ * x.stride, dim_, x.stride}; }

  // out = rms_norm(x); a caller adds what its norms have besides.
  NormParams norm_params(const Matrix& x, const Tensor& weight, const Matrix& out) const {
    NormParams p{};
    p.x = x.data, p.weight = weight.const_data_ptr();
    p.out = out.data, p.codes = out.codes, p.scale = out.scale;
    p.x_rows = rows(x), p.out_rows = rows(out);
    p.hidden = size_;
    p.dtype = dtype_, p.weight_dtype = *dtype_of(weight);
    p.norm = Norm::rms;
    return p;
  }

  // The norm is of x + residual, which goes to total.
  void add_first(NormParams& p, const Matrix& residual, const Matrix& total) const {
    p.residual = residual.data, p.residual_rows = rows(residual);
    p.total = total.data, p.total_rows = rows(total);
  }

  // out = activation(x), times up where there is one; as numbers, or as codes where out has them.
  void activate(Activation activation, const Matrix& x, const Matrix* up, const Matrix& out, int64_t columns) const {
    launch_activate(
        {
            .x = x.data,
            .up = up ? up->data : nullptr,
            .out = out.data,
            .codes = out.codes,
            .scale = out.scale,
            .x_rows = rows(x),
            .up_rows = up ? rows(*up) : Rows{},
            .out_rows = rows(out),
            .hidden = columns,
            .dtype = dtype_,
            .activation = activation,
        },
        threads_);
  }

  // Of rows of projected queries, keys and values.
  AttentionParams attention_params(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& out,
                                   float sm_scale) const {
    AttentionParams p{};
    p.q = q.data, p.k = k.data, p.v = v.data, p.out = out.data;
    p.q_strides = in_rows(q), p.k_strides = in_rows(k), p.v_strides = in_rows(v), p.out_strides = in_rows(out);
    p.workspace = attention_workspace_;
    p.mask = mask_.data;
    p.mask_strides = {mask_.stride[0], mask_.stride[1], mask_.stride[2], mask_.stride[3]};
    p.mask_dtype = mask_.dtype;
    p.mask_is_bool = mask_.is_bool;
    p.batch = batch_, p.heads = heads_, p.kv_heads = kv_heads_, p.queries = length_, p.keys = keys_;
    p.dim = p.value_dim = dim_;
    p.window_left = p.window_right = -1;
    p.dtype = dtype_;
    p.sm_scale = sm_scale;
    return p;
  }

  const Tensor& hidden_;
  const Threads& threads_;
  const DType dtype_;
  const int64_t batch_, length_, size_, rows_, heads_, kv_heads_, dim_, keys_;
  const Mask mask_;
  Products products_;
  char* attention_workspace_ = nullptr;
};

}  // namespace llmkern
