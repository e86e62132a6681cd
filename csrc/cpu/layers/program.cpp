// The parser of programs: a table of operators, as in llmkern/programs/program.py, and a reader of lines.
#include "program.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <unordered_map>

namespace llmkern::layers {
namespace {

constexpr size_t kMostText = 1 << 16, kMostLines = 512;
constexpr int kMany = 64;

enum class Kind { flag, whole, number, word, value, place, number_or_place };

struct Option {
  std::string_view name;
  Kind kind;
};

constexpr Option kNormOptions[] = {
    {"eps", Kind::number}, {"offset", Kind::number}, {"dim", Kind::whole}, {"codes", Kind::flag}};
constexpr Option kLinearOptions[] = {
    {"activation", Kind::word}, {"codes", Kind::flag}, {"multiplier", Kind::number}, {"residual", Kind::value}};
constexpr Option kRopeOptions[] = {
    {"dim", Kind::whole}, {"rotary", Kind::whole}, {"interleaved", Kind::flag}, {"half", Kind::flag}};
constexpr Option kAttentionOptions[] = {{"dim", Kind::whole},    {"scale", Kind::number},   {"causal", Kind::flag},
                                        {"window", Kind::whole}, {"softcap", Kind::number}, {"sinks", Kind::place},
                                        {"slopes", Kind::place}, {"bias", Kind::value}};
constexpr Option kRouteOptions[] = {{"top", Kind::whole},    {"sigmoid", Kind::flag},    {"normalized", Kind::flag},
                                    {"eps", Kind::number},   {"scale", Kind::number},    {"wide", Kind::flag},
                                    {"groups", Kind::whole}, {"group_top", Kind::whole}, {"correction", Kind::place}};
constexpr Option kExpertsOptions[] = {{"activation", Kind::word}, {"limit", Kind::number}, {"offset", Kind::number}};
constexpr Option kAppendOptions[] = {{"repeat", Kind::whole}};
constexpr Option kScaleOptions[] = {{"by", Kind::number_or_place}};
constexpr Option kClampOptions[] = {{"low", Kind::number}, {"high", Kind::number}};
constexpr std::string_view kNormRequired[] = {"eps"}, kRopeRequired[] = {"dim"},
                           kAttentionRequired[] = {"dim", "scale"}, kScaleRequired[] = {"by"},
                           kRouteRequired[] = {"top"}, kExpertsRequired[] = {"activation"};

enum class Results { one, two, places, turned };

struct Operator {
  std::string_view name;
  Op op;
  int least_values, most_values, least_places, most_places;
  Results results;
  std::span<const Option> options;
  std::span<const std::string_view> required;
  Activation activation = Activation::none;
  bool adds = false;
};

constexpr Operator kOperators[] = {
    {"rms_norm", Op::rms_norm, 1, 1, 1, 1, Results::one, kNormOptions, kNormRequired},
    {"layer_norm", Op::layer_norm, 1, 1, 1, 1, Results::one, kNormOptions, kNormRequired},
    {"add_rms_norm", Op::rms_norm, 2, 2, 1, 1, Results::two, kNormOptions, kNormRequired, {}, true},
    {"add_layer_norm", Op::layer_norm, 2, 2, 1, 1, Results::two, kNormOptions, kNormRequired, {}, true},
    {"linear", Op::linear, 1, 1, 1, kMany, Results::places, kLinearOptions, {}},
    {"route", Op::route, 1, 1, 1, 1, Results::one, kRouteOptions, kRouteRequired},
    {"experts", Op::experts, 2, 2, 2, 3, Results::one, kExpertsOptions, kExpertsRequired},
    {"rope", Op::rope, 3, 4, 0, 0, Results::turned, kRopeOptions, kRopeRequired},
    {"append", Op::append, 2, 2, 0, 0, Results::two, kAppendOptions, {}},
    {"keep", Op::keep, 2, 2, 0, 0, Results::two, {}, {}},
    {"attention", Op::attention, 3, 4, 0, 0, Results::one, kAttentionOptions, kAttentionRequired},
    {"add", Op::add, 2, 2, 0, 0, Results::one, {}, {}},
    {"mul", Op::mul, 2, 2, 0, 0, Results::one, {}, {}},
    {"scale", Op::scale, 1, 1, 0, 0, Results::one, kScaleOptions, kScaleRequired},
    {"clamp", Op::clamp, 1, 1, 0, 0, Results::one, kClampOptions, {}},
    {"gelu", Op::activation, 1, 1, 0, 0, Results::one, {}, {}, Activation::gelu},
    {"gelu_tanh", Op::activation, 1, 1, 0, 0, Results::one, {}, {}, Activation::gelu_tanh},
    {"silu", Op::activation, 1, 1, 0, 0, Results::one, {}, {}, Activation::silu},
    {"relu", Op::activation, 1, 1, 0, 0, Results::one, {}, {}, Activation::relu},
    {"quick_gelu", Op::activation, 1, 1, 0, 0, Results::one, {}, {}, Activation::quick_gelu},
    {"relu2", Op::activation, 1, 1, 0, 0, Results::one, {}, {}, Activation::relu2},
};

struct Gate {
  std::string_view name;
  Activation activation;
};

constexpr Gate kGates[] = {{"swiglu", Activation::silu},
                           {"geglu", Activation::gelu},
                           {"geglu_tanh", Activation::gelu_tanh},
                           {"reglu", Activation::relu},
                           {"quick_geglu", Activation::quick_gelu}};

template <class Table>
auto find(const Table& table, std::string_view name) {
  const auto found =
      std::find_if(std::begin(table), std::end(table), [&](const auto& row) { return row.name == name; });
  return found == std::end(table) ? nullptr : &*found;
}

bool is_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

std::string_view stripped(std::string_view text) {
  while (!text.empty() && is_space(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
  return text;
}

bool is_name(std::string_view text) {
  return !text.empty() && is_letter(text[0]) &&
         std::all_of(text.begin(), text.end(), [](char c) { return is_letter(c) || is_digit(c); });
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.push_back(stripped(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  return parts;
}

// Quote a text in a message: printable and short.
std::string quoted(std::string_view text) {
  std::string shown;
  for (const char c : text.substr(0, 80)) shown += c >= ' ' && c <= '~' ? c : '?';
  return shown + (text.size() > 80 ? "..." : "");
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text;
  ((text += parts), ...);
  throw Invalid(text);
}

template <class T>
std::optional<T> number(std::string_view text) {
  T value{};
  const char* const end = text.data() + text.size();
  const auto [at, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || at != end) return std::nullopt;
  return value;
}

// A name and what is in the brackets behind it: name(...).
struct Called {
  std::string_view name, inside;
};

std::optional<Called> called(std::string_view text) {
  const size_t open = text.find('(');
  if (open == text.npos || text.back() != ')') return std::nullopt;
  const std::string_view inside = text.substr(open + 1, text.size() - open - 2);
  if (inside.find_first_of("()") != inside.npos) return std::nullopt;
  return Called{stripped(text.substr(0, open)), inside};
}

class Parser {
 public:
  Program parse(std::string_view text) {
    if (text.size() > kMostText)
      fail("program: it has ", std::to_string(text.size()), " bytes, expected at most 65536");
    std::vector<std::string_view> lines;
    for (const std::string_view line : split(text, '\n'))
      if (!line.empty()) lines.push_back(line);
    if (lines.size() > kMostLines) fail("program: it has more than 512 lines");
    head(lines.empty() ? std::string_view() : lines[0]);
    for (size_t i = 1; i + 1 < lines.size(); ++i) {
      try {
        step(lines[i]);
      } catch (const Invalid& error) {
        fail("program, line ", std::to_string(i + 1), ": ", error.what());
      }
    }
    last(lines.back(), lines.size());
    return std::move(program_);
  }

 private:
  void head(std::string_view line) {
    const std::optional<Called> head = line.empty() ? std::nullopt : called(line);
    if (!head || head->name != "layer") fail("program, line 1: ", quoted(line), ", expected layer(hidden, ...)");
    for (const std::string_view name : split(head->inside, ',')) {
      if (!is_name(name) || known_.contains(name))
        fail("program, line 1: the inputs are ", quoted(head->inside), ", expected different names");
      program_.inputs.emplace_back(name);
      known_[name] = value(name);
    }
  }

  void last(std::string_view line, size_t lines) {
    constexpr std::string_view kReturn = "return";
    const bool returns =
        lines > 1 && line.starts_with(kReturn) && line.size() > kReturn.size() && is_space(line[kReturn.size()]);
    const std::string_view name = returns ? stripped(line.substr(kReturn.size())) : std::string_view();
    if (!is_name(name))
      fail("program, line ", std::to_string(lines), ": ", quoted(line), ", expected return and a value");
    if (!known_.contains(name)) fail("program: it returns ", quoted(name), ", which no step makes");
    program_.result = known_[name];
  }

  int value(std::string_view name) {
    program_.names.emplace_back(name);
    return static_cast<int>(program_.names.size()) - 1;
  }

  void step(std::string_view line) {
    const size_t equals = line.find('=');
    const std::optional<Called> call =
        equals == line.npos || equals + 1 == line.size() ? std::nullopt : called(stripped(line.substr(equals + 1)));
    const std::vector<std::string_view> results = split(line.substr(0, std::min(equals, line.size())), ',');
    if (!call || !is_name(call->name) || !std::all_of(results.begin(), results.end(), is_name))
      fail(quoted(line), ", expected names = operator(arguments)");
    const Operator* const op = find(kOperators, call->name);
    if (!op) fail("there is no operator ", quoted(call->name));
    Step step;
    step.op = op->op;
    step.activation = op->activation, step.adds = op->adds;
    step.text = quoted(line);
    size_t next_option = 0;  // options come in their order
    std::vector<std::string_view> given;
    for (const std::string_view argument :
         stripped(call->inside).empty() ? std::vector<std::string_view>() : split(call->inside, ',')) {
      const size_t at = argument.find('=');
      const std::string_view name = stripped(argument.substr(0, at));
      const Option* const option = find(op->options, name);
      if (at != argument.npos || (option && option->kind == Kind::flag)) {
        if (!option) fail("there is no option ", quoted(name));
        const size_t index = option - op->options.data();
        if (index < next_option) fail("the option ", quoted(name), " is given twice, or out of order");
        next_option = index + 1;
        given.push_back(option->name);
        set(step, *option, at == argument.npos ? std::nullopt : std::optional(stripped(argument.substr(at + 1))));
      } else if (!given.empty()) {
        fail(quoted(argument), " stands behind an option");
      } else if (known_.contains(argument) && step.places.empty() &&
                 static_cast<int>(step.values.size()) < op->most_values) {
        step.values.push_back(known_[argument]);
      } else {
        step.places.push_back(place(argument, is_norm(step.op) ? Parameter::norm : Parameter::linear));
      }
    }
    check(*op, step, results.size(), given);
    for (const std::string_view name : results) step.results.push_back(value(name));
    for (size_t i = 0; i < results.size(); ++i) {
      if (std::count(results.begin(), results.end(), results[i]) > 1) fail("results have the same name");
      known_[results[i]] = step.results[i];
    }
    program_.appends |= step.op == Op::append;
    program_.keeps |= step.op == Op::keep;
    program_.steps.push_back(std::move(step));
  }

  static void check(const Operator& op, const Step& step, size_t results, const std::vector<std::string_view>& given) {
    const auto within = [](const char* what, size_t count, int least, int most) {
      if (static_cast<int>(count) < least || static_cast<int>(count) > most)
        fail(std::to_string(count), " ", what, ", expected ", std::to_string(least), " to ", std::to_string(most));
    };
    within("values", step.values.size(), op.least_values, op.most_values);
    within("places", step.places.size(), op.least_places, op.most_places);
    for (const std::string_view name : op.required)
      if (std::find(given.begin(), given.end(), name) == given.end()) fail(name, " is not given");
    const size_t gated = step.op == Op::experts ? 3 : 2;
    if (step.gated ? step.places.size() != gated : step.op == Op::experts && step.places.size() != 2)
      fail(step.gated ? "a gate" : "an activation", " takes ", std::to_string(step.gated ? gated : 2), " places, not ",
           std::to_string(step.places.size()));
    if (step.residual != kNone && results != 1) fail("a residual is for one result");
    size_t expected = op.results == Results::one ? 1 : 2;
    if (op.results == Results::places) expected = step.gated ? 1 : step.places.size();
    if (op.results == Results::turned) expected = step.values.size() - 2;
    if (results != expected) fail(std::to_string(results), " results, expected ", std::to_string(expected));
  }

  // text: nullopt for a flag without "=".
  void set(Step& step, const Option& option, std::optional<std::string_view> text) {
    const std::string_view name = option.name;
    const auto wrong = [&](const char* expected) {
      fail(name, " is ", text ? quoted(*text) : "a word", ", expected ", expected);
    };
    if (option.kind == Kind::flag) {
      if (text) wrong("nothing, as it is a flag");
      if (name == "codes") step.codes = true;
      if (name == "interleaved") step.interleaved = true;
      if (name == "half") step.half = true;
      if (name == "causal") step.causal = true;
      if (name == "sigmoid") step.sigmoid = true;
      if (name == "normalized") step.normalized = true;
      if (name == "wide") step.wide = true;
      return;
    }
    const bool whole = std::all_of(text->begin() + (text->starts_with('-') ? 1 : 0), text->end(), is_digit);
    if (option.kind == Kind::whole) {
      const std::optional<int64_t> value = number<int64_t>(*text);
      if (!value || *value < 0) wrong("a whole number");
      if (name == "dim") step.dim = *value;
      if (name == "rotary") step.rotary = *value;
      if (name == "window") step.window = *value;
      if (name == "top") step.top = *value;
      if (name == "repeat") step.repeat = *value;
      if (name == "groups") step.groups = *value;
      if (name == "group_top") step.group_top = *value;
    } else if (text->starts_with('@') && (option.kind == Kind::place || option.kind == Kind::number_or_place)) {
      const Place at = place(*text, Parameter::tensor);
      int& into = name == "sinks"        ? step.sinks
                  : name == "slopes"     ? step.slopes
                  : name == "correction" ? step.correction
                                         : step.by;
      into = static_cast<int>(at.parameter);
      if (at.end) wrong("a tensor, not rows of it");
    } else if (option.kind == Kind::number || option.kind == Kind::number_or_place) {
      const std::optional<double> value = whole ? std::nullopt : number<double>(*text);
      if (!value || !std::isfinite(*value)) wrong("a number with a point or an exponent");
      set_number(step, name, *value);
    } else if (option.kind == Kind::value) {
      const auto known = known_.find(*text);
      if (known == known_.end()) fail("there is no value ", quoted(*text));
      (name == "residual" ? step.residual : step.bias) = known->second;
    } else if (option.kind == Kind::word) {
      if (const Operator* const plain = find(kOperators, *text); plain && plain->op == Op::activation) {
        step.activation = plain->activation;
      } else if (const Gate* const gate = find(kGates, *text)) {
        step.activation = gate->activation, step.gated = true;
      } else {
        fail("there is no activation ", quoted(*text));
      }
    } else {
      wrong("a place, @path");
    }
  }

  static void set_number(Step& step, std::string_view name, double value) {
    if (name == "eps") step.eps = value;
    if (name == "offset") step.offset = value;
    if (name == "multiplier") step.multiplier = value;
    if (name == "scale" || name == "by") step.scale = value;
    if (name == "softcap") step.softcap = value;
    if (name == "limit") step.limit = value;
    if (name == "low") step.low = value, step.has_low = true;
    if (name == "high") step.high = value, step.has_high = true;
  }

  // path, @path, path[a:b] or path[a:b/n].
  Place place(std::string_view text, Parameter::Kind kind) {
    const auto wrong = [&] { fail(quoted(text), " is neither a value nor a place"); };
    Place place;
    place.text = text.substr(0, 200);
    std::string_view path = text;
    if (text.starts_with('@')) path.remove_prefix(1), kind = Parameter::tensor;
    if (const size_t open = path.find('['); open != path.npos) {
      if (!path.ends_with(']')) wrong();
      const std::string_view rows = path.substr(open + 1, path.size() - open - 2);
      const size_t colon = rows.find(':'), slash = rows.find('/');
      const bool periodic = slash != rows.npos;
      if (colon == rows.npos || (periodic && slash < colon)) wrong();
      const auto begin = number<int64_t>(rows.substr(0, colon));
      const auto end = number<int64_t>(rows.substr(colon + 1, periodic ? slash - colon - 1 : rows.npos));
      const auto period = periodic ? number<int64_t>(rows.substr(slash + 1)) : std::optional<int64_t>(0);
      if (!begin || !end || !period) wrong();
      if (*begin < 0 || *begin >= *end || *period < 0 || (*period && *end > *period))
        fail(quoted(text), ": there are no such rows");
      place.begin = *begin, place.end = *end, place.period = *period;
      path = path.substr(0, open);
    }
    const std::vector<std::string_view> parts = split(path, '.');
    const auto is_part = [](std::string_view part) {
      return !part.empty() && std::all_of(part.begin(), part.end(), [](char c) { return is_letter(c) || is_digit(c); });
    };
    if (!is_name(parts[0]) || !std::all_of(parts.begin(), parts.end(), is_part)) wrong();
    place.parameter = parameter(path, kind);
    return place;
  }

  size_t parameter(std::string_view path, Parameter::Kind kind) {
    std::vector<Parameter>& all = program_.parameters;
    for (size_t i = 0; i < all.size(); ++i)
      if (all[i].kind == kind && all[i].path == path) return i;
    all.push_back({kind, std::string(path), program_.tensors});
    program_.tensors += all.back().tensors();
    program_.linears += kind == Parameter::linear;
    return all.size() - 1;
  }

  Program program_;
  std::map<std::string_view, int> known_;
};

}  // namespace

Program parse(std::string_view text) {
  return Parser().parse(text);
}

bool appends(const Program& program) {
  return program.appends;
}

bool keeps(const Program& program) {
  return program.keeps;
}

size_t tensors_of(const Program& program) {
  return program.tensors;
}

std::shared_ptr<const Program> parsed(const std::string& text) {
  constexpr size_t kMostKept = 256;
  static std::mutex& mutex = *new std::mutex;
  static auto& kept = *new std::unordered_map<std::string, std::shared_ptr<const Program>>;
  const std::lock_guard lock(mutex);
  if (const auto found = kept.find(text); found != kept.end()) return found->second;
  auto program = std::make_shared<const Program>(parse(text));
  if (kept.size() >= kMostKept) kept.clear();
  return kept[text] = std::move(program);
}

}  // namespace llmkern::layers
