// A row of a matrix shared among threads: vector i of the row belongs to thread i % threads, which holds its first
// kHeld vectors in registers; those beyond are read again, from L2, whenever they are needed.
#pragma once

#include "llmkern/plan.h"
#include "llmkern/rows.h"
#include "reduce.cuh"

namespace llmkern {

template <class T, int kVector, int kHeld>
struct RowShare {
  using Vector = Packed<T, kVector>;
  Vector held[kHeld];
  int vectors;  // of the row

  __device__ explicit RowShare(int64_t hidden) : vectors(static_cast<int>(hidden / kVector)) {}

  // f(vector, first column, its place among those held) for the vectors in registers, which it may change.
  template <class F>
  __device__ __forceinline__ void each_held(const F& f) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int vector = i * blockDim.x + threadIdx.x;
      if (vector < vectors) f(held[i], vector * kVector, i);
    }
  }

  // f(first column) for the others.
  template <class F>
  __device__ __forceinline__ void each_other(const F& f) const {
    for (int vector = kHeld * blockDim.x + threadIdx.x; vector < vectors; vector += blockDim.x) f(vector * kVector);
  }

  __device__ __forceinline__ void load(const T* row) {
    each_held([&](Vector& vector, int column, int) { vector.load(row + column); });
  }

  // f(values, first column) for all of this thread's vectors; those not held are read from `row`.
  template <class F>
  __device__ __forceinline__ void each(const T* row, const F& f) {
    auto unpacked = [&](const Vector& vector, int column, int = 0) {
      float values[kVector];
      vector.unpack(values);
      f(values, column);
    };
    each_held(unpacked);
    each_other([&](int column) {
      Vector vector;
      vector.load(row + column);
      unpacked(vector, column);
    });
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
  return {dim3(static_cast<unsigned>(plan.blocks)), dim3(plan.row_threads, plan.rows_per_block), kRowSharedBytes};
}

// True where p, and strides of a multiple of it, can be accessed by vectors of `vector` elements of `bytes` each.
inline bool aligned(const void* p, int64_t bytes, int64_t vector) {
  const int64_t unit = bytes * vector > 16 ? 16 : bytes * vector;
  return reinterpret_cast<uintptr_t>(p) % unit == 0;
}

inline bool aligned(const Rows& rows, int64_t vector) {
  return rows.stride0 % vector == 0 && rows.stride1 % vector == 0 && rows.stride2 % vector == 0;
}

inline bool without_gaps(const Rows& rows, int64_t hidden) {
  return rows.count <= 1 || (rows.size1 == 1 && rows.size2 == 1 && rows.stride0 == hidden);
}

}  // namespace llmkern
