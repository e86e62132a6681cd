// A row of a matrix shared among threads: vector i of the row belongs to thread i % threads, which holds its first
// kHeld vectors in registers; those beyond are read again, from L2, whenever they are needed.
#pragma once

#include "llmkern/plan.h"
#include "llmkern/rows.h"
#include "reduce.cuh"

namespace llmkern {

template <class Held, int kVector, int kHeld>
struct RowShare {
  Held held[kHeld];
  int vectors;  // of the row

  __device__ explicit RowShare(int64_t hidden) : vectors(static_cast<int>(hidden / kVector)) {}

  // f(held, first column) for the vectors in registers.
  template <class F>
  __device__ __forceinline__ void each_held(const F& f) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int vector = i * blockDim.x + threadIdx.x;
      if (vector < vectors) f(held[i], vector * kVector);
    }
  }

  // f(first column) for the others.
  template <class F>
  __device__ __forceinline__ void each_other(const F& f) const {
    for (int vector = kHeld * blockDim.x + threadIdx.x; vector < vectors; vector += blockDim.x) f(vector * kVector);
  }
};

// f.template operator()<vector elements, vectors held>() for a plan of plan_rows: the list of instantiations.
template <class T, class F>
inline void with_row_plan(const RowPlan& plan, const F& f) {
  constexpr int kV = kPerVector<T>;
  if (plan.vector > 1) {
    if (plan.held == 1) return f.template operator()<kV, 1>();
    if (plan.held == 4) return f.template operator()<kV, 4>();
    return f.template operator()<kV, 8>();
  }
  if (plan.held == 1) return f.template operator()<1, 1>();
  if (plan.held == 4) return f.template operator()<1, 4>();
  return f.template operator()<1, 8>();
}

inline LaunchConfig row_launch(const RowPlan& plan) {
  return {dim3(static_cast<unsigned>(plan.blocks)), dim3(plan.row_threads, plan.rows_per_block),
          RowReduce::kSharedBytes};
}

// True where p, and strides of a multiple of it, can be accessed by vectors of `vector` elements of `bytes` each.
inline bool aligned(const void* p, int64_t bytes, int64_t vector) {
  const int64_t unit = bytes * vector > 16 ? 16 : bytes * vector;
  return reinterpret_cast<uintptr_t>(p) % unit == 0;
}

inline bool aligned(const Rows& rows, int64_t vector) {
  return rows.stride0 % vector == 0 && rows.stride1 % vector == 0 && rows.stride2 % vector == 0;
}

}  // namespace llmkern
