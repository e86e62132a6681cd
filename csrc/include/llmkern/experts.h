// experts: what a layer of routed experts needs besides products.
//   route     weights[r, e] = softmax(logits[r]) or sigmoid(logits[r]) of the `top` experts with the largest keys, and
//   0
//             for the others; normalized: divided by their sum + eps; times scale.  A key is the weight +
//             correction[e]; without a correction a softmax's is the logit, which is in the same order and ties less
//             often.  With groups, only experts in the `group_top` groups with the largest sums of two keys are chosen
//             from (DeepSeek-V3, arXiv:2412.19437).  Of equal keys the first is taken, and NaN before numbers.
//   combine   out[r] = Σ weights[r, e] · y[e's row for r], over the experts that serve row r, in their order
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/threads.h"

namespace llmkern {

constexpr int64_t kMostExperts = 1024;

struct RouteParams {
  const void* logits;                 // [rows, experts], logits_dtype, contiguous, as all tensors here
  void* weights;                      // [rows, experts], dtype; not logits
  const void* correction = nullptr;   // [experts], correction_dtype; null for 0
  int64_t rows, experts, top;         // 1 <= top <= experts <= kMostExperts
  int64_t groups = 1, group_top = 1;  // groups of experts / groups >= 2 neighbours; 1: all experts are chosen from
  DType dtype, logits_dtype, correction_dtype = DType::f32;
  bool sigmoid, normalized;
  float eps, scale;
};

void launch_route(const RouteParams& p, const Threads& threads);

// A row's experts are entries first[r] … first[r + 1] of `expert` and of `at`.
struct CombineParams {
  const void* y;          // [entries, hidden], dtype: an expert's result for one row
  const void* weights;    // [rows, experts], dtype
  const int32_t* first;   // [rows + 1]
  const int32_t* expert;  // of each entry, ascending within a row
  const int32_t* at;      // which row of y it is
  void* out;              // [rows, hidden], dtype; not y
  int64_t rows, experts, hidden;
  DType dtype;
};

void launch_combine(const CombineParams& p, const Threads& threads);

}  // namespace llmkern
