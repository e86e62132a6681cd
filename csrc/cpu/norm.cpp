// norm on the CPU: rms_norm and layer_norm, with a residual sum before and int8 quantization after.
// threads  a thread per block of rows; what it needs of the parameters it widens to fp32 once.
// passes   Each row is read from memory once, then from the cache:
//            1. the sum with the residual, rounded and written to total, which is the row from then on
//            2. to fp32, on the stack   3. mean (layer only)   4. mean square of the centred values   5. the result
//          The variance is that of centred values, so that a large mean costs no digits.
// long     Rows and parameters beyond what the stack keeps are widened each time they are read.
// order    All arithmetic is in fp32, in an order that depends neither on the number of threads nor on the row's
//          neighbours.
#include "llmkern/norm.h"

#include "int8.h"
#include "isa.h"
#include "norm_parameter.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // below this, waking a thread costs more than it saves

// Σ f(x[i]).  Four accumulators: one alone would wait for its own addition, four cycles, at every step.  Blocks are
// added up apart, so that long rows lose no accuracy.
template <class T, class F>
float sum_of(const T* x, int64_t hidden, const F& f) {
  constexpr int64_t kStep = 4 * kLanes, kBlock = 16 * kStep;
  F32 total = {};
  int64_t i = 0;
  while (i + kStep <= hidden) {
    const int64_t end = hidden - i < kBlock ? hidden : i + kBlock;
    F32 acc[4] = {};
    for (; i + kStep <= end; i += kStep)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[j] += f(load(x + i + j * kLanes));
    total += (acc[0] + acc[1]) + (acc[2] + acc[3]);
  }
  for (; i + kLanes <= hidden; i += kLanes) total += f(load(x + i));
  if (const int n = hidden - i; n > 0) total += first(f(load_first(x + i, n)), n);
  return sum(total);
}

template <bool kLong, class T>
void rows(const NormParams& p, int64_t begin, int64_t end) {
  alignas(64) float kept_row[kKept], kept_weight[kKept], kept_bias[kKept];
  const Parameter<kLong> weight(p.weight, p.weight_dtype, p.weight_offset, p.hidden, kept_weight);
  const Parameter<kLong> bias(p.bias, p.bias_dtype, 0.0f, p.hidden, kept_bias);
  const float count = static_cast<float>(p.hidden);

  const auto normalize = [&](const auto* row, int64_t r) {
    float mean_of_row = 0.0f;
    if (p.norm == Norm::layer) mean_of_row = sum_of(row, p.hidden, [](F32 v) { return v; }) / count;
    const F32 mean = broadcast(mean_of_row);
    const float square = sum_of(row, p.hidden, [mean](F32 v) { return (v - mean) * (v - mean); }) / count;
    const F32 rstd = broadcast(1.0f / __builtin_sqrtf(square + p.eps));
    const auto value = [=](int64_t i, int n) {
      F32 y = (load_at_most(row + i, n) - mean) * rstd;
      if (weight.values) y *= weight.at(i, n);
      if (bias.values) y += bias.at(i, n);
      return y;
    };
    if (p.scale) {
      p.scale[r] = quantize_computed(value, p.hidden, p.codes + r * p.hidden);
      return;
    }
    T* out = static_cast<T*>(p.out) + p.out_rows.offset(r);
    for_registers(p.hidden, [=](int64_t i, int n) { store_at_most(out + i, value(i, n), n); });
  };

  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(r);
    if (p.residual) {
      const T* residual = static_cast<const T*>(p.residual) + p.residual_rows.offset(r);
      T* total = static_cast<T*>(p.total) + p.total_rows.offset(r);
      for_registers(p.hidden, [=](int64_t i, int n) {
        store_at_most(total + i, load_at_most(x + i, n) + load_at_most(residual + i, n), n);
      });
      x = total;
    }
    if constexpr (kLong || sizeof(T) == 4) {
      normalize(x, r);
    } else {
      for_registers(p.hidden, [&](int64_t i, int n) { store_at_most(kept_row + i, load_at_most(x + i, n), n); });
      normalize(kept_row, r);
    }
  }
}

}  // namespace

void norm(const NormParams& p, const Threads& threads) {
  const int64_t grain = kElementsPerThread / (p.hidden + 1) + 1;
  with_type(p.dtype, [&]<class T>() {
    threads.parallel_for(p.x_rows.count, grain, [&](int64_t begin, int64_t end) {
      p.hidden <= kKept ? rows<false, T>(p, begin, end) : rows<true, T>(p, begin, end);
    });
  });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(norm, NormParams)
