// F32: one register of floats of the instruction set being compiled for, on the compilers' vector extensions, with
// loads and stores that convert from and to every storage type.  Arithmetic is written with plain operators.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if LLMKERN_ISA_LEVEL > 0
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "llmkern/dtype.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kVectorBytes = 16 << LLMKERN_ISA_LEVEL;
constexpr int kLanes = kVectorBytes / 4;
#if LLMKERN_ISA_LEVEL == 2 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float F32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t S32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

#ifdef __aarch64__  // compilers take what follows apart, into general registers
inline U32 load_u16(const void* p) {
  return bits_as<U32>(vmovl_u16(vld1_u16(static_cast<const uint16_t*>(p))));
}

inline void store_u16(void* p, U32 v) {
  vst1_u16(static_cast<uint16_t*>(p), vmovn_u32(bits_as<uint32x4_t>(v)));
}
#else
inline U32 load_u16(const void* p) {
  U16 v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, U32);
}

inline void store_u16(void* p, U32 v) {
  const U16 narrow = __builtin_convertvector(v, U16);
  std::memcpy(p, &narrow, sizeof(narrow));
}
#endif

inline F32 load(const float* p) {
  F32 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, F32 v) {
  std::memcpy(p, &v, sizeof(v));
}

inline F32 load(const BFloat16* p) {
  return bits_as<F32>(load_u16(p) << 16);
}

// Round to nearest even; a NaN stays one (the addition could carry its mantissa away).
inline void store(BFloat16* p, F32 v) {
#ifdef __AVX512BF16__
  const __m256bh rounded = _mm512_cvtneps_pbh(v);  // subnormals become 0
  std::memcpy(p, &rounded, sizeof(rounded));
#else
  const U32 u = bits_as<U32>(v);
  const U32 rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  store_u16(p, v == v ? rounded : u >> 16 | 0x40);
#endif
}

#if LLMKERN_ISA_LEVEL == 2
inline F32 load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline F32 load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline void store(Float16* p, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif LLMKERN_ISA_LEVEL == 1
inline F32 load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)));
}

inline F32 load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline void store(Float16* p, F32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
inline F32 load(const int8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes))))));
}

inline F32 load(const Float16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
}

inline void store(Float16* p, F32 v) {
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
#else
// Each byte four times in its lane, so that a shift leaves it with its sign: compilers widen byte by byte instead.
inline F32 load(const int8_t* p) {
  typedef int8_t S8 __attribute__((vector_size(kVectorBytes)));
  typedef int16_t S16 __attribute__((vector_size(kVectorBytes)));
  typedef int32_t S32 __attribute__((vector_size(kVectorBytes)));
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  const S8 v = bits_as<S8>(S32{bytes});
  const S16 twice = bits_as<S16>(__builtin_shufflevector(v, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  const S32 four_times = bits_as<S32>(__builtin_shufflevector(twice, twice, 0, 8, 1, 9, 2, 10, 3, 11));
  return __builtin_convertvector(four_times >> 24, F32);
}

// Half's exponent and mantissa, moved to float's place, are a float too small by 2^(127-15), subnormals included.
inline F32 load(const Float16* p) {
  const U32 h = load_u16(p);
  const U32 magnitude = (h & 0x7fff) << 13;
  const U32 scaled = bits_as<U32>(bits_as<F32>(magnitude) * 0x1p112f);
  const U32 special = magnitude | 0x7f800000;  // infinity and NaN
  return bits_as<F32>(((h & 0x7fff) >= 0x7c00 ? special : scaled) | (h & 0x8000) << 16);
}

// Round to nearest even.  Below half's smallest normal number, 2^-14, the addition of 0.5 aligns the mantissa and
// rounds it.
inline void store(Float16* p, F32 v) {
  const U32 u = bits_as<U32>(v), magnitude = u & 0x7fffffff;
  const U32 normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const U32 subnormal = bits_as<U32>(bits_as<F32>(magnitude) + 0.5f) - 0x3f000000;
  const U32 nan = (magnitude >> 13 & 0x3ff) | 0x7e00, infinity = magnitude * 0 + 0x7c00;
  U32 h = magnitude < 0x38800000 ? subnormal : normal;
  h = magnitude >= 0x47800000 ? infinity : h;  // 65536 and more
  h = magnitude > 0x7f800000 ? nan : h;
  store_u16(p, h | (u >> 16 & 0x8000));
}
#endif

// The first n < kLanes elements at p; the other lanes are 0.
template <class T>
inline F32 load_first(const T* p, int n) {
#if LLMKERN_ISA_LEVEL == 2  // a masked load: reading back memcpy's single elements would stall on store forwarding
  const __mmask16 first = (1u << n) - 1;
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(first, p);
  alignas(32) T padded[kLanes];
  if constexpr (sizeof(T) == 2)
    _mm256_store_si256(reinterpret_cast<__m256i*>(padded), _mm256_maskz_loadu_epi16(first, p));
  else
    _mm_store_si128(reinterpret_cast<__m128i*>(padded), _mm_maskz_loadu_epi8(first, p));
#else
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
#endif
  return load(padded);
}

template <class T>
inline void store_first(T* p, F32 v, int n) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

// As much as there is of the register at p, which has n > 0 elements left.
template <class T>
inline F32 load_at_most(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, static_cast<int>(n));
}

template <class T>
inline void store_at_most(T* p, F32 v, int64_t n) {
  n >= kLanes ? store(p, v) : store_first(p, v, static_cast<int>(n));
}

// Two registers, one after the other.
template <class T>
inline void store_two(T* p, F32 first, F32 second) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
    return std::memcpy(p, &both, sizeof(both)), void();
  }
#endif
  store(p, first);
  store(p + kLanes, second);
}

// f(i, n) for each register of n <= kLanes elements from i on that it takes to hold `count`; only the last may be
// short.
template <class F>
inline __attribute__((always_inline)) void for_registers(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
  if (i < count) f(i, static_cast<int>(count - i));
}

// f.template operator()<i>() for i in [0, n).
template <int n, class F>
inline __attribute__((always_inline)) void for_constants(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      __attribute__((always_inline)) { (f.template operator()<i>(), ...); }(std::make_integer_sequence<int, n>{});
}

// Not F32{} + value, which compilers add in earnest: it makes 0 of -0.
inline F32 broadcast(float value) {
#if LLMKERN_ISA_LEVEL == 2
  return _mm512_set1_ps(value);
#elif LLMKERN_ISA_LEVEL == 1
  return _mm256_set1_ps(value);
#else
  return F32{value, value, value, value};
#endif
}

// 0, 1, 2, …
inline S32 lane_numbers() {
#if LLMKERN_ISA_LEVEL == 2
  return S32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif LLMKERN_ISA_LEVEL == 1
  return S32{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return S32{0, 1, 2, 3};
#endif
}

// v in its first n lanes, 0 in the others.
inline F32 first(F32 v, int n) {
  return lane_numbers() < n ? v : F32{};
}

// Sum of all lanes, floats or integers: pairwise, each half of the lanes added to the other, which rounds least.
template <class V>
inline auto quarter_sum(V v) {
#if LLMKERN_ISA_LEVEL == 2
  const auto v8 = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LLMKERN_ISA_LEVEL == 1
  const auto v8 = v;
#endif
#if LLMKERN_ISA_LEVEL > 0
  const auto v4 = __builtin_shufflevector(v8, v8, 0, 1, 2, 3) + __builtin_shufflevector(v8, v8, 4, 5, 6, 7);
#else
  const auto v4 = v;
#endif
  return v4;
}

template <class V>
inline auto sum(V v) {
  const auto v4 = quarter_sum(v);
  return (v4[0] + v4[2]) + (v4[1] + v4[3]);
}

// Interleave floats or integers: the elements a[0], b[0], a[1], b[1], … of the lower halves, and of the upper ones.
template <class V>
inline V interleave_lower(V a, V b) {
#if LLMKERN_ISA_LEVEL == 2
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif LLMKERN_ISA_LEVEL == 1
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

template <class V>
inline V interleave_upper(V a, V b) {
#if LLMKERN_ISA_LEVEL == 2
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif LLMKERN_ISA_LEVEL == 1
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// A square of kLanes registers: lane j of register i becomes lane i of register j.  Each round interleaves the first
// half of the registers with the second; log2(kLanes) of them rotate the bits of (register, lane) into (lane,
// register).
template <class V>
inline void transpose(V (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    V next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_lower(v[i], v[i + kLanes / 2]);
      next[2 * i + 1] = interleave_upper(v[i], v[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
