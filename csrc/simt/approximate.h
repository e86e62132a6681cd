// Approximate instructions: correctly rounded, or wrong by as much as PTX lets them be.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "machine.h"

namespace llmkern::simt {

// A subnormal is zero to instructions with .ftz.
inline float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

// y, the exact result for x, with a relative error of up to `bound`: a function of x, as on a GPU, that the salt draws:
// one half of all x get an error at the bound, of either sign, the others one within.  What PTX tabulates (results for
// zeros, infinities and NaN) is exact.
inline float approximate(float y, float x, float bound) {
  if (settings.approximate == 0 || !std::isfinite(y) || y == 0.0f || x == 0.0f || !std::isfinite(x)) return y;
  uint64_t z = (settings.approximate << 32 | std::bit_cast<uint32_t>(x)) * 0x9e3779b97f4a7c15;
  z = (z ^ z >> 29) * 0xbf58476d1ce4e5b9;
  z ^= z >> 32;
  const float share = z & 1 ? 1.0f : static_cast<float>(z >> 40) * 0x1p-24f;
  // Towards zero after the sum in double, so that rounding takes the error no further than the bound.
  const double error = (z & 2 ? share : -share) * static_cast<double>(bound) * y;
  const float drawn = static_cast<float>(y + error);
  return std::fabs(static_cast<double>(drawn) - y) > std::fabs(static_cast<double>(bound) * y) ? y : drawn;
}

}  // namespace llmkern::simt
