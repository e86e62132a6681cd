// Distribution of rows in elementwise kernels: a block takes chunks of kElementwiseVectors vectors for each of its
// threads, all of one row.
#pragma once

#include "llmkern/activation.h"
#include "llmkern/plan.h"
#include "row.cuh"

namespace llmkern {

// f(row, column) for this block's chunks: this thread's i-th vector of the chunk begins at column(i), which may be
// beyond the row.
template <int kVector, class F>
__device__ __forceinline__ void each_chunk(int64_t rows, int64_t hidden, const F& f) {
  const int64_t chunks = elementwise_chunks(hidden, kVector);
  for (int64_t chunk = blockIdx.x; chunk < rows * chunks; chunk += gridDim.x) {
    const int64_t first = (chunk % chunks * kElementwiseVectors * kElementwiseThreads + threadIdx.x) * kVector;
    f(chunk / chunks, [first](int i) { return first + i * (kElementwiseThreads * kVector); });
  }
}

inline LaunchConfig elementwise_launch(int64_t rows, int64_t hidden, int vector) {
  return {static_cast<unsigned>(elementwise_blocks(rows, hidden, vector)), kElementwiseThreads};
}

// f.template operator()<activation>() for those that elementwise ops have: gelu both ways, and silu for swiglu.
template <class F>
inline void with_op_activation(Activation activation, const F& f) {
  if (activation == Activation::silu) return f.template operator()<Activation::silu>();
  if (activation == Activation::gelu_tanh) return f.template operator()<Activation::gelu_tanh>();
  f.template operator()<Activation::gelu>();
}

// True where a tensor of T can be accessed by vectors of 16 bytes.
template <class T>
inline bool aligned_rows(const void* p, const Rows& rows) {
  return aligned(p, sizeof(T), kPerVector<T>) && (!p || aligned(rows, kPerVector<T>));
}

}  // namespace llmkern
