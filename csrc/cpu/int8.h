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

// Writes k codes and returns their scale, as the op quantize_int8 defines both, to the bit.  value(i, n) is the
// register of values from i on, of which n count where n < kLanes; each is asked for twice.
template <class Value>
float quantize_values(const Value& value, int64_t k, int8_t* codes) {
  const auto counting = [&value](int64_t i, int n) { return n < kLanes ? first(value(i, n), n) : value(i, n); };
  S32 most = {};  // |v| as bits: in that order infinity is beyond every number and NaN beyond infinity
  const auto look_at = [&](int64_t i, int n) {
    const S32 magnitude = bits_as<S32>(counting(i, n)) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  };
  for_registers(k, look_at);
  int32_t largest = 0;
  for (int j = 0; j < kLanes; ++j) largest = most[j] > largest ? most[j] : largest;
  const float amax = bits_as<float>(largest);
  const float scale = amax < 0x1p-118f ? 0.0f : amax / 127.0f;
  if (!(scale > 0.0f && scale < __builtin_inff())) {
    std::memset(codes, 0, k);
    return scale;
  }
  const F32 inv = broadcast(127.0f / amax);
  for_registers(k, [&](int64_t i, int n) {
    typedef int8_t Narrow __attribute__((vector_size(kLanes)));
    const Narrow narrow = __builtin_convertvector(round_to_int(counting(i, n) * inv), Narrow);
    std::memcpy(codes + i, &narrow, n);
  });
  return scale;
}

template <class T>
float quantize_row(const T* x, int64_t k, int8_t* codes) {
  return quantize_values([x](int64_t i, int64_t n) { return load_at_most(x + i, n); }, k, codes);
}

// As quantize_values, for values that take longer to compute than to keep: each is asked for once, but in rows longer
// than what is kept.
template <class Value>
float quantize_computed(const Value& value, int64_t k, int8_t* codes) {
  constexpr int64_t kKept = 16384;
  if (k > kKept) return quantize_values(value, k, codes);
  alignas(64) float kept[kKept];
  for_registers(k, [&](int64_t i, int n) { store(kept + i, value(i, n)); });
  return quantize_row(kept, k, codes);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
