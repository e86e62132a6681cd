// Functions of F32 that vector extensions lack.  Each says its error, which tests/backends/test_math.py measures
// on every instruction set.
#pragma once

#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// eˣ within 1.1 ulp, also where it is subnormal or 0 or infinite; of NaN NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, and eʳ = 1 + r + r² g(r), g the polynomial of least error (0.06 ulp).
inline F32 exp(F32 x) {
  x = x < -104.0f ? F32{} - 104.0f : x;  // half the smallest subnormal number is e^-103.97; NaN stays
  x = x > 89.0f ? F32{} + 89.0f : x;
  const F32 rounder = F32{} + 0x1.8p23f;  // added to |x| < 2²², it leaves the nearest integer in the low bits
  const F32 shifted = x * 0x1.715476p0f + rounder;
  const F32 n = shifted - rounder;
  const F32 r = (x - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;  // ln 2 in two parts: n times the first is exact
  F32 g = r * 0x1.6a23cep-10f + 0x1.123a20p-7f;
  g = g * r + 0x1.5558f2p-5f;
  g = g * r + 0x1.555492p-3f;
  g = g * r + 0x1.fffffcp-2f;
  const F32 y = g * (r * r) + r + 1.0f;
#if LLMKERN_ISA_LEVEL == 2
  return _mm512_scalef_ps(y, n);
#else
  // 2ⁿ as two factors, since n goes from -150 to 128.
  const S32 whole = bits_as<S32>(shifted) - bits_as<S32>(rounder), half = whole >> 1;
  return y * bits_as<F32>((half + 127) << 23) * bits_as<F32>((whole - half + 127) << 23);
#endif
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
