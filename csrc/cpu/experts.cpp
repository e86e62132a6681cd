// route and combine on the CPU: a thread per block of rows, in fp32, each row by itself.
#include "llmkern/experts.h"

#include "isa.h"
#include "math.h"
#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kElementsPerThread = 8192;  // below this, waking a thread costs more than it saves

// True if a is chosen before b, which precedes it in the row.
inline bool is_more(float a, float b) {
  return a > b || (a != a && b == b);
}

// Compute scores[e] from one row's logits.
template <class T>
void score(const RouteParams& p, const T* logits, float* scores) {
  float largest = -__builtin_inff();
  for_registers(p.experts, [&](int64_t i, int n) { store_at_most(scores + i, load_at_most(logits + i, n), n); });
  for (int64_t e = 0; e < p.experts; ++e) largest = is_more(scores[e], largest) ? scores[e] : largest;
  const F32 top = broadcast(largest);
  float total = 0.0f;
  for_registers(p.experts, [&](int64_t i, int n) {
    const F32 logit = load_at_most(scores + i, n);
    store_at_most(scores + i, p.sigmoid ? 1.0f / (1.0f + exp(-logit)) : exp(logit - top), n);
  });
  if (p.sigmoid) return;
  for (int64_t e = 0; e < p.experts; ++e) total += scores[e];
  for_registers(p.experts, [&](int64_t i, int n) {
    store_at_most(scores + i, load_at_most(scores + i, n) / broadcast(total), n);
  });
}

// Keep exactly `top` weights, the largest (NaN included), and zero the rest: readers have room for `top` per row.
void keep_top(const RouteParams& p, float* scores) {
  float kept[kMostExperts] = {};
  int64_t chosen[kMostExperts];
  float total = 0.0f;
  for (int64_t i = 0; i < p.top; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < p.experts; ++e)
      if (scores[e] >= 0.0f || scores[e] != scores[e])
        if (best < 0 || is_more(scores[e], scores[best])) best = e;
    chosen[i] = best;
    kept[best] = scores[best];
    total += scores[best];
    scores[best] = -1.0f;  // taken: no score is negative
  }
  const float factor = p.normalized ? p.scale / total : p.scale;
  for (int64_t i = 0; i < p.top; ++i) kept[chosen[i]] *= factor;
  std::memcpy(scores, kept, p.experts * sizeof(float));
}

}  // namespace

void route(const RouteParams& p, const Threads& threads) {
  with_type(p.dtype, [&]<class T>() {
    threads.parallel_for(p.rows, kElementsPerThread / (p.experts * p.top + 1) + 1, [&](int64_t begin, int64_t end) {
      alignas(64) float scores[kMostExperts];
      for (int64_t r = begin; r < end; ++r) {
        score(p, static_cast<const T*>(p.logits) + r * p.experts, scores);
        keep_top(p, scores);
        T* const out = static_cast<T*>(p.weights) + r * p.experts;
        for_registers(p.experts, [&](int64_t i, int n) { store_at_most(out + i, load_at_most(scores + i, n), n); });
      }
    });
  });
}

void combine(const CombineParams& p, const Threads& threads) {
  with_type(p.dtype, [&]<class T>() {
    threads.parallel_for(p.rows, kElementsPerThread / (p.hidden + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* const weights = static_cast<const T*>(p.weights) + r * p.experts;
        T* const out = static_cast<T*>(p.out) + r * p.hidden;
        for_registers(p.hidden, [&](int64_t i, int n) {
          F32 sum = {};
          for (int32_t j = p.first[r]; j < p.first[r + 1]; ++j) {
            const float weight = load_first(weights + p.expert[j], 1)[0];
            sum += load_at_most(static_cast<const T*>(p.y) + p.at[j] * p.hidden + i, n) * weight;
          }
          store_at_most(out + i, sum, n);
        });
      }
    });
  });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(route, RouteParams)
LLMKERN_CPU_LAUNCHER(combine, CombineParams)
