// A layer as a program: what llmkern/programs/program.py writes, parsed.  That file has the form and its meaning.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "llmkern/activation.h"
#include "llmkern/layers.h"

namespace llmkern::layers {

enum class Op : int8_t {
  rms_norm,
  layer_norm,
  linear,
  rope,
  route,
  experts,
  append,
  keep,
  attention,
  add,
  mul,
  scale,
  clamp,
  activation
};

constexpr bool is_norm(Op op) {
  return op == Op::rms_norm || op == Op::layer_norm;
}

// The tensors that a program mentions under one path, in the order of the first mention.
struct Parameter {
  enum Kind : int8_t { linear, norm, tensor };

  Kind kind;
  std::string path;
  size_t first;  // of its tensors in the layer's list: weight, scale, bias; weight, bias; or the tensor

  size_t tensors() const { return kind == linear ? 3 : kind == norm ? 2 : 1; }
};

// Rows begin to end of every `period` of a linear layer's; period 0: of all.  end 0: all rows.
struct Place {
  size_t parameter = 0;
  int64_t begin = 0, end = 0, period = 0;
  std::string text;
};

constexpr int kNone = -1;

// Values are numbered in the order in which they are made, the inputs first; a name that is assigned again is another
// value.
struct Step {
  Op op = Op::linear;
  std::vector<int> results, values;
  std::vector<Place> places;
  std::string text;  // as written, for sentences

  // Options, in the form that the kernels take them.
  double eps = 0, offset = 0, multiplier = 1, scale = 1, softcap = 0, low = 0, high = 0, limit = 0;
  int64_t dim = 0, rotary = 0, window = -1, top = 0, groups = 1, group_top = 1, repeat = 1;
  Activation activation = Activation::none;
  bool gated = false;  // the activation of the first of two results, times the second
  bool adds = false;   // a norm of a sum, which is the second result
  bool sigmoid = false, normalized = false, wide = false;
  bool codes = false, interleaved = false, half = false, causal = false, has_low = false, has_high = false;
  int residual = kNone, bias = kNone;                                 // values
  int sinks = kNone, slopes = kNone, by = kNone, correction = kNone;  // parameters

  // f(value) for each value that the step reads.
  template <class F>
  void for_each_read(const F& f) const {
    for (const int value : values) f(value);
    if (residual != kNone) f(residual);
    if (bias != kNone) f(bias);
  }
};

struct Program {
  std::vector<std::string> inputs, names;  // of all values
  std::vector<Step> steps;
  std::vector<Parameter> parameters;
  int result = 0;
  size_t tensors = 0;    // of all parameters
  size_t linears = 0;    // parameters that are linear layers
  bool appends = false;  // keys and values join those of a cache
  bool keeps = false;    // keys and values of other tokens are kept in a cache

  size_t values() const { return names.size(); }
};

// Throws Invalid with the line that is wrong.  Whatever the text is, nothing else happens.
Program parse(std::string_view text);

}  // namespace llmkern::layers
