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

// One row's experts: weights that may be taken, and the keys by which they are chosen.
struct Row {
  alignas(64) float scores[kMostExperts], keys[kMostExperts];
  bool taken[kMostExperts];
};

// Compute the scores from one row's logits.
void score(const RouteParams& p, float* scores) {
  float largest = -__builtin_inff();
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

// Return the first of the largest of `count` keys that are not taken, and take it.
int64_t take_largest(const float* keys, bool* taken, int64_t count) {
  int64_t best = -1;
  for (int64_t i = 0; i < count; ++i)
    if (!taken[i] && (best < 0 || is_more(keys[i], keys[best]))) best = i;
  taken[best] = true;
  return best;
}

// Lower the keys of all experts outside the best groups to -inf.
void keep_groups(const RouteParams& p, float* keys) {
  const int64_t size = p.experts / p.groups;
  float sums[kMostExperts];
  bool kept[kMostExperts] = {};
  for (int64_t g = 0; g < p.groups; ++g) {
    bool taken[kMostExperts] = {};
    const float* const own = keys + g * size;
    const float first = own[take_largest(own, taken, size)];
    sums[g] = first + own[take_largest(own, taken, size)];
  }
  for (int64_t i = 0; i < p.group_top; ++i) take_largest(sums, kept, p.groups);
  for (int64_t e = 0; e < p.experts; ++e)
    if (!kept[e / size]) keys[e] = -__builtin_inff();
}

// Keep exactly `top` scores, those with the largest keys, and zero the rest: readers have room for `top` per row.
void keep_top(const RouteParams& p, Row& row) {
  float kept[kMostExperts] = {};
  int64_t chosen[kMostExperts];
  float total = p.eps;
  std::memset(row.taken, 0, p.experts);
  if (p.groups > 1) keep_groups(p, row.keys);
  for (int64_t i = 0; i < p.top; ++i) {
    chosen[i] = take_largest(row.keys, row.taken, p.experts);
    total += row.scores[chosen[i]];
  }
  for (int64_t i = 0; i < p.top; ++i) {
    const float score = row.scores[chosen[i]];
    kept[chosen[i]] = (p.normalized ? score / total : score) * p.scale;
  }
  std::memcpy(row.scores, kept, p.experts * sizeof(float));
}

template <class T>
void load_row(const void* from, int64_t first, float* to, int64_t count) {
  const T* const x = static_cast<const T*>(from) + first;
  for_registers(count, [&](int64_t i, int n) { store_at_most(to + i, load_at_most(x + i, n), n); });
}

}  // namespace

void route(const RouteParams& p, const Threads& threads) {
  alignas(64) float correction[kMostExperts] = {};
  if (p.correction)
    with_type(p.correction_dtype, [&]<class T>() { load_row<T>(p.correction, 0, correction, p.experts); });
  threads.parallel_for(p.rows, kElementsPerThread / (p.experts * p.top + 1) + 1, [&](int64_t begin, int64_t end) {
    Row row;
    for (int64_t r = begin; r < end; ++r) {
      with_type(p.logits_dtype, [&]<class T>() { load_row<T>(p.logits, r * p.experts, row.scores, p.experts); });
      if (!p.sigmoid) std::memcpy(row.keys, row.scores, p.experts * sizeof(float));
      score(p, row.scores);
      if (p.sigmoid || p.correction)
        for (int64_t e = 0; e < p.experts; ++e) row.keys[e] = row.scores[e] + correction[e];
      keep_top(p, row);
      with_type(p.dtype, [&]<class T>() {
        T* const out = static_cast<T*>(p.weights) + r * p.experts;
        for_registers(p.experts, [&](int64_t i, int n) { store_at_most(out + i, load_at_most(row.scores + i, n), n); });
      });
    }
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
