#include "tensor_core.h"

#include <algorithm>
#include <cmath>

#include "machine.h"

namespace llmkern::simt {
namespace {

// 2^floor(log2 |x|); of zero and of subnormals, the least.
float power_of(float x) {
  const uint32_t exponent = std::bit_cast<uint32_t>(x) & 0x7f800000u;
  return std::bit_cast<float>(exponent > 0 ? exponent : 0x00800000u);
}

// One step, of any finite or other numbers.
float fused_sum(float sum, const float* left, const float* right, int stride, int count, int bits) {
  int largest = -132 - (bits - 24);
  bool finite = std::isfinite(sum);
  double plain = sum;
  auto exponent = [](float x) { return std::max(std::ilogb(x), -126); };
  for (int k = 0; k < count; ++k) {
    const float x = left[k], y = right[k * stride];
    finite &= std::isfinite(x) && std::isfinite(y);
    plain += static_cast<double>(x) * y;
    if (x != 0.0f && y != 0.0f) largest = std::max(largest, exponent(x) + exponent(y));
  }
  if (!finite) return std::isnan(plain) ? std::bit_cast<float>(0x7fffffffu) : static_cast<float>(plain);
  if (sum != 0.0f) largest = std::max(largest, exponent(sum));
  double total = std::trunc(std::ldexp(static_cast<double>(sum), bits - largest));
  for (int k = 0; k < count; ++k)
    total += std::trunc(std::ldexp(static_cast<double>(left[k]) * right[k * stride], bits - largest));
  total = std::ldexp(total, largest - bits);
  float rounded = static_cast<float>(total);
  if (std::fabs(static_cast<double>(rounded)) > std::fabs(total) && std::isfinite(rounded))
    rounded = std::nextafter(rounded, 0.0f);
  return rounded + 0.0f;
}

}  // namespace

template <int kK>
void add_products(float (&sums)[16][8], const float (&left)[16][kK], const float (&right)[kK][8]) {
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  const bool wide = settings.gpu.capability >= 90;
  const int bits = wide ? 25 : 24;
  constexpr int kMost = kK < 16 ? kK : 16;
  const int count = wide ? kMost : 8;
  // Eight results at a time in fp32, whose products of 8 or 11 bits, and cut-off terms, are exact, while no exponent
  // is near the ends of its range.
  float left_power[16][kK], least = INFINITY, most = 0.0f;
  Floats right_power[kK], factor[kK];
  auto see = [&](float x) {
    const float power = power_of(x);
    most = std::max(most, power);
    if (x != 0.0f) least = std::min(least, power);
    return x != 0.0f ? power : 0.0f;
  };
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kK; ++k) left_power[m][k] = see(left[m][k]);
  for (int k = 0; k < kK; ++k)
    for (int n = 0; n < 8; ++n) factor[k][n] = right[k][n], right_power[k][n] = see(right[k][n]);
  const bool usual = least >= 0x1p-48f && most <= 0x1p40f;
  for (int m = 0; m < 16; ++m)
    for (int first = 0; first < kK; first += count) {
      Floats sum, largest;
      bool vector = usual;
      for (int n = 0; n < 8; ++n) {
        sum[n] = sums[m][n];
        largest[n] = sum[n] != 0.0f ? power_of(sum[n]) : 0.0f;
        vector &= sum[n] == 0.0f || (std::fabs(sum[n]) >= 0x1p-96f && std::fabs(sum[n]) <= 0x1p90f);
      }
      if (!vector) {
        for (int n = 0; n < 8; ++n)
          sums[m][n] = fused_sum(sums[m][n], &left[m][first], &right[first][n], 8, count, bits);
        continue;
      }
      for (int k = first; k < first + count; ++k) {
        const Floats power = left_power[m][k] * right_power[k];
        largest = power > largest ? power : largest;
      }
      Floats scale;
      for (int n = 0; n < 8; ++n) {
        const uint32_t exponent = std::bit_cast<uint32_t>(static_cast<float>(largest[n])) >> 23;
        scale[n] = exponent == 0 ? 0.0f : std::bit_cast<float>((254 + bits - exponent) << 23);
      }
      Ints total = {};
      for (int k = first; k < first + count; ++k)
        total += __builtin_convertvector(left[m][k] * factor[k] * scale, Ints);  // converts towards zero
      const Ints before = __builtin_convertvector(sum * scale, Ints);
      for (int n = 0; n < 8; ++n) {
        const int64_t exact = int64_t{total[n]} + before[n], size = exact < 0 ? -exact : exact;
        const int excess = std::max(0, 40 - std::countl_zero(static_cast<uint64_t>(size)));  // beyond 24 bits
        const float whole = static_cast<float>(size >> excess << excess);
        sums[m][n] = exact == 0 ? 0.0f : std::copysign(whole, static_cast<float>(exact)) / scale[n];
      }
    }
}

template void add_products(float (&)[16][8], const float (&)[16][8], const float (&)[8][8]);
template void add_products(float (&)[16][8], const float (&)[16][16], const float (&)[16][8]);

}  // namespace llmkern::simt
