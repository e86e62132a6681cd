// What a layer's steps read, checked against what the call brings; every sentence has the program's own names.
#include <algorithm>

#include "layer.h"
#include "llmkern/rope.h"

namespace llmkern::layers {
namespace {

std::string text(int64_t value) {
  return std::to_string(value);
}

// The i-th part of a list, or its only one; and how many there are.
std::pair<std::string_view, size_t> part_of(std::string_view list, char separator, size_t i) {
  const size_t parts = std::count(list.begin(), list.end(), separator) + 1;
  if (parts > 1)
    for (; i > 0 && list.find(separator) != list.npos; --i) list.remove_prefix(list.find(separator) + 1);
  return {list.substr(0, list.find(separator)), parts};
}

bool are_alike(std::span<const Array> a, std::span<const Array> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const Array& x, const Array& y) { return x.is_like(y); });
}

}  // namespace

std::span<const Array> caches_of(const Call& call, size_t index) {
  return call.caches.empty() ? call.caches : call.caches.subspan(index * kCaches, kCaches);
}

bool Layer::fits(size_t index, std::span<const Array> parameters) const {
  return call_.programs[index].get() == &program_ && part_of(call_.schemes, ';', index).first == schemes_ &&
         are_alike(parameters, parameters_) && are_alike(caches_of(call_, index), caches_);
}

void Layer::invalid(const std::string& what) const {
  throw Invalid("layers_: " + what + (call_.programs.size() > 1 ? " (layer " + text(index_) + ")" : ""));
}

void Layer::not_served(const std::string& what) const {
  throw NotServed("layers_: " + what + (call_.programs.size() > 1 ? " (layer " + text(index_) + ")" : ""));
}

Layer::Layer(const Call& call, size_t index, std::span<const Array> parameters)
    : call_(call),
      index_(index),
      program_(*call.programs[index]),
      parameters_(parameters),
      caches_(caches_of(call, index)),
      dtype_(call.hidden.dtype()),
      batch_(call.hidden.size[0]),
      length_(call.hidden.size[1]),
      size_(call.hidden.size[2]),
      values_(program_.values()),
      scratch_(program_.steps.size()) {
  bind_schemes();
  bind_inputs();
  first_weight_.reserve(program_.steps.size());
  for (size_t i = 0; i < program_.steps.size(); ++i) {
    const Step& step = program_.steps[i];
    first_weight_.push_back(weights_.size());
    step.for_each_read([&](int value) {
      values_[value].last = static_cast<int>(i);
      ++values_[value].reads;
    });
    check(step);
  }
  const Value& result = values_[program_.result];
  if ((result.array && program_.result != 0) || result.columns != size_ || result.length != length_)
    invalid("the program returns " + name(program_.result) + " with " + text(result.columns) +
            " columns, expected rows like hidden's, of " + text(size_));
  plan();
}

// The layer's share of `schemes`.
void Layer::bind_schemes() {
  const auto [own, layers] = part_of(call_.schemes, ';', index_);
  if (layers != 1 && layers != call_.programs.size())
    invalid("schemes is for " + text(layers) + " layers, expected 1 or " + text(call_.programs.size()));
  schemes_ = own;
  for (size_t i = 0; i < std::max<size_t>(program_.linears, 1); ++i) {
    const auto [scheme, parts] = part_of(schemes_, ',', i);
    if (parts != 1 && parts != program_.linears)
      invalid("schemes has " + text(parts) + " parts, expected 1 or " + text(program_.linears) +
              ", one for each linear layer");
    if (scheme != "w8a8" && scheme != "w8a16") invalid("schemes has a part that is neither w8a8 nor w8a16");
    w8a8_.push_back(scheme == "w8a8");
  }
}

void Layer::bind_inputs() {
  if (call_.inputs.size() + 1 != program_.inputs.size())
    invalid("inputs has " + text(call_.inputs.size()) + " elements, expected " + text(program_.inputs.size() - 1) +
            ", those of the program behind " + program_.inputs[0]);
  values_[0].columns = size_, values_[0].length = length_;
  for (size_t i = 0; i < call_.inputs.size(); ++i) {
    values_[i + 1].array = &call_.inputs[i];
    if (call_.inputs[i] && !call_.inputs[i].on_cpu) invalid(name(i + 1) + " must be on the CPU");
  }
  if (call_.past < 0 || (!cached() && call_.past > 0))
    invalid("past is " + text(call_.past) +
            ", expected 0 where there is no cache, and a number of tokens where one is");
}

void Layer::check(const Step& step) {
  switch (step.op) {
    case Op::rms_norm:
    case Op::layer_norm:
      return check_norm(step);
    case Op::linear:
      return check_linear(step);
    case Op::rope:
      return check_rope(step);
    case Op::append:
      return check_append(step);
    case Op::attention:
      return check_attention(step);
    default:
      return check_elementwise(step);
  }
}

// A value that a step reads as rows.
Value& Layer::rows_of(int value, const Step& step) {
  Value& v = values_[value];
  if (v.appended && step.op != Op::attention) invalid(name(value) + " is for attention only, once it is in the cache");
  if (v.array && v.columns == 0) {
    const Array& a = *v.array;
    if (!a) invalid(name(value) + " is not given, but the program reads it as rows");
    if (a.dims != 3 || a.size[0] != batch_ || !a.has_contiguous_rows() ||
        (batch_ > 1 && a.stride[0] != a.size[1] * a.stride[1]))
      invalid(name(value) + " has shape " + a.shape() + ", expected [" + text(batch_) +
              ", tokens, columns], rows contiguous and equally far apart");
    if (a.type != call_.hidden.type) not_served(name(value) + " has another dtype than hidden");
    v.columns = a.size[2], v.length = a.size[1];
    v.at = {.data = a.data, .stride = a.stride[1]};
  }
  return v;
}

void Layer::make(int value, int64_t columns, int64_t length) {
  values_[value].columns = columns;
  values_[value].length = length;
}

const Array& Layer::tensor(const Place& place, size_t part) const {
  return parameters_[program_.parameters[place.parameter].first + part];
}

void Layer::check_norm(const Step& step) {
  const Value& x = rows_of(step.values[0], step);
  const int64_t dim = step.dim ? step.dim : x.columns;
  if (dim <= 0 || x.columns % dim != 0)
    invalid(name(step.values[0]) + " has " + text(x.columns) + " columns, expected a multiple of dim " + text(dim));
  const Place& place = step.places[0];
  if (place.end) not_served(place.text + ": a norm's parameter is taken whole");
  for (size_t part = 0; part < program_.parameters[place.parameter].tensors(); ++part) {
    const Array& t = tensor(place, part);
    if (!t) continue;
    if (!t.is_floating()) not_served(place.text + ": parameters of a norm are fp32, bf16 or fp16");
    if (!t.is_vector(dim) || !t.on_cpu)
      invalid(place.text + ": " + (part ? "bias" : "weight") + " has shape " + t.shape() + ", expected [" + text(dim) +
              "], contiguous, on the CPU");
  }
  if (step.adds) {
    const Value& r = rows_of(step.values[1], step);
    if (r.columns != x.columns || r.length != x.length)
      invalid(name(step.values[0]) + " and " + name(step.values[1]) + " have different shapes, and are to be added");
    if (step.dim) not_served("a norm of heads of a sum");
    make(step.results[1], x.columns, x.length);
  }
  if (step.codes && step.dim) not_served("codes of a norm of heads");
  make(step.results[0], x.columns, x.length);
}

Weight Layer::weight_of(const Place& place, int64_t k) const {
  const Parameter& parameter = program_.parameters[place.parameter];
  if (parameter.kind != Parameter::linear) invalid(place.text + " is no linear layer");
  if (place.period) not_served(place.text + ": rows of a period");
  const Array &w = tensor(place, 0), &scale = tensor(place, 1), &bias = tensor(place, 2);
  const auto wrong = [&](const char* what, const Array& t, const std::string& expected) {
    invalid(place.text + ": " + what + " has shape " + t.shape() + ", expected " + expected + ", on the CPU");
  };
  if (!w) invalid(place.text + ": weight is not given");
  const bool int8 = w.type == Element::s8;
  if (w.type != (int8 ? Element::s8 : call_.hidden.type))
    not_served(place.text + ": weight has another dtype than hidden");
  if (int8 != static_cast<bool>(scale)) invalid(place.text + ": scale goes with a weight of int8, and with no other");
  if (w.dims != 2 || w.size[1] != k || !w.has_contiguous_rows() || !w.on_cpu)
    wrong("weight", w, "[N, " + text(k) + "], rows contiguous");
  if (place.end > w.size[0]) wrong("weight", w, "at least " + text(place.end) + " rows");
  const int64_t all = w.size[0];
  if (scale && (scale.type != Element::f32 || !scale.is_vector(all) || !scale.on_cpu))
    wrong("scale", scale, "fp32 [" + text(all) + ", 1], contiguous");
  if (bias && (!bias.is_vector(all) || !bias.on_cpu)) wrong("bias", bias, "[" + text(all) + "], contiguous");
  if (bias && bias.type != call_.hidden.type) not_served(place.text + ": bias has another dtype than hidden");
  const int64_t begin = place.begin, end = place.end ? place.end : all;
  size_t linear = 0;
  for (size_t i = 0; i < place.parameter; ++i) linear += program_.parameters[i].kind == Parameter::linear;
  Weight weight{
      .first = parameter.first,
      .begin = begin,
      .n = end - begin,
      .k = k,
      .stride = w.stride[0],
      .type = int8 ? WeightType::s8 : static_cast<WeightType>(w.type),
      .w8a8 = int8 && w8a8_[linear],
  };
  if (weight.w8a8 && k > kMostExactProducts) not_served(place.text + ": more columns than add up exactly in int8");
  return weight;
}

// Points it at the tensors of the present layer.
void Layer::point(Weight& weight) const {
  const Array* const tensors = &parameters_[weight.first];
  const auto at = [&weight](const Array& t, int64_t stride) {
    return static_cast<const char*>(t.data) + weight.begin * stride * size_of(t.type);
  };
  weight.w = at(tensors[0], weight.stride);
  if (tensors[1]) weight.scale = static_cast<const float*>(tensors[1].data) + weight.begin;
  if (tensors[2]) weight.bias = at(tensors[2], 1);
}

void Layer::check_linear(const Step& step) {
  const Value& x = rows_of(step.values[0], step);
  const size_t first = weights_.size();
  for (const Place& place : step.places) weights_.push_back(weight_of(place, x.columns));
  const Weight* const made = &weights_[first];
  if (step.gated && made[0].n != made[1].n)
    invalid(step.places[0].text + " and " + step.places[1].text + " make " + text(made[0].n) + " and " +
            text(made[1].n) + " columns, expected as many");
  if (step.residual != kNone) {
    const Value& r = rows_of(step.residual, step);
    if (r.columns != made[0].n || r.length != x.length)
      invalid(step.places[0].text + ": weight has " + text(made[0].n) + " rows, expected " + text(r.columns) +
              ", the columns of " + name(step.residual));
  }
  for (size_t i = 0; i < step.results.size(); ++i) make(step.results[i], made[i].n, x.length);
  if (step.multiplier != 1) not_served(step.places[0].text + ": a multiplier");
}

void Layer::check_rope(const Step& step) {
  const int64_t dim = step.dim, turned = step.rotary ? step.rotary : dim;
  if (dim <= 0 || turned > dim || turned % 2 || turned > kRopeMostDims)
    invalid("rope: " + text(turned) + " of dim " + text(dim) + " columns turn, expected an even number of them");
  const size_t heads = step.values.size() - 2;
  for (size_t i = 0; i < heads; ++i) {
    const Value& x = rows_of(step.values[i], step);
    if (x.columns % dim || x.length != length_)
      invalid(name(step.values[i]) + " has " + text(x.columns) + " columns, expected a multiple of dim " + text(dim));
    make(step.results[i], x.columns, x.length);
  }
  const Array* angles[2];
  for (size_t i = 0; i < 2; ++i) {
    const int value = step.values[heads + i];
    angles[i] = values_[value].array;
    if (!angles[i] || !*angles[i]) invalid(name(value) + " must be given, as an input of the program");
    const Array& a = *angles[i];
    if (a.dims != 3 || (a.size[0] != 1 && a.size[0] != batch_) || a.size[1] != length_ ||
        (a.size[2] != turned && 2 * a.size[2] != turned) || !a.has_contiguous_rows())
      invalid(name(value) + " has shape " + a.shape() + ", expected [" + text(batch_) + " or 1, " + text(length_) +
              ", " + text(turned) + "], rows contiguous");
    if (!a.is_floating()) not_served(name(value) + " is not fp32, bf16 or fp16");
  }
  if (angles[0]->size[2] != angles[1]->size[2]) invalid("cos and sin have different widths");
  if (angles[0]->type != angles[1]->type) not_served("cos and sin have different dtypes");
}

void Layer::check_append(const Step& step) {
  for (int i = 0; i < 2; ++i) {
    const Value& x = rows_of(step.values[i], step);
    if (x.length != length_) invalid(name(step.values[i]) + " is of other tokens than hidden");
    make(step.results[i], x.columns, x.length);
    values_[step.results[i]].appended = true;
  }
  if (std::count_if(program_.steps.begin(), program_.steps.end(), [](const Step& s) { return s.op == Op::append; }) > 1)
    not_served("a layer with more than one append");
  if (!cached()) {
    if (caches_.size() && (caches_[1] || caches_[2] || caches_[3])) invalid("caches lack the keys");
    return;
  }
  if (!caches_[1] || static_cast<bool>(caches_[2]) != static_cast<bool>(caches_[3]))
    invalid("caches must have both keys and values, and scales for both or neither");
  const int64_t end = call_.past + length_;
  for (int i = 0; i < 2; ++i) {
    const Array &cache = caches_[i], &scale = caches_[2 + i];
    const char* const kind = i ? "values" : "keys";
    const bool has_shape = cache.dims == 4 && cache.size[0] == batch_ && cache.size[1] == caches_[0].size[1] &&
                           cache.size[2] >= end && cache.size[1] * cache.size[3] == values_[step.values[i]].columns &&
                           cache.has_contiguous_rows() && cache.on_cpu;
    if (!has_shape)
      invalid(std::string("the cache of ") + kind + " has shape " + cache.shape() + ", expected [" + text(batch_) +
              ", heads, at least " + text(end) + ", D] with heads * D = " + text(values_[step.values[i]].columns) +
              ", vectors contiguous, on the CPU");
    if (cache.type != (scale ? Element::s8 : call_.hidden.type))
      not_served(std::string("the cache of ") + kind + " has another dtype than hidden, or than int8 with a scale");
    if (scale && (scale.dims != 3 || scale.size[0] != batch_ || scale.size[1] != cache.size[1] || scale.size[2] < end ||
                  scale.type != Element::f32 || !scale.on_cpu))
      invalid(std::string("the scale of the cache of ") + kind + " has shape " + scale.shape() + ", expected fp32 [" +
              text(batch_) + ", " + text(cache.size[1]) + ", at least " + text(end) + "], on the CPU");
  }
}

void Layer::check_mask(const Array& mask, const char* what, int64_t heads, int64_t keys) const {
  const int64_t full[] = {batch_, heads, length_, keys};
  bool broadcasts = mask.dims == 4;
  for (int d = 0; d < 4 && broadcasts; ++d) broadcasts = mask.size[d] == 1 || mask.size[d] == full[d];
  if (!broadcasts)
    invalid(std::string(what) + " has shape " + mask.shape() + ", expected one that broadcasts to [" + text(batch_) +
            ", " + text(heads) + ", " + text(length_) + ", " + text(keys) + "]");
  if (mask.type != Element::boolean && !mask.is_floating())
    not_served(std::string(what) + " is neither bool nor fp32, bf16 or fp16");
}

const Array* Layer::mask_of(const Step& step) const {
  if (step.values.size() < 4) return nullptr;
  const Array* const mask = values_[step.values[3]].array;
  return mask && *mask ? mask : nullptr;
}

void Layer::check_attention(const Step& step) {
  const Value& q = rows_of(step.values[0], step);
  const Value& k = rows_of(step.values[1], step);
  const Value& v = rows_of(step.values[2], step);
  const int64_t dim = step.dim;
  if (dim <= 0 || dim > kMaxHeadDim || q.columns % dim || k.columns < dim || k.columns % dim || q.columns % k.columns ||
      v.columns == 0 || v.columns % (k.columns / dim) || v.columns / (k.columns / dim) > kMaxHeadDim)
    invalid("attention: " + name(step.values[0]) + ", " + name(step.values[1]) + " and " + name(step.values[2]) +
            " have " + text(q.columns) + ", " + text(k.columns) + " and " + text(v.columns) +
            " columns, expected heads of dim " + text(dim) + ", at most " + text(kMaxHeadDim) +
            ", those of the first a multiple of those of the others");
  if (k.length != v.length || k.appended != v.appended || q.length != length_ || k.length != length_)
    invalid("attention: the keys are of other tokens than the values, or than hidden's");
  const int64_t heads = q.columns / dim, kv_heads = k.columns / dim;
  if (cached() && k.appended && caches_[0].size[1] != kv_heads)
    invalid("attention: the cache has " + text(caches_[0].size[1]) + " heads, expected " + text(kv_heads));
  const int64_t keys = k.length + (k.appended ? call_.past : 0);
  if (const Array* const mask = mask_of(step)) check_mask(*mask, name(step.values[3]).c_str(), heads, keys);
  if (step.values.size() > 3 && !values_[step.values[3]].array)
    invalid("attention: " + name(step.values[3]) + " is no input of the program, as a mask has to be");
  if (step.window == 0) invalid("attention: window is 0, expected the number of keys that a query sees, at least 1");
  if (step.bias != kNone || step.slopes != kNone) not_served("attention with a bias or slopes");
  if (step.sinks != kNone) {
    const Array& sinks = parameters_[program_.parameters[step.sinks].first];
    const std::string& path = program_.parameters[step.sinks].path;
    if (!sinks || !sinks.is_vector(heads) || !sinks.on_cpu)
      invalid("@" + path + " has shape " + sinks.shape() + ", expected [" + text(heads) + "], contiguous, on the CPU");
    if (!sinks.is_floating()) not_served("@" + path + " is not fp32, bf16 or fp16");
  }
  make(step.results[0], heads * (v.columns / kv_heads), length_);
}

void Layer::check_elementwise(const Step& step) {
  const Value& a = rows_of(step.values[0], step);
  if (step.values.size() > 1) {
    const Value& b = rows_of(step.values[1], step);
    if (a.columns != b.columns || a.length != b.length)
      invalid(name(step.values[0]) + " and " + name(step.values[1]) + " have different shapes in " + step.text);
  }
  if (step.op == Op::scale || step.op == Op::clamp || step.op == Op::keep) not_served(step.text);
  make(step.results[0], a.columns, a.length);
}

bool Layer::is_native(const Weight& weight, int64_t rows) const {
  return weight.type == WeightType::s8 || rows <= kFewRows || linear_takes_many_rows(weight.type) ||
         linear_keeps_rows_alone();
}

bool Layer::is_native() const {
  for (size_t i = 0; i < program_.steps.size(); ++i) {
    const Step& step = program_.steps[i];
    if (step.op != Op::linear) continue;
    for (size_t j = 0; j < step.places.size(); ++j)
      if (!is_native(weights_[first_weight_[i] + j], rows(values_[step.values[0]]))) return false;
  }
  return true;
}

}  // namespace llmkern::layers
