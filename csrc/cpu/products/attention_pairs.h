// Helpers of attention in bf16, on tiles (attention_tiles.h) and without: pairs of bf16, which AVX512-BF16 multiplies,
// and an exponential for weights that are rounded to bf16.
#pragma once

#ifdef __AVX512BF16__

#include "attention_rows.h"
#include "schemes.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t padded_to_pairs(int64_t n) {  // to whole registers of bf16, and tiles
  return (n + 31) / 32 * 32;
}

// to[pair][dim][2]: two neighbours of `count` vectors side by side; 0 beyond the last vector and the last dimension.
inline void pair_vectors(const BFloat16* from, int64_t stride, int count, int64_t dim, int pairs, BFloat16* to) {
  const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  const int64_t width = padded_to_pairs(dim);
  for (int j = 0; j < 2 * pairs; j += 2)
    for (int64_t d = 0; d < width; d += 32) {
      const auto vector = [&](int i) {
        return bits_as<__m512i>(i < count ? Bf16::load_part(from + i * stride + d, dim - d) : Bytes{});
      };
      const __m512i even = vector(j), odd = vector(j + 1);
      BFloat16* const pair = to + (j / 2 * width + d) * 2;
      _mm512_store_si512(pair, _mm512_permutex2var_epi16(even, lower, odd));
      _mm512_store_si512(pair + 32, _mm512_permutex2var_epi16(even, upper, odd));
    }
}

// Lane by lane the pair of two numbers, rounded to bf16.
inline Bytes pairs_of(F32 first, F32 second) {
  const __m512i lanes = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return bits_as<Bytes>(_mm512_permutexvar_epi16(lanes, bits_as<__m512i>(_mm512_cvtne2ps_pbh(second, first))));
}

// 2ˣ for x <= 0 within 10⁻⁷ of itself; 0 below 2⁻¹²⁶, of NaN NaN.  A polynomial of least error in what x is above the
// next integer.
inline F32 exp2_or_0(F32 x) {
  const F32 r = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F32 g = r * 0x1.ec3210p-10f + 0x1.26900ap-7f;
  g = g * r + 0x1.c95446p-5f;
  g = g * r + 0x1.ebd5a8p-3f;
  g = g * r + 0x1.62e4f6p-1f;
  g = g * r + 0x1.fffffep-1f;
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast(-126.0f), _CMP_NLT_UQ), g, x);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA

#endif
