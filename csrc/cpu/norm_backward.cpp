// norm_backward on the CPU: the gradients of rms_norm and layer_norm.
// parts    Rows are cut into parts, by their number alone; a thread takes whole parts.  Each part has its own sums for
//          the parameters' gradients in the workspace, and at the end columns are shared out to add up the parts.
// passes   Each row of x and dy is read from memory once, then from the cache:
//            1. mean (layer only)   2. mean square, and the means of g and g · n   3. dx, and what the row adds to the
//            sums
// order    All arithmetic is in fp32, in an order that does not depend on the number of threads.
#include "llmkern/norm_backward.h"

#include "isa.h"
#include "norm_parameter.h"
#include "sums.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kElementsPerThread = 8192;  // below this, waking a thread costs more than it saves

// One row: dx, and its addends of the parameters' gradients.
template <Norm kNorm, bool kLong, class T>
void row(const NormBackwardParams& p, const Parameter<kLong>& weight, int64_t r, float* dweight, float* dbias) {
  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(r);
  const T* const dy = static_cast<const T*>(p.dy) + p.dy_rows.offset(r);
  T* const dx = static_cast<T*>(p.dx) + r * p.hidden;
  const float count = static_cast<float>(p.hidden);
  const auto gradient = [&](int64_t i, int n) {
    const F32 d = load_at_most(dy + i, n);
    return weight.values ? d * weight.at(i, n) : d;
  };
  F32 mean = {}, mean_g = {};
  float square, product;
  if constexpr (kNorm == Norm::layer) {
    mean = broadcast(
        sums_of<1>(p.hidden, [&](int64_t i, int n) -> std::array<F32, 1> { return {load_at_most(x + i, n)}; })[0] /
        count);
    const auto sums = sums_of<3>(p.hidden, [&](int64_t i, int n) -> std::array<F32, 3> {
      const F32 v = load_at_most(x + i, n) - mean, g = gradient(i, n);
      return {v * v, g * v, g};
    });
    square = sums[0], product = sums[1], mean_g = broadcast(sums[2] / count);
  } else {
    const auto sums = sums_of<2>(p.hidden, [&](int64_t i, int n) -> std::array<F32, 2> {
      const F32 v = load_at_most(x + i, n), g = gradient(i, n);
      return {v * v, g * v};
    });
    square = sums[0], product = sums[1];
  }
  const float rstd_of_row = 1.0f / __builtin_sqrtf(square / count + p.eps);
  const F32 rstd = broadcast(rstd_of_row), mean_gn = broadcast(product * rstd_of_row / count);
  for_registers(p.hidden, [&](int64_t i, int n) {
    const F32 normed = (load_at_most(x + i, n) - mean) * rstd, d = load_at_most(dy + i, n);
    const F32 g = weight.values ? d * weight.at(i, n) : d;
    store_at_most(dx + i, rstd * (g - mean_g - normed * mean_gn), n);
    if (dweight) store_at_most(dweight + i, load_at_most(dweight + i, n) + d * normed, n);
    if (dbias) store_at_most(dbias + i, load_at_most(dbias + i, n) + d, n);
  });
}

template <Norm kNorm, bool kLong, class T>
void part(const NormBackwardParams& p, int64_t index, int64_t parts) {
  alignas(64) float kept_weight[kKept];
  const Parameter<kLong> weight(p.weight, p.weight_dtype, p.weight_offset, p.hidden, kept_weight);
  float* const dweight = p.dweight ? p.workspace + 2 * index * p.hidden : nullptr;
  float* const dbias = p.dbias ? p.workspace + (2 * index + 1) * p.hidden : nullptr;
  if (dweight) std::memset(dweight, 0, p.hidden * sizeof(float));
  if (dbias) std::memset(dbias, 0, p.hidden * sizeof(float));
  const int64_t rows = p.x_rows.count;
  for (int64_t r = index * rows / parts; r < (index + 1) * rows / parts; ++r)
    row<kNorm, kLong, T>(p, weight, r, dweight, dbias);
}

// The sums of all parts, of columns [begin, end) of one parameter's gradient.
void add_parts(const float* sums, int64_t parts, int64_t hidden, DType dtype, void* to, int64_t begin, int64_t end) {
  with_type(dtype, [&]<class P>() {
    for_registers(end - begin, [&](int64_t i, int n) {
      F32 total = {};
      for (int64_t index = 0; index < parts; ++index) total += load_at_most(sums + 2 * index * hidden + begin + i, n);
      store_at_most(static_cast<P*>(to) + begin + i, total, n);
    });
  });
}

template <Norm kNorm>
void run(const NormBackwardParams& p, const Threads& threads) {
  const int64_t rows = p.x_rows.count, parts = norm_backward_parts(rows);
  const int64_t part_elements = rows / (parts + 1) * p.hidden + 1;
  with_type(p.dtype, [&]<class T>() {
    threads.parallel_for(parts, kElementsPerThread / part_elements + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        p.hidden <= kKept ? part<kNorm, false, T>(p, i, parts) : part<kNorm, true, T>(p, i, parts);
    });
  });
  if (!p.dweight && !p.dbias) return;
  threads.parallel_for(p.hidden, kElementsPerThread / (parts + 1) + 1, [&](int64_t begin, int64_t end) {
    if (p.dweight) add_parts(p.workspace, parts, p.hidden, p.weight_dtype, p.dweight, begin, end);
    if (p.dbias) add_parts(p.workspace + p.hidden, parts, p.hidden, p.bias_dtype, p.dbias, begin, end);
  });
}

}  // namespace

void norm_backward(const NormBackwardParams& p, const Threads& threads) {
  p.norm == Norm::layer ? run<Norm::layer>(p, threads) : run<Norm::rms>(p, threads);
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(norm_backward, NormBackwardParams)
