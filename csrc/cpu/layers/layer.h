// Layers of one form: a program with tensors of the same sizes and types, checked, and where its values lie.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "llmkern/attention.h"
#include "llmkern/attention_decode.h"
#include "llmkern/heads.h"
#include "llmkern/layers.h"
#include "llmkern/linear.h"
#include "llmkern/norm.h"
#include "program.h"
#include "scratch.h"

namespace llmkern::layers {

// With a floating-point weight and without instructions that multiply pairs of it, more rows than these are multiplied
// by the other library (oneDNN, MKL), which then reads the weight about as fast and multiplies faster.
inline constexpr int64_t kFewRows = 16;

// Rows of numbers, `stride` elements apart, or their int8 codes (contiguous) with a scale for each row.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
  int8_t* codes = nullptr;
  float* scale = nullptr;
};

// A linear layer's weight, or rows of it, as data: whatever else describes a weight goes here.  Rows of a period are
// taken of the product of the whole weight.
struct Weight {
  const void* w = nullptr;
  const float* scale = nullptr;  // [n]; null for floating weights
  const void* bias = nullptr;    // [n], in the layer's type
  size_t first = 0;              // of its tensors among the layer's
  int64_t begin = 0;             // of its rows among the tensor's
  int64_t n = 0, k = 0, stride = 0;
  int64_t period = 0, from = 0, width = 0;  // rows from … from + width of every `period`; period 0: all n
  WeightType type = WeightType::f32;
  PackedWeight packed = {};                                 // of its type
  bool turned = false;                                      // transposed: rows are adjacent, columns `stride` apart
  bool w8a8 = false;                                        // of s8: the input is rounded to int8 as well
  bool wide = false;                                        // the product is fp32, whatever the rows are
  int64_t experts = 0, expert_stride = 0, expert_rows = 0;  // of a weight [experts, n, k]; 0: of one [n, k]

  int64_t columns() const { return period ? n / period * width : n; }  // of the result
};

// Keys or values that attention finds in a cache, if there is one: with those before them, or as they were kept.
enum class Held : int8_t { no, appended, kept };

// A value of the program: rows [batch * length, columns].
struct Value {
  const Array* array = nullptr;  // of an input: the tensor, whatever it turns out to be
  int64_t columns = 0, length = 0;
  int last = kNone;  // the last step that reads it
  int reads = 0;     // how many do
  Held held = Held::no;
  int absent = kNone;  // the input that was not given, from which this value would be made
  int64_t top = 0;     // in a row at most so many numbers are not 0; 0: all may be

  // Place of the value, once planned.
  int64_t offset = -1, bytes = 0;  // in the arena; -1: elsewhere
  bool owned = false;              // the piece is given back when this value is not read any more
  int stolen_from = kNone;         // it lies where this one lay
  bool is_codes = false, in_cache = false;
  Matrix at;
  Matrix product;  // a sum that the next step, a norm, makes: `at` = product + residual
  int residual = kNone;
};

class Layer {
 public:
  // The form of the index-th layer of a call.  Throws Invalid or NotServed.  The call outlives it.
  Layer(const Call& call, size_t index, std::span<const Array> parameters);

  // True if the index-th layer of the call, with these parameters, has this form.
  bool fits(size_t index, std::span<const Array> parameters) const;

  // True if the launchers compute every product.
  bool is_native() const;

  int64_t scratch_bytes() const { return arena_.bytes(); }

  // Runs the index-th layer of the call, which has this form, with `scratch_bytes` of memory.
  void run(size_t index, std::span<const Array> parameters, char* scratch, void* in, void* out, const Threads& threads);

 private:
  [[noreturn]] void invalid(const std::string& what) const;
  [[noreturn]] void not_served(const std::string& what) const;

  // check.cpp: what each step reads, and the sizes of what it makes.
  void bind_inputs();
  void bind_schemes();
  void check(const Step& step);
  bool skips(const Step& step) const;
  void check_norm(const Step& step);
  void check_linear(const Step& step);
  void check_rope(const Step& step);
  void check_append(const Step& step);
  void check_keep(const Step& step);
  void check_attention(const Step& step);
  void check_scores(const Step& step, int64_t heads, int64_t keys) const;
  void check_elementwise(const Step& step);
  Value& rows_of(int value, const Step& step);
  void make(int value, int64_t columns, int64_t length);
  void check_route(const Step& step);
  void check_experts(const Step& step);  // experts.cpp
  Weight weight_of(const Place& place, int64_t k, bool of_experts = false) const;
  void point(Weight& weight) const;
  const Array& tensor(const Place& place, size_t part) const;
  static Array first_expert(const Array& t);
  const Array& tensor_of(int parameter) const { return parameters_[program_.parameters[parameter].first]; }
  const Array& vector_of(int parameter, int64_t size) const;
  void check_mask(const Array& mask, const char* name, int64_t heads, int64_t keys) const;
  const std::string& name(int value) const { return program_.names[value]; }
  bool is_native(const Weight& weight, int64_t rows) const;
  bool fuses(size_t index, size_t place) const;
  std::span<const Weight> weights_of(size_t index) const;

  // plan.cpp: where values lie.
  void plan();
  void plan_codes();
  bool makes_codes(size_t index) const;
  void plan_step(size_t index);
  void place(int value, int64_t bytes);
  bool steal(int value, int from, int step);
  void release(int step);
  bool waits(size_t index) const;
  bool defers(size_t index) const;
  bool may_write_out(const Step& step) const;
  bool goes_to_cache(int value) const;
  void plan_experts(size_t index);
  int64_t most_entries(const Step& step) const;
  int64_t linear_bytes(std::span<const Weight> weights, int64_t count) const;
  int64_t whole_bytes(std::span<const Weight> weights, int64_t count) const;

  // run.cpp: the launchers.
  struct StepScratch {
    int64_t linear = -1, linear_bytes = 0, gate = -1, up = -1, whole = -1, whole_bytes = 0;
    int64_t experts = -1, experts_bytes = 0;
    int64_t attention = -1, attention_bytes = 0, read_k = -1, read_v = -1;
  };
  void point_values(void* in, void* out);
  void run_step(size_t index);
  void run_norm(const Step& step);
  void run_linear(size_t index);
  // The residual that the product's epilogue adds; empty if it is added separately.
  struct Epilogue {
    Activation activation = Activation::none;
    Matrix residual = {};
    float multiplier = 1.0f;
  };
  Epilogue epilogue(size_t index, size_t place) const;
  void multiply(const Matrix& x, int64_t count, std::span<const Weight> weights, std::span<Matrix> outs,
                const Epilogue* epilogues, char* workspace, char* whole);
  void run_route(size_t index);
  void run_experts(size_t index);
  void run_expert(size_t index, int64_t e, int64_t count, const Matrix& x, Matrix gate, Matrix up, Matrix y);
  Matrix gather(const Value& x, const int32_t* which, int64_t count, char* to);
  void take_rows(const Weight& weight, const Matrix& whole, const Matrix& out, int64_t count);
  void finish(size_t index, size_t result, const Matrix& product, const Matrix* up);
  void run_rope(const Step& step);
  void run_append(const Step& step);
  void run_keep(const Step& step);
  void run_attention(size_t index);
  void run_elementwise(const Step& step);
  void activate(Activation activation, const Matrix& x, const Matrix* up, const Matrix& out, const Value& like);
  void add(const Matrix& a, const Matrix* b, const Matrix& out, const Value& like, float multiplier = 1.0f);
  void append(const Value& x, const Array& cache, const Array& scale, int64_t position, int64_t repeat = 1);
  void read(int which, char* to);
  const Array* mask_of(const Step& step) const;
  const Array* bias_of(const Step& step) const;
  const Array* cache_of(const Value& keys, size_t which) const;
  int64_t keys_of(const Value& keys) const { return keys.length + (keys.held == Held::appended ? call_.past : 0); }
  bool decodes(const Step& step) const;
  bool reads_codes(const Step& step) const;
  AttentionParams attention_params(const Step& step, const StepScratch& scratch) const;
  AttentionDecodeParams decode_params(const Step& step) const;
  template <class Params>
  void set_sinks(Params& p, const Step& step) const;

  bool cached() const { return program_.appends && !caches_.empty() && caches_[0]; }
  bool int8_cache() const { return cached() && caches_[2]; }
  bool has_kept_cache() const { return program_.keeps && !caches_.empty() && caches_[kKeptCache]; }
  bool is_out(int value) const { return writes_out_ && value == program_.result; }
  size_t cache_index(int value) const;
  char* at(int64_t offset) const { return block_ ? block_ + offset : nullptr; }  // null while planning
  int64_t rows(const Value& value) const { return batch_ * value.length; }
  int64_t element_bytes() const { return llmkern::size_of(dtype_); }
  int64_t padded_bytes(int64_t elements) const { return (elements * element_bytes() + 63) / 64 * 64; }
  int64_t codes_bytes(const Value& value) const { return (rows(value) * value.columns + 63) / 64 * 64; }
  Rows rows_of(const Value& value, const Matrix& x) const { return {.count = rows(value), .stride0 = x.stride}; }
  HeadStrides heads_of(const Value& value, const Matrix& x, int64_t dim) const {
    return {value.length * x.stride, dim, x.stride};
  }

  const Call& call_;
  size_t index_;  // of the layer, among the call's
  const Program& program_;
  std::span<const Array> parameters_, caches_;
  const DType dtype_;
  const int64_t batch_, length_, size_;
  std::string_view schemes_;  // the layer's share of the call's
  std::vector<bool> w8a8_;    // of each linear layer, in the order of the first mention
  std::vector<Value> values_;
  std::vector<Weight> weights_;       // of all steps, one for each place
  std::vector<size_t> first_weight_;  // of each step
  std::vector<bool> skipped_;         // steps that would make what a cache has kept

  std::vector<StepScratch> scratch_;
  Arena arena_;
  bool writes_out_ = false;  // the last step writes to where the result is to be
  char* block_ = nullptr;
  const Threads* threads_ = nullptr;
};

// The first of a step's weights that is rows of a period of the same tensor; its product serves them all.
size_t first_of_whole(std::span<const Weight> weights, size_t index);

// Parameters of the index-th layer of a call.
std::span<const Array> caches_of(const Call& call, size_t index);

}  // namespace llmkern::layers
