// Reductions over the threads of a row: a warp's 32, or the whole block's.
#pragma once

#include <cstdint>

#include "llmkern/plan.h"
#include "vec.cuh"

namespace llmkern {

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Maximum of magnitudes as bits: in this order infinity is beyond every number and NaN beyond infinity.
struct MaxBits {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};

// Every lane gets the same bits: each pair adds the same two numbers.
template <class T, class F>
__device__ __forceinline__ T warp_reduce(T value, F f) {
#pragma unroll
  for (int with = 16; with > 0; with /= 2) value = f(value, __shfl_xor_sync(0xffffffffu, value, with));
  return value;
}

// Reduces over threadIdx.x: blockDim.x is 32, or all of the block.  Consecutive reductions use two buffers in turn, so
// that one barrier each is enough: who writes a buffer again has passed the barrier behind its last reading.
class RowReduce {
 public:
  static constexpr int kWarps = 32;
  static_assert(kRowSharedBytes == 2 * kWarps * 4);

  __device__ explicit RowReduce(char* shared) : buffer_(reinterpret_cast<uint32_t*>(shared)) {}

  template <class T, class F>
  __device__ __forceinline__ T operator()(T value, F f) {
    static_assert(sizeof(T) == 4);
    value = warp_reduce(value, f);
    if (blockDim.x == 32) return value;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) st_shared(buffer_ + warp, bits_as<uint32_t>(value));
    __syncthreads();
    value = bits_as<T>(lane < warps ? ld_shared(buffer_ + lane) : uint32_t{0});  // 0 is neutral for both
    value = warp_reduce(value, f);
    buffer_ += next_;
    next_ = -next_;
    return value;
  }

 private:
  uint32_t* buffer_;
  int next_ = kWarps;
};

}  // namespace llmkern
