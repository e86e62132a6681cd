// Loads and stores of up to 16 bytes, and conversions between storage types and fp32.  Kernels touch memory through
// these and the instructions of ptx.cuh only: on the SIMT machine every access is then checked.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.cuh"
#include "llmkern/dtype.h"
#include "ptx.cuh"

namespace llmkern {

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

#ifdef LLMKERN_SIMT
#define LLMKERN_CHECK(instruction, space, access, p) \
  simt::check(instruction, simt::Space::space, simt::Access::access, p, sizeof(*(p)))
#else
#define LLMKERN_CHECK(instruction, space, access, p)
#endif

template <class V>
__device__ __forceinline__ V ld_global(const V* p) {
  LLMKERN_CHECK("ld.global", global, read, p);
  return *p;
}

template <class V>
__device__ __forceinline__ void st_global(V* p, const V& value) {
  if constexpr (std::is_same_v<V, uint4>) {
    ptx::st_global_v4(p, value);  // the compiler may store its four words one by one
  } else {
    LLMKERN_CHECK("st.global", global, write, p);
    *p = value;
  }
}

template <class V>
__device__ __forceinline__ V ld_shared(const V* p) {
  LLMKERN_CHECK("ld.shared", shared, read, p);
  return *p;
}

template <class V>
__device__ __forceinline__ void st_shared(V* p, const V& value) {
  LLMKERN_CHECK("st.shared", shared, write, p);
  *p = value;
}

#undef LLMKERN_CHECK

// The unit of one access of so many bytes.
template <int kBytes>
using Access = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

// Vectors of 16 bytes of T have this many elements.
template <class T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) {
  return x;
}

__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ float to_float(Float16 x) {
  return __half2float(bits_as<__half>(x));
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bits_as<BFloat16>(__float2bfloat16_rn(x));
  } else if constexpr (std::is_same_v<T, Float16>) {
    return bits_as<Float16>(__float2half_rn(x));
  } else {
    return x;
  }
}

// kN neighbours as they are in memory, loaded and stored by one access where they have at most 16 bytes.
template <class T, int kN>
struct alignas(sizeof(T) * kN > 16 ? 16 : sizeof(T) * kN) Packed {
  static constexpr int kBytes = sizeof(T) * kN > 16 ? 16 : sizeof(T) * kN;
  static constexpr int kAccesses = sizeof(T) * kN / kBytes;
  struct alignas(kBytes) Elements {  // aligned too: else the compiler may take the accesses apart
    T element[kN];
  };
  Access<kBytes> raw[kAccesses];

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) raw[i] = ld_global(reinterpret_cast<const Access<kBytes>*>(p) + i);
  }

  __device__ __forceinline__ void store(T* p) const {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) st_global(reinterpret_cast<Access<kBytes>*>(p) + i, raw[i]);
  }

  __device__ __forceinline__ void unpack(float (&values)[kN]) const {
    const Elements elements = bits_as<Elements>(*this);
#pragma unroll
    for (int i = 0; i < kN; ++i) values[i] = to_float(elements.element[i]);
  }

  __device__ __forceinline__ void pack(const float (&values)[kN]) {
    Elements elements;
#pragma unroll
    for (int i = 0; i < kN; ++i) elements.element[i] = from_float<T>(values[i]);
    *this = bits_as<Packed>(elements);
  }
};

// kN values of a tensor whose type is not a template parameter, such as a norm's weight: the branch is uniform.
template <int kN>
__device__ __forceinline__ void load_as_float(const void* p, DType dtype, int64_t index, float (&values)[kN]) {
  if (dtype == DType::f32) {
    Packed<float, kN> packed;
    packed.load(static_cast<const float*>(p) + index);
    packed.unpack(values);
  } else if (dtype == DType::bf16) {
    Packed<BFloat16, kN> packed;
    packed.load(static_cast<const BFloat16*>(p) + index);
    packed.unpack(values);
  } else {
    Packed<Float16, kN> packed;
    packed.load(static_cast<const Float16*>(p) + index);
    packed.unpack(values);
  }
}

template <int kN>
__device__ __forceinline__ void store_as(void* p, DType dtype, int64_t index, const float (&values)[kN]) {
  if (dtype == DType::f32) {
    Packed<float, kN> packed;
    packed.pack(values);
    packed.store(static_cast<float*>(p) + index);
  } else if (dtype == DType::bf16) {
    Packed<BFloat16, kN> packed;
    packed.pack(values);
    packed.store(static_cast<BFloat16*>(p) + index);
  } else {
    Packed<Float16, kN> packed;
    packed.pack(values);
    packed.store(static_cast<Float16*>(p) + index);
  }
}

}  // namespace llmkern
