// Functions of F32 that vector extensions lack.  Each says its error, which tests/backends/test_math.py measures
// on every instruction set.
#pragma once

#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// eˣ as fraction · 2ⁿ for |x| < 2²¹: x = n ln 2 + r with |r| <= ln 2 / 2, and eʳ = 1 + r + r² g(r), g the polynomial of
// least error (0.06 ulp).
struct Exponential {
  F32 fraction, n;
  S32 n_as_integer;
};

inline Exponential exponential(F32 x) {
  const F32 rounder = F32{} + 0x1.8p23f;  // added to |x| < 2²², it leaves the nearest integer in the low bits
  const F32 shifted = x * 0x1.715476p0f + rounder;
  const F32 n = shifted - rounder;
  const F32 r = (x - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;  // ln 2 in two parts: n times the first is exact
  F32 g = r * 0x1.6a23cep-10f + 0x1.123a20p-7f;
  g = g * r + 0x1.5558f2p-5f;
  g = g * r + 0x1.555492p-3f;
  g = g * r + 0x1.fffffcp-2f;
  return {g * (r * r) + r + 1.0f, n, bits_as<S32>(shifted) - bits_as<S32>(rounder)};
}

// eˣ within 1.1 ulp, also where it is subnormal or 0 or infinite; of NaN NaN.
inline F32 exp(F32 x) {
  x = x < -104.0f ? F32{} - 104.0f : x;  // half the smallest subnormal number is e^-103.97; NaN stays
  x = x > 89.0f ? F32{} + 89.0f : x;
  const Exponential e = exponential(x);
#if LLMKERN_ISA_LEVEL == 2
  return _mm512_maskz_scalef_ps(0xffff, e.fraction, e.n);  // gcc 12 warns of _mm512_scalef_ps's own code
#else
  // 2ⁿ as two factors, since n goes from -150 to 128.
  const S32 half = e.n_as_integer >> 1;
  return e.fraction * bits_as<F32>((half + 127) << 23) * bits_as<F32>((e.n_as_integer - half + 127) << 23);
#endif
}

// eˣ for x <= 0, as softmax needs it: within 1.1 ulp, but 0 below e⁻⁸⁷, as a subnormal result takes the processor a
// hundred cycles; of NaN NaN.
inline F32 exp_or_0(F32 x) {
  const Exponential e = exponential(x);
#if LLMKERN_ISA_LEVEL == 2
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, F32{} - 87.0f, _CMP_NLT_UQ), e.fraction, e.n);
#else
  return x < -87.0f ? F32{} : e.fraction * bits_as<F32>((e.n_as_integer + 127) << 23);
#endif
}

// tanh x within 1.5 ulp; of NaN NaN.  Near 0, where 1 − 2 / (e²ˣ + 1) cancels, x + x³ g(x²).
inline F32 tanh(F32 x) {
  const F32 magnitude = bits_as<F32>(bits_as<S32>(x) & 0x7fffffff), square = x * x;
  F32 g = square * -0x1.75e1cp-8f + 0x1.52269ap-6f;
  g = g * square - 0x1.b83c5ap-5f;
  g = g * square + 0x1.110726p-3f;
  g = g * square - 0x1.555532p-2f;
  const F32 near = x + x * (square * g);
  const F32 far = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
  return magnitude < 0.625f ? near : bits_as<F32>(bits_as<S32>(far) | (bits_as<S32>(x) & INT32_MIN));
}

// x / (1 + e⁻ˣ) within 3 ulp.  Where e⁻ˣ is infinite, 0.
inline F32 silu(F32 x) {
  return x / (1.0f + exp(-x));
}

// x / (1 + e^(-1.702 x)) within 3 ulp where x > -1, and as the exponent is rounded by 2^-18 there, and 1.702 by 2e-8,
// 85 at -50.
inline F32 quick_gelu(F32 x) {
  return x / (1.0f + exp(x * -1.702f));
}

// Φ(x), the normal distribution function: within 4 ulp where x > 0 and within 2 · 10⁻⁸ where x < 0.
#if LLMKERN_ISA_LEVEL == 2
// Φ(-a) near 32 values of a >= 0, kStep apart, as polynomials in the distance from the nearest one: Taylor's, to the
// fifth power, of which Chebyshev's T₅ takes away the last with the least error (5 · 10⁻⁹).  The last is 0: Φ(-5.7) is
// 6 · 10⁻⁹.
struct NormalTail {
  static constexpr int kPoints = 32, kPowers = 5;
  static constexpr double kStep = 0.1875;
  alignas(64) float power[kPowers][kPoints] = {};

  constexpr NormalTail() {
    double tail = 0.5, density = 0.3989422804014327;  // Φ(-a) and its derivative's magnitude
    for (int i = 0; i + 1 < kPoints; ++i) {
      const double a = i * kStep, half = kStep / 2;
      double derivative[24] = {-density, density * a};  // of -density, the n-th: Hermite's polynomials, by recursion
      for (int n = 2; n < 24; ++n) derivative[n] = -a * derivative[n - 1] - (n - 1) * derivative[n - 2];
      double c[25] = {tail}, factorial = 1;
      for (int n = 1; n < 25; ++n) c[n] = derivative[n - 1] / (factorial *= n);
      power[0][i] = c[0];
      power[1][i] = c[1] - c[5] * half * half * half * half * 5 / 16;
      power[2][i] = c[2];
      power[3][i] = c[3] + c[5] * half * half * 20 / 16;
      power[4][i] = c[4];
      double to_next = 1;
      for (int n = 1; n < 25; ++n) tail += c[n] * (to_next *= kStep);
      double ratio = 1, term = 1;  // of the next density to this: e^(-kStep (a + kStep / 2))
      for (int n = 1; n < 30; ++n) ratio += term *= -kStep * (a + half) / n;
      density *= ratio;
    }
  }
};

inline F32 normal(F32 x) {
  static constexpr NormalTail kTail;
  const F32 a = bits_as<F32>(bits_as<S32>(x) & 0x7fffffff);
  const F32 m = _mm512_maskz_min_ps(0xffff, a, broadcast(31 * NormalTail::kStep));
  const F32 rounder = F32{} + 0x1.8p23f, nearest = m * static_cast<float>(1 / NormalTail::kStep) + rounder;
  const F32 distance = m - (nearest - rounder) * static_cast<float>(NormalTail::kStep);
  const auto coefficient = [&](int i) -> F32 {
    return _mm512_permutex2var_ps(load(kTail.power[i]), bits_as<__m512i>(nearest), load(kTail.power[i] + kLanes));
  };
  F32 tail = coefficient(NormalTail::kPowers - 1);
#pragma GCC unroll 4
  for (int i = NormalTail::kPowers - 2; i >= 0; --i) tail = tail * distance + coefficient(i);
  return x < 0.0f ? tail : 1.0f - tail;
}
#else
// Φ(-a) = e^(g(a) - a²/2) for a >= 0, g the polynomial of least error in a Φ(-a) (2 · 10⁻⁸) up to 5.6.  There Φ(-a) is
// 10⁻⁸, and g stays what it is.
inline F32 normal(F32 x) {
  const F32 a = bits_as<F32>(bits_as<S32>(x) & 0x7fffffff);
  const F32 m = a > 5.6f ? F32{} + 5.6f : a;  // NaN stays
  F32 g = m * -0x1.09628ep-20f + 0x1.08a9fep-16f;
  g = g * m - 0x1.3b93ccp-14f;
  g = g * m - 0x1.d25cc6p-13f;
  g = g * m + 0x1.4b86d4p-8f;
  g = g * m - 0x1.2afcp-5f;
  g = g * m + 0x1.74321cp-3f;
  g = g * m - 0x1.9884f8p-1f;
  g = g * m - 0x1.62e42ep-1f;
  const F32 tail = exp_or_0(a * -0.5f * a + g);
  return x < 0.0f ? tail : 1.0f - tail;
}
#endif

// x Φ(x): within 4 ulp where x > 0 and within 10⁻⁷ where x < 0, as PyTorch's own.
inline F32 gelu(F32 x) {
  return x * normal(x);
}

// ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), as x / (1 + e^(-2 …)): within 3 ulp where x > -1, and as the exponent is
// rounded, 70 at -6.
inline F32 gelu_tanh(F32 x) {
  return x / (1.0f + exp(x * (x * x * -0x1.2444f2p-4f - 0x1.988454p+0f)));
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
