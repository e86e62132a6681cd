// int8 codes: products of codes summed in s32 exactly, and rows of floats rounded to codes.
#pragma once

#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

typedef int8_t S8 __attribute__((vector_size(kVectorBytes)));

inline S8 load_codes(const int8_t* p) {
  S8 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// The first n < kVectorBytes codes at p; the other lanes are 0.
inline S8 load_first_codes(const int8_t* p, int n) {
#if LLMKERN_ISA_LEVEL == 2
  return bits_as<S8>(_mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p));
#else
  S8 v = {};
  std::memcpy(&v, p, n);
  return v;
#endif
}

// acc + Σ (w + kShift) · x, four neighbours to a lane; x within ±127, w anything.  The sum is modulo 2³²: that of w · x
// is kShift · Σx less, and fits.
#if LLMKERN_ISA_LEVEL == 2
constexpr int kShift = 128;  // vpdpbusd multiplies unsigned by signed

inline S32 multiply(S8 w, S8 x, S32 acc) {
  const __m512i u = _mm512_xor_si512(bits_as<__m512i>(w), _mm512_set1_epi8(-128));
  return bits_as<S32>(_mm512_dpbusd_epi32(bits_as<__m512i>(acc), u, bits_as<__m512i>(x)));
}
#elif LLMKERN_ISA_LEVEL == 1
constexpr int kShift = 0;

// vpmaddubsw saturates its sums of two products, but |w| · ±x is at most 2 · 128 · 127.
inline S32 multiply(S8 w, S8 x, S32 acc) {
  const __m256i signs = bits_as<__m256i>(w), magnitudes = _mm256_abs_epi8(signs);
  const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(bits_as<__m256i>(x), signs));
  return acc + bits_as<S32>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
constexpr int kShift = 0;

inline S32 multiply(S8 w, S8 x, S32 acc) {
  typedef int16_t Wide __attribute__((vector_size(2 * kVectorBytes)));
  typedef int32_t Products __attribute__((vector_size(4 * kVectorBytes)));
  const Products products =
      __builtin_convertvector(__builtin_convertvector(w, Wide) * __builtin_convertvector(x, Wide), Products);
  S32 quarter[4];
  std::memcpy(quarter, &products, sizeof(products));
  return acc + ((quarter[0] + quarter[1]) + (quarter[2] + quarter[3]));
}
#endif

// To nearest, ties to even; |v| below 2³¹.
inline S32 round_to_int(F32 v) {
#if LLMKERN_ISA_LEVEL == 2
  return bits_as<S32>(_mm512_cvtps_epi32(bits_as<__m512>(v)));
#elif LLMKERN_ISA_LEVEL == 1
  return bits_as<S32>(_mm256_cvtps_epi32(bits_as<__m256>(v)));
#else
  S32 rounded;
  for (int i = 0; i < kLanes; ++i) rounded[i] = static_cast<int32_t>(__builtin_lrintf(v[i]));
  return rounded;
#endif
}

// Writes the codes of x[0, k), and zeros up to the next multiple of kLanes; returns their scale.  As the op
// quantize_int8 defines both, to the bit.
template <class T>
float quantize_row(const T* x, int64_t k, int8_t* codes) {
  S32 most = {};  // |x| as bits: in that order infinity is beyond every number and NaN beyond infinity
  for (int64_t i = 0; i < k; i += kLanes) {
    const S32 magnitude = bits_as<S32>(load_at_most(x + i, k - i)) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  int32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  const float amax = bits_as<float>(largest);
  const float scale = amax < 0x1p-118f ? 0.0f : amax / 127.0f;
  const bool usable = scale > 0.0f && scale < __builtin_inff();
  const float inv = 127.0f / amax;
  for (int64_t i = 0; i < k; i += kLanes) {
    typedef int8_t Narrow __attribute__((vector_size(kLanes)));
    Narrow narrow = {};
    if (usable) narrow = __builtin_convertvector(round_to_int(load_at_most(x + i, k - i) * broadcast(inv)), Narrow);
    std::memcpy(codes + i, &narrow, sizeof(narrow));
  }
  return scale;
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
