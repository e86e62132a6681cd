// A block of attention in bf16 on AMX: the two products of attention.cpp, with rows still in the lanes of the sums.
// scores   [key][row] = k · qᵀ.  A tile of k lies in memory as it must; q is kept as pairs of dimensions, [dim /
// 2][row]. out      [dim][row] += vᵀ · weights.  v is transposed for each block; the weights are pairs of keys, [key /
// 2][row]. tiles    32 × 32 numbers are 2 × 2 tiles of sums, 0 to 3, of left operands 4 and 5 and right ones 6 and 7,
// 32 products
//          a step.
#pragma once

#ifdef __AMX_BF16__

#include "../vec.h"
#include "tiles.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kTileKeys = 64;  // of a block

constexpr int64_t padded_to_tiles(int64_t dim) {
  return (dim + 31) / 32 * 32;
}

// 16 pairs of numbers from p on, which has n > 0 left; 0 beyond.
inline F32 load_pairs(const BFloat16* p, int64_t n) {
  return n >= 32 ? _mm512_castsi512_ps(_mm512_loadu_si512(p))
                 : _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
}

// The first of two numbers in the lower half of each lane, the second in the upper.
inline F32 pairs(F32 first, F32 second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return bits_as<F32>(_mm512_permutexvar_epi16(order, bits_as<__m512i>(_mm512_cvtne2ps_pbh(second, first))));
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

// to[i][r] (+)= Σ left[i] · right[r], for 32 i's and 32 r's; strides in bytes, `steps` of 32 products.
inline void multiply_tiles(const void* left, int64_t left_stride, const void* right, int64_t right_stride,
                           int64_t steps, bool add, float* to, int64_t to_stride) {
  const char *a = static_cast<const char*>(left), *b = static_cast<const char*>(right);
  float* below = to + 16 * (to_stride / 4);
  if (add) {
    _tile_loadd(0, to, to_stride);
    _tile_loadd(1, to + 16, to_stride);
    _tile_loadd(2, below, to_stride);
    _tile_loadd(3, below + 16, to_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += 64, b += 16 * right_stride) {
    _tile_loadd(4, a, left_stride);
    _tile_loadd(6, b, right_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 64, right_stride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * left_stride, left_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, to_stride);
  _tile_stored(1, to + 16, to_stride);
  _tile_stored(2, below, to_stride);
  _tile_stored(3, below + 16, to_stride);
}

// `count` vectors as tiles read them: themselves where they fill whole tiles, else copied and padded with zeros.
inline const BFloat16* whole_tiles(const BFloat16* from, int64_t& stride, int count, int64_t dim, BFloat16* copy) {
  if (count % 32 == 0 && dim % 32 == 0) return from;
  const int64_t to_stride = padded_to_tiles(dim);
  const int padded = (count + 31) / 32 * 32;
  for (int j = 0; j < padded; ++j)
    for (int64_t d = 0; d < dim; d += 32)
      store(reinterpret_cast<float*>(copy + j * to_stride + d),
            j < count ? load_pairs(from + j * stride + d, dim - d) : F32{});
  stride = to_stride;
  return copy;
}

// turned[dim][key] of `count` vectors v[key][dim], both padded with zeros; a row of `turned` has kTileKeys keys.
inline void turn(const BFloat16* v, int64_t stride, int count, int64_t dim, BFloat16* turned) {
  for (int j = 0; j < count; j += 32)
    for (int64_t d = 0; d < padded_to_tiles(dim); d += kLanes) {
      F32 square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const auto half = [&](int key) {
          return key < count && d < dim ? bits_as<U32>(load_at_most(v + key * stride + d, dim - d)) : U32{};
        };
        square[i] = bits_as<F32>(half(j + 2 * i) >> 16 | half(j + 2 * i + 1));  // widened, the number is above
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(turned + (d + i) * kTileKeys + j), square[i]);
    }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA

#endif
