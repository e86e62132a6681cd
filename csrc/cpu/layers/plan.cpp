// Memory plan of a layer: a value takes the place of one read for the last time if its launcher allows, else a piece
// of the arena for as long as they are read.
#include <algorithm>

#include "layer.h"

namespace llmkern::layers {

void Layer::plan() {
  const int count = static_cast<int>(program_.steps.size());
  plan_codes();
  for (int i = 0; i < count; ++i) {
    const Step& step = program_.steps[i];
    if (skipped_[i]) continue;
    if (defers(i)) {
      values_[step.results[0]].residual = step.residual;
      values_[step.residual].last = std::max(values_[step.residual].last, i + 1);
    }
    if (step.op == Op::append || step.op == Op::keep)  // what joins the cache may be read where it was made
      for (int j = 0; j < 2; ++j)
        values_[step.values[j]].last = std::max(values_[step.values[j]].last, values_[step.results[j]].last);
  }
  values_[program_.result].last = count;
  writes_out_ = count > 0 && may_write_out(program_.steps.back());
  for (int i = 0; i < count; ++i) {
    if (!skipped_[i]) plan_step(i);
    release(i);
  }
}

// Choose the values stored as int8 codes: those that every reader multiplies in int8.
void Layer::plan_codes() {
  for (const Step& step : program_.steps)
    for (const int result : step.results)
      values_[result].is_codes = values_[result].reads > 0 && result != program_.result;
  for (size_t i = 0; i < program_.steps.size(); ++i) {
    const Step& step = program_.steps[i];
    bool takes = step.op == Op::linear && !skipped_[i];
    for (size_t j = 0; takes && j < step.places.size(); ++j) takes = weights_[first_weight_[i] + j].w8a8;
    step.for_each_read([&](int value) {
      if (!takes || value != step.values[0] || value == step.residual) values_[value].is_codes = false;
    });
  }
  for (size_t i = 0; i < program_.steps.size(); ++i) {
    const Step& step = program_.steps[i];
    if (step.codes && !skipped_[i] && !values_[step.results[0]].is_codes)
      invalid(name(step.results[0]) + " is to be codes, which not all who read it take");
    const bool makes = !skipped_[i] && makes_codes(i);
    for (size_t j = 0; j < step.results.size(); ++j) values_[step.results[j]].is_codes &= j == 0 && makes;
  }
}

// A product's own epilogue makes numbers only, which its reader rounds.
bool Layer::makes_codes(size_t index) const {
  const Step& step = program_.steps[index];
  if (step.op != Op::linear) return step.op == Op::activation || (is_norm(step.op) && !step.dim);
  return step.activation != Activation::none && step.residual == kNone && step.multiplier == 1 &&
         step.results.size() == 1 && !fuses(index, 0);
}

// Does a product lie elsewhere before it becomes the step's result: codes, or a sum, which may lie where its residual
// does?
bool Layer::waits(size_t index) const {
  const Step& step = program_.steps[index];
  return values_[step.results[0]].is_codes || (step.residual != kNone && !fuses(index, 0));
}

// True if the next step, a norm, adds this product to its residual; a launcher's epilogue adds it itself.
bool Layer::defers(size_t index) const {
  const Step& step = program_.steps[index];
  if (step.op != Op::linear || step.residual == kNone || step.activation != Activation::none || step.multiplier != 1 ||
      index + 1 == program_.steps.size())
    return false;
  const Weight& weight = weights_[first_weight_[index]];
  if (weight.period || is_native(weight, rows(values_[step.values[0]]))) return false;
  const Step& next = program_.steps[index + 1];
  return is_norm(next.op) && !next.adds && !next.dim && next.values[0] == step.results[0];
}

// True if the last step writes directly to the layer's output, which may alias hidden.
bool Layer::may_write_out(const Step& step) const {
  if (std::find(step.results.begin(), step.results.end(), program_.result) == step.results.end()) return false;
  const bool reads_hidden = std::find(step.values.begin(), step.values.end(), 0) != step.values.end();
  return !reads_hidden || (is_norm(step.op) && !step.adds) || step.op == Op::add || step.op == Op::mul ||
         step.op == Op::scale || step.op == Op::clamp || step.op == Op::activation;
}

// Bytes of workspace that the launchers need for these products.
int64_t Layer::linear_bytes(std::span<const Weight> weights, int64_t count) const {
  int64_t bytes = 0;
  for (const Weight& w : weights)
    if (is_native(w, count))
      bytes = std::max(bytes, linear_workspace_bytes(count, w.k, w.w8a8 || w.type == WeightType::packed));
  return bytes;
}

// Bytes for whole products of which only the rows of a period are used.
int64_t Layer::whole_bytes(std::span<const Weight> weights, int64_t count) const {
  int64_t bytes = 0;
  for (size_t j = 0; j < weights.size(); ++j)
    if (weights[j].period && first_of_whole(weights, j) == j) bytes += padded_bytes(count * weights[j].n);
  return bytes;
}

void Layer::place(int value, int64_t bytes) {
  Value& v = values_[value];
  if (writes_out_ && value == program_.result) return;
  v.bytes = bytes;
  v.offset = arena_.take(bytes);
  v.owned = true;
}

// Place `value` in the memory of `from`, if nothing reads `from` any more.
bool Layer::steal(int value, int from, int step) {
  Value &v = values_[value], &f = values_[from];
  if (writes_out_ && value == program_.result) return false;
  if (f.last != step || !f.owned || f.is_codes || f.columns != v.columns || f.length != v.length) return false;
  v.offset = f.offset, v.bytes = f.bytes, v.stolen_from = from;
  v.owned = true, f.owned = false;
  return true;
}

void Layer::plan_step(size_t index) {
  const Step& step = program_.steps[index];
  const int i = static_cast<int>(index);
  StepScratch& scratch = scratch_[index];
  const auto numbers = [&](int value) { return rows(values_[value]) * values_[value].columns * element_bytes(); };
  const auto place_result = [&](int value) {
    if (!values_[value].is_codes) return place(value, numbers(value));
    place(value, codes_bytes(values_[value]) + rows(values_[value]) * static_cast<int64_t>(sizeof(float)));
  };
  switch (step.op) {
    case Op::linear: {
      const std::span<const Weight> weights = weights_of(index);
      const int64_t count = rows(values_[step.values[0]]);
      scratch.linear_bytes = linear_bytes(weights, count);
      scratch.linear = arena_.take(scratch.linear_bytes);
      for (const int value : step.results) place_result(value);
      scratch.whole_bytes = whole_bytes(weights, count);
      scratch.whole = arena_.take(scratch.whole_bytes);
      if (waits(index)) scratch.gate = arena_.take(count * weights[0].columns() * element_bytes());
      if (step.gated) scratch.up = arena_.take(count * weights[0].columns() * element_bytes());
      break;
    }
    case Op::rope:
      for (size_t j = 0; j + 2 < step.values.size(); ++j) {
        if ((values_[step.results[j]].in_cache = goes_to_cache(step.results[j]))) continue;
        if (!steal(step.results[j], step.values[j], i)) place_result(step.results[j]);
      }
      break;
    case Op::route:
    case Op::experts:
      plan_experts(index);
      place_result(step.results[0]);
      break;
    case Op::append:
    case Op::keep:
      break;
    case Op::attention:
      if (reads_codes(step)) {
        const int64_t keys = call_.past + length_;
        scratch.read_k = arena_.take(batch_ * keys * values_[step.values[1]].columns * element_bytes());
        scratch.read_v = arena_.take(batch_ * keys * values_[step.values[2]].columns * element_bytes());
      }
      place_result(step.results[0]);
      scratch.attention_bytes = decodes(step) ? attention_decode_workspace_bytes(decode_params(step))
                                              : attention_workspace_bytes(attention_params(step, scratch));
      scratch.attention = arena_.take(scratch.attention_bytes);
      break;
    default:
      if (step.adds) place_result(step.results[1]);
      if (values_[step.results[0]].is_codes || step.adds || !steal(step.results[0], step.values[0], i))
        place_result(step.results[0]);
  }
}

// Free the values that nothing reads after this step.
void Layer::release(int step) {
  StepScratch& scratch = scratch_[step];
  const Step& of = program_.steps[step];
  const bool multiplies = of.op == Op::linear && !skipped_[step];
  const auto give = [&](int64_t at, int64_t bytes) {
    if (at >= 0) arena_.give_back(at, bytes);
  };
  give(scratch.linear, scratch.linear_bytes);
  give(scratch.whole, scratch.whole_bytes);
  give(scratch.experts, scratch.experts_bytes);
  give(scratch.attention, scratch.attention_bytes);
  if (multiplies) {
    const int64_t bytes = rows(values_[of.values[0]]) * weights_[first_weight_[step]].columns() * element_bytes();
    give(scratch.gate, bytes);
    give(scratch.up, bytes);
  }
  if (of.op == Op::attention) {
    const int64_t tokens = batch_ * (call_.past + length_) * element_bytes();
    give(scratch.read_k, tokens * values_[of.values[1]].columns);
    give(scratch.read_v, tokens * values_[of.values[2]].columns);
  }
  for (Value& value : values_)
    if (value.owned && value.last <= step) {
      arena_.give_back(value.offset, value.bytes);
      value.owned = false;
    }
}

// Index of the cache that the value is written to.
size_t Layer::cache_index(int value) const {
  for (const Step& step : program_.steps)
    if (step.op == Op::append) return step.values[0] == value ? 0 : 1;
  return 0;
}

// True if the value is computed directly in its cache slot.
bool Layer::goes_to_cache(int value) const {
  if (!cached() || int8_cache() || values_[value].reads != 1) return false;
  const auto appends = [&](const Step& step) {
    return step.op == Op::append && step.repeat == 1 &&
           std::find(step.values.begin(), step.values.end(), value) != step.values.end();
  };
  return std::any_of(program_.steps.begin(), program_.steps.end(), appends);
}

}  // namespace llmkern::layers
