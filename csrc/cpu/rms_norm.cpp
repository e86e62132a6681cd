// rms_norm on the CPU: a thread per block of rows; each row is read twice, the second time from the cache.
// All arithmetic is in fp32, in an order that depends neither on the number of threads nor on the row's neighbours.
#include "llmkern/rms_norm.h"

#include "isa.h"
#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // below this, waking a thread costs more than it saves

// Four accumulators: one alone would wait for its own addition, four cycles, at every step.
template <class T>
float sum_of_squares(const T* x, int64_t hidden) {
  F32 acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= hidden; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) {
      const F32 v = load(x + i + j * kLanes);
      acc[j] += v * v;
    }
  for (; i + kLanes <= hidden; i += kLanes) {
    const F32 v = load(x + i);
    acc[0] += v * v;
  }
  if (i < hidden) {
    const F32 v = load_first(x + i, hidden - i);
    acc[1] += v * v;
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// bias is rare, so its type is looked up as it is read instead of being a template parameter.
F32 load_bias(const RmsNormParams& p, int64_t i, int n) {
  return with_type(p.bias_dtype, [&]<class B>() {
    const B* bias = static_cast<const B*>(p.bias) + i;
    return n == kLanes ? load(bias) : load_first(bias, n);
  });
}

template <class T, class W>
void rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  const W* weight = static_cast<const W*>(p.weight);
  const F32 offset = broadcast(p.weight_offset);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(p.x) + p.rows.offset(r);
    T* out = static_cast<T*>(p.out) + r * p.hidden;
    const float mean = sum_of_squares(x, p.hidden) / static_cast<float>(p.hidden);
    const F32 rstd = broadcast(1.0f / __builtin_sqrtf(mean + p.eps));
    int64_t i = 0;
    for (; i + kLanes <= p.hidden; i += kLanes) {
      F32 y = load(x + i) * rstd;
      if (weight) y *= load(weight + i) + offset;
      if (p.bias) y += load_bias(p, i, kLanes);
      store(out + i, y);
    }
    if (const int n = p.hidden - i; n > 0) {
      F32 y = load_first(x + i, n) * rstd;
      if (weight) y *= load_first(weight + i, n) + offset;
      if (p.bias) y += load_bias(p, i, n);
      store_first(out + i, y, n);
    }
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, const Threads& threads) {
  const int64_t grain = kElementsPerThread / (p.hidden + 1) + 1;
  with_type(p.dtype, [&]<class T>() {
    with_type(p.weight_dtype, [&]<class W>() {
      threads.parallel_for(p.rows.count, grain, [&](int64_t begin, int64_t end) { rows<T, W>(p, begin, end); });
    });
  });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(rms_norm, RmsNormParams)
