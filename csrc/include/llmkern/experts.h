// experts: what a layer of routed experts needs besides products.
//   route     weights[r, e] = the largest `top` of softmax(logits[r]), or of sigmoid(logits[r]), and 0 for the others;
//             normalized: divided by their sum; times scale.  Of equal ones the first are taken, and NaN before
//             numbers.
//   combine   out[r] = Σ weights[r, e] · y[e's row for r], over the experts that serve row r, in their order
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/threads.h"

namespace llmkern {

constexpr int64_t kMostExperts = 1024;

struct RouteParams {
  const void* logits;          // [rows, experts], dtype, contiguous, as all tensors here
  void* weights;               // [rows, experts], dtype; not logits
  int64_t rows, experts, top;  // 1 <= top <= experts <= kMostExperts
  DType dtype;
  bool sigmoid, normalized;
  float scale;
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
