// Layers of routed experts: a router's weights of every row, and each expert's product of the rows that it serves,
// gathered one behind the other, so that an expert's weight is read once.
#include "llmkern/experts.h"

#include <algorithm>
#include <cstring>

#include "layer.h"
#include "llmkern/activate.h"
#include "llmkern/add.h"

namespace llmkern::layers {
namespace {

bool is_zero(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i] == 0.0f;
  return (static_cast<const uint16_t*>(p)[i] & 0x7fff) == 0;
}

// Assignment of rows to experts: the rows of each expert, and the experts of each row.
struct Entries {
  int32_t *of_expert, *of_row;        // [experts + 1], [rows + 1]: where an expert's, or a row's, entries begin
  int32_t *row, *expert, *at, *next;  // of an expert's entries the row; of a row's the expert, and which of the former
  static int64_t numbers(int64_t rows, int64_t experts, int64_t most) { return 2 * experts + rows + 2 + 3 * most; }

  Entries(char* memory, int64_t rows, int64_t experts, int64_t most)
      : of_expert(reinterpret_cast<int32_t*>(memory)),
        of_row(of_expert + experts + 1),
        row(of_row + rows + 1),
        expert(row + most),
        at(expert + most),
        next(at + most) {}

  void fill(const void* weights, DType dtype, int64_t rows, int64_t experts) {
    std::memset(of_expert, 0, (experts + 1) * sizeof(int32_t));
    int32_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      of_row[r] = count;
      for (int64_t e = 0; e < experts; ++e)
        if (!is_zero(weights, dtype, r * experts + e)) expert[count++] = static_cast<int32_t>(e), ++of_expert[e + 1];
    }
    of_row[rows] = count;
    for (int64_t e = 0; e < experts; ++e) of_expert[e + 1] += of_expert[e], next[e] = of_expert[e];
    for (int64_t r = 0; r < rows; ++r)
      for (int32_t i = of_row[r]; i < of_row[r + 1]; ++i) {
        at[i] = next[expert[i]]++;
        row[at[i]] = static_cast<int32_t>(r);
      }
  }
};

// Offsets of a step's buffers in its scratch memory.
struct Room {
  int64_t x, gate, up, y, bytes;

  Room(int64_t numbers, int64_t x_bytes, int64_t inner_bytes, int64_t y_bytes) {
    const auto behind = [](int64_t offset, int64_t size) { return offset + (size + 63) / 64 * 64; };
    x = behind(0, numbers * static_cast<int64_t>(sizeof(int32_t)));
    gate = behind(x, x_bytes);
    up = behind(gate, inner_bytes);
    y = behind(up, inner_bytes);
    bytes = behind(y, y_bytes);
  }
};

// View of one expert's slice of a weight.
Weight expert_of(Weight weight, int64_t e, int64_t element_bytes) {
  const int64_t bytes = weight.type == WeightType::s8 ? 1 : element_bytes;
  weight.w = static_cast<const char*>(weight.w) + e * weight.expert_stride * bytes;
  if (weight.scale) weight.scale += e * weight.expert_rows;
  if (weight.bias) weight.bias = static_cast<const char*>(weight.bias) + e * weight.expert_rows * element_bytes;
  return weight;
}

}  // namespace

void Layer::check_route(const Step& step) {
  const Value& x = rows_of(step.values[0], step);
  weights_.push_back(weight_of(step.places[0], x.columns));
  const int64_t experts = weights_.back().columns();
  if (step.top < 1 || step.top > experts)
    invalid("route: top is " + std::to_string(step.top) + ", expected 1 to " + std::to_string(experts) +
            ", the rows of " + step.places[0].text);
  if (experts > kMostExperts) not_served("route: more than " + std::to_string(kMostExperts) + " experts");
  const int64_t size = step.groups > 0 && experts % step.groups == 0 ? experts / step.groups : 0;
  if (step.groups != 1 && (size < 2 || step.group_top < 1 || step.group_top > step.groups))
    invalid("route: " + std::to_string(step.group_top) + " of " + std::to_string(step.groups) + " groups of " +
            std::to_string(experts) + " experts, expected groups of as many, at least 2");
  if (step.groups != 1 && step.top > step.group_top * size)
    invalid("route: top is " + std::to_string(step.top) + ", expected at most " +
            std::to_string(step.group_top * size) + ", the experts of group_top groups");
  if (step.correction != kNone) vector_of(step.correction, experts);
  weights_.back().wide = step.wide && dtype_ != DType::f32;
  if (weights_.back().wide && weights_.back().turned) not_served("route: wide, of a transposed weight");
  make(step.results[0], experts, x.length);
  values_[step.results[0]].top = step.top;
}

void Layer::check_experts(const Step& step) {
  const Value &x = rows_of(step.values[0], step), &r = rows_of(step.values[1], step);
  const size_t first = weights_.size(), inner = step.places.size() - 1;
  for (size_t j = 0; j < inner; ++j) weights_.push_back(weight_of(step.places[j], x.columns, true));
  weights_.push_back(weight_of(step.places[inner], weights_[first].columns(), true));
  if (step.gated && weights_[first].columns() != weights_[first + 1].columns())
    invalid(step.places[0].text + " and " + step.places[1].text + " make " + std::to_string(weights_[first].columns()) +
            " and " + std::to_string(weights_[first + 1].columns()) + " columns, expected as many");
  if (r.length != x.length) invalid(name(step.values[0]) + " and " + name(step.values[1]) + " are of different tokens");
  for (size_t j = 0; j <= inner; ++j)
    if (weights_[first + j].experts != r.columns)
      invalid(step.places[j].text + ": weight has " + std::to_string(weights_[first + j].experts) +
              " experts, expected " + std::to_string(r.columns) + ", the columns of " + name(step.values[1]));
  make(step.results[0], weights_.back().columns(), x.length);
}

int64_t Layer::most_entries(const Step& step) const {
  const Value& r = values_[step.values[1]];
  return rows(r) * (r.top ? r.top : r.columns);
}

void Layer::plan_experts(size_t index) {
  const Step& step = program_.steps[index];
  StepScratch& scratch = scratch_[index];
  const std::span<const Weight> weights = weights_of(index);
  const Value& x = values_[step.values[0]];
  const int64_t count = rows(x);
  // The fewer rows an expert serves, the more of its products are the launchers'.
  scratch.linear_bytes = std::max(linear_bytes(weights, count), linear_bytes(weights, std::min(count, kFewRows)));
  scratch.linear = arena_.take(scratch.linear_bytes);
  scratch.whole_bytes = whole_bytes(weights, count);
  scratch.whole = arena_.take(scratch.whole_bytes);
  scratch.experts_bytes = count * weights[0].columns() * static_cast<int64_t>(sizeof(float));  // a router's logits
  if (step.op == Op::experts) {
    const int64_t most = most_entries(step), numbers = Entries::numbers(count, weights[0].experts, most);
    scratch.experts_bytes = Room(numbers, padded_bytes(count * x.columns), padded_bytes(count * weights[0].columns()),
                                 padded_bytes(most * weights.back().columns()))
                                .bytes;
  }
  scratch.experts = arena_.take(scratch.experts_bytes);
}

void Layer::run_route(size_t index) {
  const Step& step = program_.steps[index];
  const StepScratch& scratch = scratch_[index];
  const Value &x = values_[step.values[0]], &made = values_[step.results[0]];
  Matrix logits[] = {{.data = at(scratch.experts), .stride = made.columns}};
  const Epilogue none;
  multiply(x.at, rows(x), weights_of(index), logits, &none, at(scratch.linear), at(scratch.whole));
  const Array* const correction = step.correction == kNone ? nullptr : &tensor_of(step.correction);
  launch_route({.logits = logits[0].data,
                .weights = made.at.data,
                .correction = correction ? correction->data : nullptr,
                .rows = rows(made),
                .experts = made.columns,
                .top = step.top,
                .groups = step.groups,
                .group_top = step.group_top,
                .dtype = dtype_,
                .logits_dtype = weights_of(index)[0].wide ? DType::f32 : dtype_,
                .correction_dtype = correction ? correction->dtype() : DType::f32,
                .sigmoid = step.sigmoid,
                .normalized = step.normalized,
                .eps = static_cast<float>(step.eps),
                .scale = static_cast<float>(step.scale)},
               *threads_);
}

void Layer::run_experts(size_t index) {
  const Step& step = program_.steps[index];
  const Value &x = values_[step.values[0]], &r = values_[step.values[1]], &made = values_[step.results[0]];
  const int64_t count = rows(x), experts = r.columns, most = most_entries(step);
  const int64_t inner = weights_of(index)[0].columns();
  char* const memory = at(scratch_[index].experts);
  const Room room(Entries::numbers(count, experts, most), padded_bytes(count * x.columns), padded_bytes(count * inner),
                  padded_bytes(most * made.columns));
  Entries entries(memory, count, experts, most);
  entries.fill(r.at.data, dtype_, count, experts);
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t first = entries.of_expert[e], served = entries.of_expert[e + 1] - first;
    if (served == 0) continue;
    const Matrix own = gather(x, entries.row + first, served, memory + room.x);
    Matrix gate{.data = memory + room.gate, .stride = inner}, up{.data = memory + room.up, .stride = inner};
    Matrix y{.data = memory + room.y + first * made.columns * element_bytes(), .stride = made.columns};
    run_expert(index, e, served, own, gate, up, y);
  }
  launch_combine({memory + room.y, r.at.data, entries.of_row, entries.expert, entries.at, made.at.data, count, experts,
                  made.columns, dtype_},
                 *threads_);
}

// Gather rows of x contiguously.
Matrix Layer::gather(const Value& x, const int32_t* which, int64_t count, char* to) {
  const auto row = [&](int64_t i) { return static_cast<char*>(x.at.data) + which[i] * x.at.stride * element_bytes(); };
  if (count == 1 || count == rows(x)) return {.data = row(0), .stride = x.at.stride};
  const int64_t bytes = x.columns * element_bytes();
  threads_->parallel_for(count, 65536 / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * bytes, row(i), bytes);
  });
  return {.data = to, .stride = x.columns};
}

// Compute y = down(activation(gate(x)) · up(x)) for `count` rows.
void Layer::run_expert(size_t index, int64_t e, int64_t count, const Matrix& x, Matrix gate, Matrix up, Matrix y) {
  const Step& step = program_.steps[index];
  const StepScratch& scratch = scratch_[index];
  std::vector<Weight> weights;
  for (const Weight& weight : weights_of(index)) weights.push_back(expert_of(weight, e, element_bytes()));
  const int64_t inner = weights[0].columns();
  const Epilogue none[2];
  Matrix made[] = {gate, up};
  multiply(x, count, std::span(weights).first(weights.size() - 1), std::span(made).first(weights.size() - 1), none,
           at(scratch.linear), at(scratch.whole));
  const float limit = static_cast<float>(step.limit), offset = static_cast<float>(step.offset);
  const auto limited = [&](const Matrix& m, float constant, float low) {
    AddParams p{m.data, nullptr, m.data, count * inner, dtype_};
    p.constant = constant;
    if (limit > 0.0f) p.low = low + constant, p.high = limit + constant;
    launch_add(p, *threads_);
  };
  if (limit > 0.0f) limited(made[0], 0.0f, -__builtin_inff());
  if (step.gated && (limit > 0.0f || offset != 0.0f)) limited(made[1], offset, -limit);
  const Rows rows = dense_rows(count, inner);
  launch_activate({.x = made[0].data,
                   .up = step.gated ? made[1].data : nullptr,
                   .out = gate.data,
                   .codes = nullptr,
                   .scale = nullptr,
                   .x_rows = rows,
                   .up_rows = rows,
                   .out_rows = rows,
                   .hidden = inner,
                   .dtype = dtype_,
                   .activation = step.activation},
                  *threads_);
  Matrix out[] = {y};
  multiply(gate, count, std::span(weights).last(1), out, none, at(scratch.linear), at(scratch.whole));
  if (out[0].data != y.data) std::memcpy(y.data, out[0].data, count * y.stride * element_bytes());
}

}  // namespace llmkern::layers
