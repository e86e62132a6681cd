// Rows of floats rounded to int8 codes.
#pragma once

#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

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
// quantize_int8 defines both, to the bit.  Code: int8_t, or a wider integer to hold them.
template <class T, class Code>
float quantize_row(const T* x, int64_t k, Code* codes) {
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
    typedef Code Narrow __attribute__((vector_size(kLanes * sizeof(Code))));
    Narrow narrow = {};
    if (usable) narrow = __builtin_convertvector(round_to_int(load_at_most(x + i, k - i) * broadcast(inv)), Narrow);
    std::memcpy(codes + i, &narrow, sizeof(narrow));
  }
  return scale;
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
