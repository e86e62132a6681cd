// The launchers of a layer's steps, one after the other.
#include <algorithm>
#include <cstring>
#include <deque>

#include "layer.h"
#include "llmkern/activate.h"
#include "llmkern/add.h"
#include "llmkern/kv_cache.h"
#include "llmkern/rope.h"
#include "llmkern/turned_linear.h"
#include "team.h"

namespace llmkern::layers {
namespace {

HeadStrides strides_of(const Array& cache) {
  return {cache.stride[0], cache.stride[1], cache.stride[2]};
}

// Token `position` of a cache whose elements have `bytes`.
void* at_token(const Array& cache, int64_t position, int64_t bytes) {
  return static_cast<char*>(cache.data) + position * cache.stride[2] * bytes;
}

}  // namespace

void Layer::run(size_t index, std::span<const Array> parameters, char* scratch, void* in, void* out,
                const Threads& threads) {
  if (batch_ * length_ == 0 || size_ == 0) return;
  index_ = index;
  parameters_ = parameters, caches_ = caches_of(call_, index);
  block_ = scratch;
  threads_ = &threads;
  for (Weight& weight : weights_) point(weight);
  point_values(in, out);
  for (size_t i = 0; i < program_.steps.size(); ++i)
    if (!skipped_[i]) run_step(i);
  const Matrix& result = values_[program_.result].at;
  if (result.data != out) std::memcpy(out, result.data, batch_ * length_ * size_ * element_bytes());
  call_.library.release(call_.library.context);
}

void Layer::point_values(void* in, void* out) {
  values_[0].at = {.data = in, .stride = size_};
  for (size_t i = 1; i < values_.size(); ++i) {
    Value& v = values_[i];
    if (v.array) continue;
    v.at = {.stride = v.columns};
    v.product = {};
    if (is_out(static_cast<int>(i))) {
      v.at.data = out;
    } else if (v.is_codes) {
      v.at.codes = reinterpret_cast<int8_t*>(block_ + v.offset);
      v.at.scale = reinterpret_cast<float*>(block_ + v.offset + codes_bytes(v));
    } else if (v.offset >= 0) {
      v.at.data = block_ + v.offset;
    }
  }
}

void Layer::run_step(size_t index) {
  const Step& step = program_.steps[index];
  for (const int result : step.results)  // of a product of the library's, that is where the library has put it
    if (values_[result].stolen_from != kNone) values_[result].at = values_[values_[result].stolen_from].at;
  switch (step.op) {
    case Op::rms_norm:
    case Op::layer_norm:
      return run_norm(step);
    case Op::linear:
      return run_linear(index);
    case Op::route:
      return run_route(index);
    case Op::experts:
      return run_experts(index);
    case Op::rope:
      return run_rope(step);
    case Op::append:
      return run_append(step);
    case Op::keep:
      return run_keep(step);
    case Op::attention:
      return run_attention(index);
    default:
      return run_elementwise(step);
  }
}

void Layer::run_norm(const Step& step) {
  const Value &x = values_[step.values[0]], &made = values_[step.results[0]];
  const Place& place = step.places[0];
  const Array& weight = tensor(place, 0);
  const Array bias = program_.parameters[place.parameter].tensors() > 1 ? tensor(place, 1) : Array{};
  const int64_t dim = step.dim ? step.dim : x.columns, heads = x.columns / dim;
  const bool pending = x.product.data != nullptr;
  NormParams p{};
  p.x = pending ? x.product.data : x.at.data;
  p.x_rows = rows_of(x, pending ? x.product : x.at), p.out_rows = rows_of(made, made.at);
  if (step.dim) {
    p.x_rows = {.count = rows(x) * heads, .size2 = heads, .stride0 = x.at.stride, .stride2 = dim};
    p.out_rows = {.count = rows(x) * heads, .size2 = heads, .stride0 = made.at.stride, .stride2 = dim};
  }
  if (pending || step.adds) {
    const Value& residual = values_[pending ? x.residual : step.values[1]];
    const Matrix& total = pending ? x.at : values_[step.results[1]].at;
    p.residual = residual.at.data, p.residual_rows = rows_of(residual, residual.at);
    p.total = total.data, p.total_rows = rows_of(x, total);
  }
  p.weight = weight ? weight.data : nullptr;
  p.bias = bias ? bias.data : nullptr;
  p.out = made.at.data, p.codes = made.at.codes, p.scale = made.at.scale;
  p.hidden = dim;
  p.dtype = dtype_;
  p.weight_dtype = weight ? weight.dtype() : DType::f32, p.bias_dtype = bias ? bias.dtype() : DType::f32;
  p.norm = step.op == Op::rms_norm ? Norm::rms : Norm::layer;
  p.eps = static_cast<float>(step.eps);
  p.weight_offset = static_cast<float>(step.offset);
  launch_norm(p, *threads_);
}

// outs[j] = x · weights[j]ᵀ + bias, and its epilogue, of `count` rows.  What the library multiplies lies where the
// library has put it.
void Layer::multiply(const Matrix& x, int64_t count, std::span<const Weight> weights, std::span<Matrix> outs,
                     const Epilogue* epilogues, char* workspace, char* whole) {
  std::vector<Matrix> wholes(outs.size());
  LinearParams p;
  p.segments = 0;
  const auto launch = [&] {
    if (p.segments) launch_linear(p, *threads_);
    p.segments = 0;
  };
  for (size_t j = 0; j < outs.size(); ++j) {
    const Weight& w = weights[j];
    if (w.period) {
      if (first_of_whole(weights, j) != j) continue;
      wholes[j] = {.data = whole, .stride = w.n};
      whole += padded_bytes(count * w.n);
    }
    Matrix& out = w.period ? wholes[j] : outs[j];
    if (!is_native(w, count)) {
      const int64_t row = w.turned ? 1 : w.stride, column = w.turned ? w.stride : 1;
      const Product product{x.data, w.w, w.bias, count, w.n, w.k, x.stride, row, column, dtype_};
      out = {.data = call_.library.multiply(call_.library.context, product), .stride = w.n};
      continue;
    }
    if (w.turned) {
      launch_turned_linear({x.data, w.w, w.bias, out.data, count, w.n, w.k, x.stride, w.stride, out.stride, dtype_},
                           *threads_);
      continue;
    }
    const DType out_dtype = w.wide ? DType::f32 : dtype_;
    if (p.segments == 3 || (p.segments && (p.weight_type != w.type || p.w8a8 != w.w8a8 || p.out_dtype != out_dtype)))
      launch();
    if (p.segments == 0) {
      p.x = x.codes ? nullptr : x.data;
      p.x_q = x.codes;
      p.x_scale = x.scale;
      p.workspace = workspace;
      p.rows = {.count = count, .stride0 = x.codes ? w.k : x.stride};
      p.k = w.k;
      p.weight_type = w.type;
      p.dtype = p.bias_dtype = p.residual_dtype = dtype_;
      p.out_dtype = out_dtype;
      p.w8a8 = w.w8a8;
    }
    p.segment[p.segments++] = {
        .w = w.w,
        .w_scale = w.scale,
        .bias = w.bias,
        .residual = epilogues[j].residual.data,
        .out = out.data,
        .n = w.n,
        .w_stride = w.stride,
        .residual_stride = epilogues[j].residual.stride,
        .out_stride = out.stride,
        .activation = epilogues[j].activation,
        .multiplier = epilogues[j].multiplier,
        .packed = w.packed,
    };
  }
  launch();
  for (size_t j = 0; j < outs.size(); ++j)
    if (weights[j].period) take_rows(weights[j], wholes[first_of_whole(weights, j)], outs[j], count);
}

// Return the epilogue of a product's launcher.
Layer::Epilogue Layer::epilogue(size_t index, size_t place) const {
  if (!fuses(index, place)) return {};
  const Step& step = program_.steps[index];
  if (step.residual == kNone) return {.activation = step.activation};
  return {step.activation, values_[step.residual].at, static_cast<float>(step.multiplier)};
}

// Select the columns that the rows of a period produced, in `count` rows.
void Layer::take_rows(const Weight& weight, const Matrix& whole, const Matrix& out, int64_t count) {
  launch_kv_append(
      {
          .x = static_cast<char*>(whole.data) + weight.from * element_bytes(),
          .cache = out.data,
          .scale = nullptr,
          .x_strides = {0, weight.period, whole.stride},
          .cache_strides = {0, weight.width, out.stride},
          .scale_strides = {},
          .batch = 1,
          .heads = weight.n / weight.period,
          .length = count,
          .dim = weight.width,
          .dtype = dtype_,
      },
      *threads_);
}

void Layer::run_linear(size_t index) {
  const Step& step = program_.steps[index];
  const StepScratch& scratch = scratch_[index];
  std::vector<Matrix> products;
  for (const int result : step.results) products.push_back(values_[result].at);
  const Value& made = values_[step.results[0]];
  if (waits(index)) products[0] = {.data = at(scratch.gate), .stride = made.columns};
  if (step.gated) products.push_back({.data = at(scratch.up), .stride = made.columns});
  std::vector<Epilogue> epilogues;
  for (size_t j = 0; j < products.size(); ++j) epilogues.push_back(epilogue(index, j));
  const Value& x = values_[step.values[0]];
  multiply(x.at, rows(x), weights_of(index), products, epilogues.data(), at(scratch.linear), at(scratch.whole));
  for (size_t j = 0; j < step.results.size(); ++j)
    if (!fuses(index, j)) finish(index, j, products[j], step.gated ? &products[1] : nullptr);
}

// Run what the product's epilogue does not do.
void Layer::finish(size_t index, size_t result, const Matrix& product, const Matrix* up) {
  const Step& step = program_.steps[index];
  Value& made = values_[step.results[result]];
  const bool adds = step.residual != kNone || step.multiplier != 1;
  Matrix last = product;
  if (step.activation != Activation::none) {
    if (made.is_codes || (is_out(step.results[result]) && !adds)) last = made.at;
    activate(step.activation, product, up, last, made);
  }
  if (defers(index)) {
    made.product = last;
  } else if (adds) {
    const Matrix* const residual = step.residual == kNone ? nullptr : &values_[step.residual].at;
    add(last, residual, made.at, made, static_cast<float>(step.multiplier));
  } else {
    made.at = last;
  }
}

// out = activation(x), times up where there is one; as numbers, or as codes where out has them.
void Layer::activate(Activation activation, const Matrix& x, const Matrix* up, const Matrix& out, const Value& like) {
  launch_activate(
      {
          .x = x.data,
          .up = up ? up->data : nullptr,
          .out = out.data,
          .codes = out.codes,
          .scale = out.scale,
          .x_rows = rows_of(like, x),
          .up_rows = up ? rows_of(like, *up) : Rows{},
          .out_rows = rows_of(like, out),
          .hidden = like.columns,
          .dtype = dtype_,
          .activation = activation,
      },
      *threads_);
}

// out = a · multiplier + b; all of them contiguous.
void Layer::add(const Matrix& a, const Matrix* b, const Matrix& out, const Value& like, float multiplier) {
  launch_add({a.data, b ? b->data : nullptr, out.data, rows(like) * like.columns, dtype_, multiplier}, *threads_);
}

void Layer::run_rope(const Step& step) {
  const size_t heads = step.values.size() - 2;
  RopeParams p{};
  for (size_t i = 0; i < heads; ++i) {
    const Value& x = values_[step.values[i]];
    Value& made = values_[step.results[i]];
    const Array* const cache = made.in_cache ? &caches_[cache_index(step.results[i])] : nullptr;
    if (cache) made.at.data = at_token(*cache, call_.past, element_bytes());
    RopeHeads& turned = i ? p.k : p.q;
    turned.x = x.at.data, turned.out = made.at.data;
    turned.heads = x.columns / step.dim;
    turned.x_strides = heads_of(x, x.at, step.dim);
    turned.out_strides = cache ? strides_of(*cache) : heads_of(made, made.at, step.dim);
  }
  const auto angles = [](const Array& a) { return RopeAngles{a.data, a.size[0] == 1 ? 0 : a.stride[0], a.stride[1]}; };
  const Array &cos = *values_[step.values[heads]].array, &sin = *values_[step.values[heads + 1]].array;
  p.cos = angles(cos), p.sin = angles(sin);
  p.batch = batch_, p.length = length_, p.dim = step.dim;
  p.rotary_dim = step.rotary ? step.rotary : step.dim;
  p.width = step.half ? p.rotary_dim / 2 : cos.size[2];
  p.dtype = dtype_, p.angles_dtype = cos.dtype();
  p.interleaved = step.interleaved;
  launch_rope(p, *threads_);
}

void Layer::run_append(const Step& step) {
  for (int i = 0; i < 2; ++i) {
    const Value& x = values_[step.values[i]];
    values_[step.results[i]].at = x.at;
    if (cached() && !x.in_cache) append(x, caches_[i], caches_[2 + i], call_.past, step.repeat);
  }
}

// Keys and values of other tokens, into their cache; where they are not made, that is where they are.
void Layer::run_keep(const Step& step) {
  for (int i = 0; i < 2; ++i) {
    const Value& x = values_[step.values[i]];
    if (x.absent != kNone) continue;
    values_[step.results[i]].at = x.at;
    if (has_kept_cache()) append(x, caches_[kKeptCache + i], {}, 0);
  }
}

// Keys or values, or their codes and scales, into a cache from `position` on, each head `repeat` times.
void Layer::append(const Value& x, const Array& cache, const Array& scale, int64_t position, int64_t repeat) {
  HeadStrides strides = strides_of(cache);
  strides.head *= repeat;
  char* const first = static_cast<char*>(at_token(cache, position, scale ? 1 : element_bytes()));
  for (int64_t copy = 0; copy < repeat; ++copy)
    launch_kv_append(
        {
            .x = x.at.data,
            .cache = first + copy * cache.stride[1] * (scale ? 1 : element_bytes()),
            .scale = scale ? static_cast<float*>(at_token(scale, position, sizeof(float))) : nullptr,
            .x_strides = heads_of(x, x.at, cache.size[3]),
            .cache_strides = strides,
            .scale_strides = scale ? strides_of(scale) : HeadStrides{},
            .batch = batch_,
            .heads = cache.size[1] / repeat,
            .length = x.length,
            .dim = cache.size[3],
            .dtype = dtype_,
        },
        *threads_);
}

// Dequantize the cache's codes, [batch, heads, keys, dim].
void Layer::read(int which, char* to) {
  const Array &cache = caches_[which], &scale = caches_[2 + which];
  const int64_t heads = cache.size[1], keys = call_.past + length_, dim = cache.size[3];
  launch_kv_read(
      {
          .x = to,
          .cache = cache.data,
          .scale = static_cast<float*>(scale.data),
          .x_strides = {heads * keys * dim, keys * dim, dim},
          .cache_strides = strides_of(cache),
          .scale_strides = strides_of(scale),
          .batch = batch_,
          .heads = heads,
          .length = keys,
          .dim = dim,
          .dtype = dtype_,
      },
      *threads_);
}

// A few queries whose scores nothing changes, each up to its own position (a single one sees everything anyway): the
// kernel that splits the keys among the threads and reads int8 caches as they are.
bool Layer::decodes(const Step& step) const {
  const Value& k = values_[step.values[1]];
  const bool changed = mask_of(step) || bias_of(step) || step.slopes != kNone;
  return cache_of(k, 0) && keys_of(k) > length_ && !changed && (step.causal || length_ == 1) &&
         length_ <= kDecodeQueries;
}

// Return the cached keys (0) or values (1) that attention reads; null without a cache.
const Array* Layer::cache_of(const Value& keys, size_t which) const {
  if (keys.held == Held::appended && cached()) return &caches_[which];
  if (keys.held == Held::kept && has_kept_cache()) return &caches_[kKeptCache + which];
  return nullptr;
}

const Array* Layer::bias_of(const Step& step) const {
  const Array* const bias = step.bias == kNone ? nullptr : values_[step.bias].array;
  return bias && *bias ? bias : nullptr;
}

// Without a past the tokens see one another as they were projected, rounded by no int8 cache.
bool Layer::reads_codes(const Step& step) const {
  return int8_cache() && values_[step.values[1]].held == Held::appended && call_.past > 0 && !decodes(step);
}

void Layer::run_attention(size_t index) {
  const Step& step = program_.steps[index];
  const StepScratch& scratch = scratch_[index];
  if (decodes(step)) {
    AttentionDecodeParams p = decode_params(step);
    p.workspace = at(scratch.attention);
    return launch_attention_decode(p, *threads_);
  }
  if (reads_codes(step)) {
    read(0, at(scratch.read_k));
    read(1, at(scratch.read_v));
  }
  AttentionParams p = attention_params(step, scratch);
  p.workspace = at(scratch.attention);
  launch_attention(p, *threads_);
}

AttentionDecodeParams Layer::decode_params(const Step& step) const {
  const Value &q = values_[step.values[0]], &keys = values_[step.values[1]], &out = values_[step.results[0]];
  const Array &k = *cache_of(keys, 0), &v = *cache_of(keys, 1);
  AttentionDecodeParams p{};
  p.q = q.at.data;
  p.k_cache = k.data, p.v_cache = v.data;
  if (keys.held == Held::appended && int8_cache()) {
    p.k_scale = static_cast<const float*>(caches_[2].data), p.v_scale = static_cast<const float*>(caches_[3].data);
    p.k_scale_strides = strides_of(caches_[2]), p.v_scale_strides = strides_of(caches_[3]);
  }
  p.out = out.at.data;
  p.q_strides = heads_of(q, q.at, step.dim);
  p.k_strides = strides_of(k), p.v_strides = strides_of(v);
  p.out_strides = heads_of(out, out.at, v.size[3]);
  p.batch = batch_, p.heads = q.columns / step.dim, p.kv_heads = k.size[1], p.queries = length_;
  p.dim = step.dim, p.value_dim = v.size[3];
  p.slots = keys_of(keys);
  p.window_left = step.window < 0 || !step.causal ? -1 : step.window - 1;
  p.dtype = dtype_;
  p.sm_scale = static_cast<float>(step.scale);
  p.softcap = static_cast<float>(step.softcap);
  set_sinks(p, step);
  return p;
}

AttentionParams Layer::attention_params(const Step& step, const StepScratch& scratch) const {
  const Value &q = values_[step.values[0]], &k = values_[step.values[1]], &v = values_[step.values[2]];
  const Value& out = values_[step.results[0]];
  const int64_t kv_heads = k.columns / step.dim, value_dim = v.columns / kv_heads;
  const Array* const cache = cache_of(k, 0);
  const bool codes = cache && cache->type == Element::s8;
  const int64_t keys = keys_of(k);
  AttentionParams p{};
  p.q = q.at.data, p.k = k.at.data, p.v = v.at.data, p.out = out.at.data;
  p.q_strides = heads_of(q, q.at, step.dim), p.out_strides = heads_of(out, out.at, value_dim);
  p.k_strides = heads_of(k, k.at, step.dim), p.v_strides = heads_of(v, v.at, value_dim);
  if (reads_codes(step)) {
    p.k = at(scratch.read_k), p.v = at(scratch.read_v);
    p.k_strides = {kv_heads * keys * step.dim, keys * step.dim, step.dim};
    p.v_strides = {kv_heads * keys * value_dim, keys * value_dim, value_dim};
  } else if (cache && !codes) {
    p.k = cache->data, p.v = cache_of(k, 1)->data;
    p.k_strides = strides_of(*cache), p.v_strides = strides_of(*cache_of(k, 1));
  }
  const auto stride = [](const Array& of, int d) { return of.size[d] == 1 ? 0 : of.stride[d]; };
  if (const Array* const mask = mask_of(step)) {
    p.mask = mask->data;
    p.mask_strides = {stride(*mask, 0), stride(*mask, 1), stride(*mask, 2), stride(*mask, 3)};
    p.mask_is_bool = mask->type == Element::boolean;
    p.mask_dtype = p.mask_is_bool ? DType::f32 : mask->dtype();
  }
  if (const Array* const bias = bias_of(step)) {
    const int64_t heads = q.columns / step.dim, head = bias->dims == 3 ? stride(*bias, 0) : stride(*bias, 1);
    p.bias = bias->data, p.bias_dtype = bias->dtype();
    p.bias_strides = {bias->dims == 3 ? heads * head : stride(*bias, 0), head, stride(*bias, bias->dims - 2),
                      stride(*bias, bias->dims - 1)};
  }
  if (step.slopes != kNone) {
    const Array& slopes = tensor_of(step.slopes);
    p.slopes = slopes.data, p.slopes_dtype = slopes.dtype();
  }
  p.batch = batch_, p.heads = q.columns / step.dim, p.kv_heads = kv_heads, p.queries = length_, p.keys = keys;
  p.dim = step.dim, p.value_dim = value_dim;
  p.causal = step.causal && !p.mask;
  p.window_left = step.window < 0 || !p.causal ? -1 : step.window - 1;
  p.window_right = -1;
  p.dtype = dtype_;
  p.sm_scale = static_cast<float>(step.scale);
  p.softcap = static_cast<float>(step.softcap);
  set_sinks(p, step);
  return p;
}

template <class Params>
void Layer::set_sinks(Params& p, const Step& step) const {
  if (step.sinks == kNone) return;
  const Array& sinks = tensor_of(step.sinks);
  p.sinks = sinks.data, p.sinks_dtype = sinks.dtype();
}

void Layer::run_elementwise(const Step& step) {
  const Value &a = values_[step.values[0]], &made = values_[step.results[0]];
  if (step.op == Op::activation) return activate(step.activation, a.at, nullptr, made.at, made);
  if (step.op == Op::add) return add(a.at, &values_[step.values[1]].at, made.at, made);
  if (step.op == Op::mul) return activate(Activation::none, a.at, &values_[step.values[1]].at, made.at, made);
  if (step.by != kNone) {  // the same row for all
    const Matrix by{.data = tensor_of(step.by).data, .stride = 0};
    return activate(Activation::none, a.at, &by, made.at, made);
  }
  AddParams p{a.at.data, nullptr, made.at.data, rows(made) * made.columns, dtype_, static_cast<float>(step.scale)};
  if (step.has_low) p.low = static_cast<float>(step.low);
  if (step.has_high) p.high = static_cast<float>(step.high);
  launch_add(p, *threads_);
}

void run(const Call& call, const Pool& pool) {
  struct Run {
    std::span<const Array> parameters;
    Layer* form;
  };
  std::vector<Run> runs;
  std::deque<Layer> forms;
  size_t first = 0;
  for (size_t i = 0; i < call.programs.size(); ++i) {
    const size_t count = call.programs[i]->tensors;
    if (first + count > call.parameters.size())
      throw Invalid("layers_: parameters has " + std::to_string(call.parameters.size()) +
                    " elements, fewer than the programs take");
    const std::span<const Array> parameters = call.parameters.subspan(first, count);
    const auto form = std::find_if(forms.begin(), forms.end(), [&](const Layer& f) { return f.fits(i, parameters); });
    Layer* const found = form == forms.end() ? &forms.emplace_back(call, i, parameters) : &*form;
    runs.push_back({parameters, found});
    first += count;
  }
  if (first != call.parameters.size())
    throw Invalid("layers_: parameters has " + std::to_string(call.parameters.size()) + " elements, expected " +
                  std::to_string(first));
  int64_t bytes = 0;
  for (const Layer& form : forms) bytes = std::max(bytes, form.scratch_bytes());
  char* const scratch = KeptMemory::of_this_thread().at_least(bytes);
  const auto through = [&](const Threads& threads) {
    void* in = call.hidden.data;
    for (size_t i = 0; i < runs.size(); ++i) {
      runs[i].form->run(i, runs[i].parameters, scratch, in, call.out, threads);
      in = call.out;
    }
  };
  const bool native = std::all_of(forms.begin(), forms.end(), [](const Layer& form) { return form.is_native(); });
  native ? Team::lead(pool.threads, pool.count, through) : through(pool.threads);
}

}  // namespace llmkern::layers
