// Check what a layer's steps read against the call's tensors; messages use the program's own names.
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

// A packed weight [n, k] from row `first` on, the first of a panel.
PackedWeight rows_from(PackedWeight weight, int64_t first, int64_t k) {
  const int64_t panels = first / kPanelRows;
  weight.codes += panels * (k / kPackedBlock) * bits_of(weight.code) * 64;
  for (PackedGroups* const groups :
       {&weight.scale, &weight.zero, &weight.offset, &weight.super_scale, &weight.super_offset}) {
    if (!groups->data) continue;
    const int64_t bytes = groups->type == GroupType::f32 ? 4 : groups->type >= GroupType::s8 ? 1 : 2;
    groups->data = static_cast<const char*>(groups->data) + panels * (k / groups->size) * kPanelRows * bytes;
  }
  return weight;
}

bool are_alike(std::span<const Array> a, std::span<const Array> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const Array& x, const Array& y) { return x.is_like(y); });
}

}  // namespace

size_t first_of_whole(std::span<const Weight> weights, size_t index) {
  size_t first = 0;
  while (weights[first].first != weights[index].first || !weights[first].period) ++first;
  return first;
}

std::span<const Weight> Layer::weights_of(size_t index) const {
  return {weights_.data() + first_weight_[index], program_.steps[index].places.size()};
}

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
  skipped_.reserve(program_.steps.size());
  for (size_t i = 0; i < program_.steps.size(); ++i) {
    const Step& step = program_.steps[i];
    first_weight_.push_back(weights_.size());
    step.for_each_read([&](int value) {
      values_[value].last = static_cast<int>(i);
      ++values_[value].reads;
    });
    skipped_.push_back(skips(step));
    if (!skipped_.back()) {
      check(step);
      continue;
    }
    for (const int result : step.results) values_[result].absent = values_[step.values[0]].absent;
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
    if (!call_.inputs[i]) values_[i + 1].absent = static_cast<int>(i) + 1;
    if (call_.inputs[i] && !call_.inputs[i].on_cpu) invalid(name(i + 1) + " must be on the CPU");
  }
  if (call_.past < 0 || (!cached() && call_.past > 0))
    invalid("past is " + text(call_.past) +
            ", expected 0 where there is no cache, and a number of tokens where one is");
}

// True if the step reads a value made from an absent input; only `keep` can do without it.
bool Layer::skips(const Step& step) const {
  const bool of_rows = step.op == Op::linear || is_norm(step.op) || step.op == Op::scale || step.op == Op::clamp ||
                       step.op == Op::activation;
  return of_rows && !step.adds && step.residual == kNone && values_[step.values[0]].absent != kNone;
}

void Layer::check(const Step& step) {
  switch (step.op) {
    case Op::rms_norm:
    case Op::layer_norm:
      return check_norm(step);
    case Op::linear:
      return check_linear(step);
    case Op::route:
      return check_route(step);
    case Op::experts:
      return check_experts(step);
    case Op::rope:
      return check_rope(step);
    case Op::append:
      return check_append(step);
    case Op::keep:
      return check_keep(step);
    case Op::attention:
      return check_attention(step);
    default:
      return check_elementwise(step);
  }
}

// Return a value that a step reads as rows.
Value& Layer::rows_of(int value, const Step& step) {
  Value& v = values_[value];
  if (v.held != Held::no && step.op != Op::attention)
    invalid(name(value) + " is for attention only, once it is in the cache");
  if (v.absent != kNone) invalid(name(v.absent) + " is not given, but the program reads it as rows");
  if (v.array && v.columns == 0) {
    const Array& a = *v.array;
    if (a.dims != 3 || a.size[0] != batch_)
      invalid(name(value) + " has shape " + a.shape() + ", expected [" + text(batch_) + ", tokens, columns]");
    if (!a.has_contiguous_rows() || (a.size[1] > 1 && a.stride[1] != a.size[2]) ||
        (batch_ > 1 && a.stride[0] != a.size[1] * a.size[2]))
      not_served(name(value) + " is not contiguous");
    if (a.type != call_.hidden.type) not_served(name(value) + " has another dtype than hidden");
    v.columns = a.size[2], v.length = a.size[1];
    v.at = {.data = a.data, .stride = a.size[2]};
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

// View a tensor [experts, ...] as the first expert's.
Array Layer::first_expert(const Array& t) {
  Array one = t;
  if (!t || t.dims < 1) return one;
  --one.dims;
  for (int d = 0; d + 1 < Array::kMostDims; ++d) one.size[d] = t.size[d + 1], one.stride[d] = t.stride[d + 1];
  return one;
}

Weight Layer::weight_of(const Place& place, int64_t k, bool of_experts) const {
  const Parameter& parameter = program_.parameters[place.parameter];
  if (parameter.kind != Parameter::linear) invalid(place.text + " is no linear layer");
  const Array &weights = tensor(place, 0), &scales = tensor(place, 1), &biases = tensor(place, 2);
  const int64_t experts = of_experts && weights && weights.dims > 0 ? weights.size[0] : 0;
  const Array w = of_experts ? first_expert(weights) : weights, scale = of_experts ? first_expert(scales) : scales,
              bias = of_experts ? first_expert(biases) : biases;
  const auto wrong = [&](const char* what, const Array& t, const std::string& expected) {
    invalid(place.text + ": " + what + " has shape " + t.shape() + ", expected " + expected +
            (of_experts ? " of each expert" : "") + ", on the CPU");
  };
  for (const Array* const t : {&scales, &biases})
    if (of_experts && *t && (t->size[0] != experts || t->stride[0] != w.size[0]))
      invalid(place.text + ": a scale or bias has shape " + t->shape() + ", expected one of each of " + text(experts) +
              " experts, contiguous");
  if (!w) invalid(place.text + ": weight is not given");
  if (w.packed && of_experts) not_served(place.text + ": packed weights of experts");
  const bool int8 = w.type == Element::s8;
  if (!w.packed && w.type != (int8 ? Element::s8 : call_.hidden.type))
    not_served(place.text + ": weight has another dtype than hidden");
  if (int8 != static_cast<bool>(scale)) invalid(place.text + ": scale goes with a weight of int8, and with no other");
  if (w.dims != 2 || w.size[1] != k || !w.on_cpu) wrong("weight", w, "[N, " + text(k) + "]");
  const bool turned = !w.packed && !w.has_contiguous_rows();
  if (turned && (int8 || (w.size[0] > 1 && w.stride[0] != 1)))
    not_served(place.text + ": neither rows of the weight are contiguous, nor its columns in floating point");
  if (place.period && w.size[0] % place.period)
    invalid(place.text + ": weight has " + text(w.size[0]) + " rows, which are not of that form");
  if (place.end > w.size[0]) wrong("weight", w, "at least " + text(place.end) + " rows");
  const int64_t all = w.size[0];
  if (scale && (scale.type != Element::f32 || !scale.is_vector(all) || !scale.on_cpu))
    wrong("scale", scale, "fp32 [" + text(all) + ", 1], contiguous");
  if (bias && (!bias.is_vector(all) || !bias.on_cpu)) wrong("bias", bias, "[" + text(all) + "], contiguous");
  if (bias && bias.type != call_.hidden.type) not_served(place.text + ": bias has another dtype than hidden");
  if (w.packed && !place.period && place.begin % kPanelRows)
    not_served(place.text + ": rows of a packed weight that do not begin at a multiple of " + text(kPanelRows));
  const int64_t begin = place.period ? 0 : place.begin, end = place.end && !place.period ? place.end : all;
  size_t linear = 0;
  for (size_t i = 0; i < place.parameter; ++i) linear += program_.parameters[i].kind == Parameter::linear;
  Weight weight{
      .first = parameter.first,
      .begin = begin,
      .n = end - begin,
      .k = k,
      .stride = w.stride[turned],
      .period = place.period,
      .from = place.begin,
      .width = place.end - place.begin,
      .type = w.packed ? WeightType::packed
              : int8   ? WeightType::s8
                       : static_cast<WeightType>(w.type),
      .turned = turned,
      .w8a8 = int8 && w8a8_[linear],
      .experts = experts,
      .expert_stride = of_experts ? weights.stride[0] : 0,
      .expert_rows = all,
  };
  if (weight.w8a8 && k > kMostExactProducts) not_served(place.text + ": more columns than add up exactly in int8");
  return weight;
}

// Point the weight at the tensors of the current layer.
void Layer::point(Weight& weight) const {
  const Array* const tensors = &parameters_[weight.first];
  const auto at = [&weight](const Array& t, int64_t stride) {
    return static_cast<const char*>(t.data) + weight.begin * stride * size_of(t.type);
  };
  if (tensors[0].packed)
    weight.packed = rows_from(*tensors[0].packed, weight.begin, weight.k);
  else
    weight.w = at(tensors[0], weight.turned ? 1 : weight.stride);
  if (tensors[1]) weight.scale = static_cast<const float*>(tensors[1].data) + weight.begin;
  if (tensors[2]) weight.bias = at(tensors[2], 1);
}

void Layer::check_linear(const Step& step) {
  const Value& x = rows_of(step.values[0], step);
  const size_t first = weights_.size();
  for (const Place& place : step.places) weights_.push_back(weight_of(place, x.columns));
  const Weight* const made = &weights_[first];
  if (step.gated && made[0].columns() != made[1].columns())
    invalid(step.places[0].text + " and " + step.places[1].text + " make " + text(made[0].columns()) + " and " +
            text(made[1].columns()) + " columns, expected as many");
  if (step.residual != kNone) {
    const Value& r = rows_of(step.residual, step);
    if (r.columns != made[0].columns() || r.length != x.length)
      invalid(step.places[0].text + ": weight has " + text(made[0].columns()) + " rows, expected " + text(r.columns) +
              ", the columns of " + name(step.residual));
  }
  for (size_t i = 0; i < step.results.size(); ++i) make(step.results[i], made[i].columns(), x.length);
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
        (a.size[2] != turned && (step.half || 2 * a.size[2] != turned)) || !a.has_contiguous_rows())
      invalid(name(value) + " has shape " + a.shape() + ", expected [" + text(batch_) + " or 1, " + text(length_) +
              ", " + text(turned) + "], rows contiguous");
    if (!a.is_floating()) not_served(name(value) + " is not fp32, bf16 or fp16");
  }
  if (angles[0]->size[2] != angles[1]->size[2]) invalid("cos and sin have different widths");
  if (angles[0]->type != angles[1]->type) not_served("cos and sin have different dtypes");
}

void Layer::check_append(const Step& step) {
  if (step.repeat < 1) invalid("append: repeat is 0, expected how many times a cache holds a head, at least 1");
  if (step.repeat > 1 && int8_cache()) not_served("an int8 cache that holds heads several times");
  for (int i = 0; i < 2; ++i) {
    const Value& x = rows_of(step.values[i], step);
    if (x.length != length_) invalid(name(step.values[i]) + " is of other tokens than hidden");
    make(step.results[i], x.columns * (cached() ? step.repeat : 1), x.length);
    values_[step.results[i]].held = Held::appended;
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
                           cache.size[2] >= end && cache.size[1] % step.repeat == 0 &&
                           cache.size[1] * cache.size[3] == values_[step.results[i]].columns &&
                           cache.has_contiguous_rows() && cache.on_cpu;
    if (!has_shape)
      invalid(std::string("the cache of ") + kind + " has shape " + cache.shape() + ", expected [" + text(batch_) +
              ", heads, at least " + text(end) + ", D] with heads * D = " + text(values_[step.results[i]].columns) +
              ", vectors contiguous, on the CPU");
    if (cache.type != (scale ? Element::s8 : call_.hidden.type))
      not_served(std::string("the cache of ") + kind + " has another dtype than hidden, or than int8 with a scale");
    if (scale && (scale.dims != 3 || scale.size[0] != batch_ || scale.size[1] != cache.size[1] || scale.size[2] < end ||
                  scale.type != Element::f32 || !scale.on_cpu))
      invalid(std::string("the scale of the cache of ") + kind + " has shape " + scale.shape() + ", expected fp32 [" +
              text(batch_) + ", " + text(cache.size[1]) + ", at least " + text(end) + "], on the CPU");
  }
}

void Layer::check_keep(const Step& step) {
  if (std::count_if(program_.steps.begin(), program_.steps.end(), [](const Step& s) { return s.op == Op::keep; }) > 1)
    not_served("a layer with more than one keep");
  const bool made = values_[step.values[0]].absent == kNone;
  for (int i = 0; i < 2; ++i) {
    const Value& x = values_[step.values[i]];
    if (made || !has_kept_cache()) rows_of(step.values[i], step);
    if ((x.absent == kNone) != made) invalid("the keys and values that are kept are not made from the same input");
    if (has_kept_cache()) {
      const Array& cache = caches_[kKeptCache + i];
      const bool has_shape =
          cache.dims == 4 && cache.size[0] == batch_ && cache.size[1] == caches_[kKeptCache].size[1] &&
          cache.size[2] == (made ? x.length : caches_[kKeptCache].size[2]) &&
          (!made || cache.size[1] * cache.size[3] == x.columns) && cache.has_contiguous_rows() && cache.on_cpu;
      if (!has_shape)
        invalid(std::string("the cache of kept ") + (i ? "values" : "keys") + " has shape " + cache.shape() +
                ", expected [" + text(batch_) + ", heads, " + (made ? text(x.length) : "tokens") + ", D]" +
                (made ? " with heads * D = " + text(x.columns) : "") + ", vectors contiguous, on the CPU");
      if (cache.type != call_.hidden.type) not_served("a cache of kept keys has another dtype than hidden");
      make(step.results[i], cache.size[1] * cache.size[3], cache.size[2]);
    } else {
      make(step.results[i], x.columns, x.length);
    }
    values_[step.results[i]].held = Held::kept;
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
  if (k.length != v.length || k.held != v.held || q.length != length_)
    invalid("attention: the keys are of other tokens than the values, or the queries than hidden's");
  const int64_t heads = q.columns / dim, kv_heads = k.columns / dim;
  if (const Array* const cache = cache_of(k, 0); cache && cache->size[1] != kv_heads)
    invalid("attention: the cache has " + text(cache->size[1]) + " heads, expected " + text(kv_heads));
  check_scores(step, heads, keys_of(k));
  make(step.results[0], heads * (v.columns / kv_heads), length_);
}

// A vector that a place of one tensor is.
const Array& Layer::vector_of(int parameter, int64_t size) const {
  const Array& found = tensor_of(parameter);
  const std::string place = "@" + program_.parameters[parameter].path;
  if (!found || !found.is_vector(size) || !found.on_cpu)
    invalid(place + " has shape " + found.shape() + ", expected [" + text(size) + "], contiguous, on the CPU");
  if (!found.is_floating()) not_served(place + " is not fp32, bf16 or fp16");
  return found;
}

// Check the bias and mask of the scores.
void Layer::check_scores(const Step& step, int64_t heads, int64_t keys) const {
  if (const Array* const mask = mask_of(step)) check_mask(*mask, name(step.values[3]).c_str(), heads, keys);
  if (step.values.size() > 3 && !values_[step.values[3]].array)
    invalid("attention: " + name(step.values[3]) + " is no input of the program, as a mask has to be");
  if (step.window == 0) invalid("attention: window is 0, expected the number of keys that a query sees, at least 1");
  if (step.sinks != kNone) vector_of(step.sinks, heads);
  if (step.slopes != kNone) vector_of(step.slopes, heads);
  if (step.bias == kNone) return;
  if (step.slopes != kNone) invalid("attention: it has a bias and slopes, expected one of them");
  if (!values_[step.bias].array) invalid("attention: " + name(step.bias) + " is no input of the program");
  const Array* const bias = bias_of(step);
  if (!bias) return;
  if (!bias->is_floating()) not_served(name(step.bias) + " is not fp32, bf16 or fp16");
  const int64_t all = bias->dims < 1 || bias->dims > Array::kMostDims ? 0 : bias->size[bias->dims - 1];
  const auto broadcasts = [](int64_t size, int64_t full) { return size == 1 || size == full; };
  const bool by_head = bias->dims == 3 && bias->size[0] == batch_ * heads && broadcasts(bias->size[1], length_);
  const bool full = bias->dims == 4 && broadcasts(bias->size[0], batch_) && broadcasts(bias->size[1], heads) &&
                    broadcasts(bias->size[2], length_);
  if ((!by_head && !full) || all < keys)
    invalid(name(step.bias) + " has shape " + bias->shape() + ", expected one that broadcasts to [" + text(batch_) +
            ", " + text(heads) + ", " + text(length_) + ", at least " + text(keys) + "], or [" + text(batch_ * heads) +
            ", 1, at least " + text(keys) + "]");
}

void Layer::check_elementwise(const Step& step) {
  const Value& a = rows_of(step.values[0], step);
  if (step.values.size() > 1) {
    const Value& b = rows_of(step.values[1], step);
    if (a.columns != b.columns || a.length != b.length)
      invalid(name(step.values[0]) + " and " + name(step.values[1]) + " have different shapes in " + step.text);
  }
  if (step.by != kNone && vector_of(step.by, a.columns).type != call_.hidden.type)
    not_served("@" + program_.parameters[step.by].path + " has another dtype than hidden");
  make(step.results[0], a.columns, a.length);
}

bool Layer::is_native(const Weight& weight, int64_t rows) const {
  if (rows <= kFewRows || weight.wide || linear_keeps_rows_alone()) return true;
  return !weight.turned &&
         (weight.type == WeightType::s8 || weight.type == WeightType::packed || linear_takes_many_rows(weight.type));
}

// True if the launcher's epilogue does everything that the step does with the product.
bool Layer::fuses(size_t index, size_t place) const {
  const Step& step = program_.steps[index];
  const Weight& weight = weights_[first_weight_[index] + place];
  return is_native(weight, rows(values_[step.values[0]])) && !weight.period && !weight.turned && !step.gated &&
         is_in_epilogues(step.activation) && (step.multiplier == 1 || step.residual != kNone);
}

bool Layer::is_native() const {
  for (size_t i = 0; i < program_.steps.size(); ++i) {
    const Step& step = program_.steps[i];
    if (skipped_[i] || (step.op != Op::linear && step.op != Op::route && step.op != Op::experts)) continue;
    for (const Weight& weight : weights_of(i))
      if (!is_native(weight, rows(values_[step.values[0]]))) return false;
  }
  return true;
}

}  // namespace llmkern::layers
