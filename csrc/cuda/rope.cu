// rope: rotary embedding of q and k in one launch (llmkern/rope.h)
// work     a block per batch and position, which has one row of cos and sin; a thread's unit is a vector of first
//          and a vector of second dimensions of pairs of one head, or a vector of dimensions that are only copied
// needs    any shape; 16-byte accesses where heads and angles are aligned, else element by element
#include "llmkern/rope.h"

#include "common/row.cuh"

namespace llmkern {
namespace {

// Two neighbouring vectors, as pairs: a has the even elements, b the odd ones.
template <int kVector>
__device__ __forceinline__ void split_pairs(const float (&low)[kVector], const float (&high)[kVector],
                                            float (&a)[kVector], float (&b)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    a[i] = 2 * i < kVector ? low[2 * i % kVector] : high[2 * i % kVector];
    b[i] = 2 * i + 1 < kVector ? low[(2 * i + 1) % kVector] : high[(2 * i + 1) % kVector];
  }
}

template <int kVector>
__device__ __forceinline__ void join_pairs(const float (&a)[kVector], const float (&b)[kVector], float (&low)[kVector],
                                           float (&high)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    low[i] = i % 2 ? b[i / 2] : a[i / 2];
    high[i] = (kVector + i) % 2 ? b[(kVector + i) / 2] : a[(kVector + i) / 2];
  }
}

// cos or sin of the pairs from `pair` on, of their first (a) and second (b) dimensions.
template <int kVector, bool kInterleaved>
__device__ __forceinline__ void load_angles(const RopeParams& p, const RopeAngles& angles, int64_t at, int pair,
                                            float (&a)[kVector], float (&b)[kVector]) {
  if (p.width != p.rotary_dim) {
    load_as_float(angles.values, p.angles_dtype, at + pair, a);
#pragma unroll
    for (int i = 0; i < kVector; ++i) b[i] = a[i];
  } else if constexpr (kInterleaved) {
    float low[kVector], high[kVector];
    load_as_float(angles.values, p.angles_dtype, at + 2 * pair, low);
    load_as_float(angles.values, p.angles_dtype, at + 2 * pair + kVector, high);
    split_pairs(low, high, a, b);
  } else {
    load_as_float(angles.values, p.angles_dtype, at + pair, a);
    load_as_float(angles.values, p.angles_dtype, at + p.rotary_dim / 2 + pair, b);
  }
}

template <class T, int kVector, bool kInterleaved>
__global__ void __launch_bounds__(kRope.threads, kRope.blocks) rope_kernel(const RopeParams p) {
  using Vector = Packed<T, kVector>;
  const int pairs = static_cast<int>(p.rotary_dim) / 2, rotated = pairs / kVector;
  const int units = rotated + static_cast<int>(p.dim - p.rotary_dim) / kVector;
  const int heads = static_cast<int>(p.q.heads + p.k.heads);
  for (int64_t at = blockIdx.x; at < p.batch * p.length; at += gridDim.x) {
    // A division of 64 bits takes as long as the rest of a unit.
    const bool few = p.batch * p.length <= 0x7fffffff;
    const int64_t batch = few ? static_cast<int>(at) / static_cast<int>(p.length) : at / p.length;
    const int64_t position = at - batch * p.length;
    for (int work = threadIdx.x; work < heads * units; work += blockDim.x) {
      const int unit = work % units, head = work / units;
      const bool of_q = head < p.q.heads;
      const RopeHeads& tensor = of_q ? p.q : p.k;
      const int64_t h = of_q ? head : head - p.q.heads;
      const HeadStrides &from = tensor.x_strides, &to = tensor.out_strides;
      const T* x = static_cast<const T*>(tensor.x) + batch * from.batch + h * from.head + position * from.position;
      T* out = static_cast<T*>(tensor.out) + batch * to.batch + h * to.head + position * to.position;
      if (unit >= rotated) {
        const int64_t column = p.rotary_dim + static_cast<int64_t>(unit - rotated) * kVector;
        Vector copied;
        copied.load(x + column);
        copied.store(out + column);
        continue;
      }
      const int pair = unit * kVector;
      const int first = kInterleaved ? 2 * pair : pair, second = kInterleaved ? 2 * pair + kVector : pairs + pair;
      Vector one, other;
      one.load(x + first), other.load(x + second);
      float a[kVector], b[kVector], low[kVector], high[kVector];
      one.unpack(low), other.unpack(high);
      if constexpr (kInterleaved) {
        split_pairs(low, high, a, b);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) a[i] = low[i], b[i] = high[i];
      }
      float cos_a[kVector], cos_b[kVector], sin_a[kVector], sin_b[kVector];
      load_angles<kVector, kInterleaved>(p, p.cos, batch * p.cos.batch_stride + position * p.cos.position_stride, pair,
                                         cos_a, cos_b);
      load_angles<kVector, kInterleaved>(p, p.sin, batch * p.sin.batch_stride + position * p.sin.position_stride, pair,
                                         sin_a, sin_b);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float turned_a = a[i] * cos_a[i] - b[i] * sin_a[i];
        b[i] = b[i] * cos_b[i] + a[i] * sin_b[i];
        a[i] = turned_a;
      }
      if constexpr (kInterleaved) {
        join_pairs(a, b, low, high);
        one.pack(low), other.pack(high);
      } else {
        one.pack(a), other.pack(b);
      }
      one.store(out + first), other.store(out + second);
    }
  }
}

bool strides_aligned(const HeadStrides& strides, int64_t vector) {
  return strides.batch % vector == 0 && strides.head % vector == 0 && strides.position % vector == 0;
}

bool heads_aligned(const RopeHeads& heads, int64_t bytes, int64_t vector) {
  return aligned(heads.x, bytes, vector) && aligned(heads.out, bytes, vector) &&
         strides_aligned(heads.x_strides, vector) && strides_aligned(heads.out_strides, vector);
}

bool angles_aligned(const RopeAngles& angles, int64_t bytes, int64_t vector) {
  return aligned(angles.values, bytes, vector) && angles.batch_stride % vector == 0 &&
         angles.position_stride % vector == 0;
}

template <class T, int kVector>
void launch_units(const RopeParams& p, const Gpu& gpu) {
  const RopePlan plan = plan_rope(p.batch * p.length, p.q.heads + p.k.heads, p.dim, p.rotary_dim, kVector);
  const LaunchConfig config = {static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.threads)};
  if (p.interleaved)
    launch("rope", rope_kernel<T, kVector, true>, config, gpu, p);
  else
    launch("rope", rope_kernel<T, kVector, false>, config, gpu, p);
}

}  // namespace

void launch_rope(const RopeParams& p, const Gpu& gpu) {
  if (p.batch * p.length * (p.q.heads + p.k.heads) * p.dim == 0) return;  // an empty grid is a launch error
  with_type(p.dtype, [&]<class T>() {
    constexpr int kV = kPerVector<T>;
    const int64_t angle = size_of(p.angles_dtype);
    const bool vectors = p.rotary_dim / 2 % kV == 0 && p.dim % kV == 0 && heads_aligned(p.q, sizeof(T), kV) &&
                         heads_aligned(p.k, sizeof(T), kV) && angles_aligned(p.cos, angle, kV) &&
                         angles_aligned(p.sin, angle, kV);
    vectors ? launch_units<T, kV>(p, gpu) : launch_units<T, 1>(p, gpu);
  });
}

}  // namespace llmkern
