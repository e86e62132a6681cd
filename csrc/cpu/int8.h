// Rows of floats rounded to int8 codes.
#pragma once

#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// Round to nearest, ties to even; |v| below 2³¹.
inline S32 round_to_int(F32 v) {
#if LLMKERN_ISA_LEVEL == 2
  return bits_as<S32>(_mm512_cvtps_epi32(bits_as<__m512>(v)));
#elif LLMKERN_ISA_LEVEL == 1
  return bits_as<S32>(_mm256_cvtps_epi32(bits_as<__m256>(v)));
#elif defined(__aarch64__)
  return bits_as<S32>(vcvtnq_s32_f32(v));
#else
  S32 rounded;
  for (int i = 0; i < kLanes; ++i) rounded[i] = static_cast<int32_t>(__builtin_lrintf(v[i]));
  return rounded;
#endif
}

// The largest |value| of k, NaN where one is; value(i, n) as for_registers asks for it.
template <class Value>
float amax_of(const Value& value, int64_t k) {
  S32 most = {};  // |v| as bits: in that order infinity is beyond every number and NaN beyond infinity
  for_registers(k, [&](int64_t i, int n) {
    const S32 magnitude = bits_as<S32>(value(i, n)) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  });
  int32_t largest = 0;
  for (int j = 0; j < kLanes; ++j) largest = most[j] > largest ? most[j] : largest;
  return bits_as<float>(largest);
}

// Writes k codes, int8_t or wider, and returns their scale, as the op quantize_int8 defines both, to the bit.  value(i,
// n) is the register of values from i on, of which n count where n < kLanes; each is asked for twice.
template <class Value, class Code>
float quantize_values(const Value& value, int64_t k, Code* codes) {
  const auto counting = [&value](int64_t i, int n) { return n < kLanes ? first(value(i, n), n) : value(i, n); };
  const float amax = amax_of(counting, k);
  const float scale = amax < 0x1p-118f ? 0.0f : amax / 127.0f;
  if (!(scale > 0.0f && scale < __builtin_inff())) {
    for (int64_t i = 0; i < k; ++i) codes[i] = 0;
    return scale;
  }
  const F32 inv = broadcast(127.0f / amax);
  for_registers(k, [&](int64_t i, int n) {
    typedef Code Narrow __attribute__((vector_size(kLanes * sizeof(Code))));
    const Narrow narrow = __builtin_convertvector(round_to_int(counting(i, n) * inv), Narrow);
    std::memcpy(codes + i, &narrow, n * sizeof(Code));
  });
  return scale;
}

template <class T, class Code>
float quantize_row(const T* x, int64_t k, Code* codes) {
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
