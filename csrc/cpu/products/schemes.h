// Building blocks of products, per scheme and instruction set.  A lane, 4 bytes of a register, holds neighbours along
// k: kPerLane of the scheme's Code.  multiply() adds the products of two registers, lane by lane, to one of sums.
//   Floats    fp32, 1 to a lane; the weight of any type is widened on its way
//   Integers  with VNNI or sdot int8, 4 to a lane; else widened to int16, 2 to a lane.  Exact for all codes.
//   Digits    with VNNI or sdot: x in fixed point of 32 bits, four int8 digits; kSums = 4 sums for each row
//   Bf16      with AVX512-BF16: bf16, 2 to a lane; products are exact, sums fp32, what is subnormal is taken for 0.  On
//             Arm for matrices only (matrices.h)
#pragma once

#include <algorithm>
#include <type_traits>

#include "../int8.h"
#include "../vec.h"
#include "llmkern/linear.h"

#if LLMKERN_ISA_LEVEL == 0 && defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define LLMKERN_DOT  // products of four bytes
#endif

namespace llmkern::LLMKERN_ISA {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));  // a register, whatever is in it

// A scheme that says nothing else prepares every row of x.
struct Prepared {
  static constexpr int kRowsInPlace = 0;  // so many are multiplied where they lie, if they lie well
};

// Data kept beside each prepared row of x.
struct Header {
  float scale;
  uint32_t compensation[4];  // what Integers::multiply has added too much to each of the sums, modulo 2³²
};
static_assert(sizeof(Header) == kLinearHeaderBytes);

inline Bytes load_bytes(const void* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Codes from one part of a prepared row to the next.
inline int64_t padded(int64_t k) {
  return (k + 63) / 64 * 64;
}

// kLanesAtOnce lanes of x, each to be multiplied with every lane of a register: on Arm as they lie, since instructions
// multiply by a lane, else one lane's bytes in all.
#ifdef __aarch64__
constexpr int kLanesAtOnce = 4;

inline Bytes load_lanes(const void* p) {
  return vreinterpretq_u8_f32(vld1q_f32(static_cast<const float*>(p)));
}
#else
constexpr int kLanesAtOnce = 1;

inline Bytes load_lanes(const void* p) {
  int32_t lane;
  std::memcpy(&lane, p, sizeof(lane));
  return bits_as<Bytes>(S32{} + lane);
}
#endif

// One lane's bytes in every lane.
inline Bytes broadcast_lane(const void* p) {
  int32_t lane;
  std::memcpy(&lane, p, sizeof(lane));
  return bits_as<Bytes>(S32{} + lane);
}

struct Floats : Prepared {
  using Code = float;
  using Sum = float;
  using Sums = F32;
  static constexpr int kSums = 1;
  static constexpr int kPerLane = 1;
  static constexpr int kStep = kPerLane * kLanes;  // codes in a register
  static constexpr int64_t kSegment = 64 * kStep;  // added up apart, so that long sums lose no accuracy

  template <class W>
  static Bytes load(const W* w) {
    return bits_as<Bytes>(LLMKERN_ISA::load(w));
  }

  // As much as there is of the register at p, which has n > 0 numbers left.
  template <class T>
  static Bytes load_part(const T* p, int64_t n) {
    return bits_as<Bytes>(load_at_most(p, n));
  }

  static F32 multiply(Bytes w, Bytes x, F32 acc) { return acc + bits_as<F32>(w) * bits_as<F32>(x); }

  template <class T>
  static void prepare(const T* x, int64_t k, Header&, float* row) {
    for (int64_t i = 0; i < k; i += kLanes) store(row + i, load_at_most(x + i, k - i));
  }

  static F32 add(F32 a, F32 b) { return a + b; }
  static float total(F32 sums) { return sum(sums); }
  static F32 finish(const float* sums, int64_t, const Header&) { return LLMKERN_ISA::load(sums); }
};

struct Integers : Prepared {
  using Sum = int32_t;
  using Sums = S32;
  static constexpr int kSums = 1;
  static constexpr int64_t kSegment = int64_t{1} << 62;  // exact at any length
#if defined(__ARM_FEATURE_DOTPROD)
  using Code = int8_t;
  static constexpr int kPerLane = 4;
  static constexpr int kShift = 0;

  static Bytes load(const int8_t* w) { return load_bytes(w); }

  static S32 multiply(Bytes w, Bytes x, S32 acc) {
    return bits_as<S32>(vdotq_s32(bits_as<int32x4_t>(acc), bits_as<int8x16_t>(w), bits_as<int8x16_t>(x)));
  }
#elif defined(LLMKERN_DOT)
  using Code = int8_t;
  static constexpr int kPerLane = 4;
  static constexpr int kShift = 128;  // vpdpbusd multiplies unsigned by signed: the weight's codes are shifted

  static Bytes load(const int8_t* w) { return load_bytes(w) ^ 0x80; }

  static S32 multiply(Bytes w, Bytes x, S32 acc) {
#if LLMKERN_ISA_LEVEL == 2
    return bits_as<S32>(_mm512_dpbusd_epi32(bits_as<__m512i>(acc), bits_as<__m512i>(w), bits_as<__m512i>(x)));
#else
    return bits_as<S32>(_mm256_dpbusd_avx_epi32(bits_as<__m256i>(acc), bits_as<__m256i>(w), bits_as<__m256i>(x)));
#endif
  }
#else
  using Code = int16_t;
  static constexpr int kPerLane = 2;
  static constexpr int kShift = 0;

  static Bytes load(const int8_t* w) {
#ifdef __aarch64__
    return vreinterpretq_u8_s16(vmovl_s8(vld1_s8(w)));
#else
    typedef int8_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
    typedef int16_t Wide __attribute__((vector_size(kVectorBytes)));
    Narrow narrow;
    std::memcpy(&narrow, w, sizeof(narrow));
    return bits_as<Bytes>(__builtin_convertvector(narrow, Wide));
#endif
  }

  static S32 multiply(Bytes w, Bytes x, S32 acc) {
#if LLMKERN_ISA_LEVEL == 2
    return acc + bits_as<S32>(_mm512_madd_epi16(bits_as<__m512i>(w), bits_as<__m512i>(x)));
#elif LLMKERN_ISA_LEVEL == 1
    return acc + bits_as<S32>(_mm256_madd_epi16(bits_as<__m256i>(w), bits_as<__m256i>(x)));
#elif defined(__SSE2__)
    return acc + bits_as<S32>(_mm_madd_epi16(bits_as<__m128i>(w), bits_as<__m128i>(x)));
#elif defined(__aarch64__)
    // Lane i has products of codes i and i + 4: only the lanes' total counts (multiply_lane has the columns apart).
    const int16x8_t w16 = vreinterpretq_s16_u8(w), x16 = vreinterpretq_s16_u8(x);
    return vmlal_high_s16(vmlal_s16(acc, vget_low_s16(w16), vget_low_s16(x16)), w16, x16);
#else
    const S32 u = bits_as<S32>(w), v = bits_as<S32>(x);
    return acc + (u << 16 >> 16) * (v << 16 >> 16) + (u >> 16) * (v >> 16);
#endif
  }
#endif
  static constexpr int kStep = kPerLane * kLanes;

  // x: values, or the codes themselves.
  template <class T>
  static void prepare(const T* x, int64_t k, Header& header, Code* row) {
    codes_of(x, k, header, row);
    int32_t total = 0;
    for (int64_t i = 0; kShift != 0 && i < k; ++i) total += row[i];
    header.compensation[0] = static_cast<uint32_t>(total) * kShift;
  }

  template <class T>
  static void codes_of(const T* x, int64_t k, Header& header, Code* row) {
    if constexpr (std::is_same_v<T, int8_t>)
      std::copy(x, x + k, row);
    else
      header.scale = quantize_row(x, k, row);
  }

  // Modulo 2³², as multiply() adds.
  static S32 add(S32 a, S32 b) { return bits_as<S32>(bits_as<U32>(a) + bits_as<U32>(b)); }
  static int32_t total(S32 sums) { return static_cast<int32_t>(sum(bits_as<U32>(sums))); }

  // The totals of four registers, in the time of two.
  static auto totals(S32 a, S32 b, S32 c, S32 d) {
    const auto add_pairs = [](S32 u, S32 v) {
      return bits_as<U32>(interleave_lower(u, v)) + bits_as<U32>(interleave_upper(u, v));
    };
    const auto ac = bits_as<S32>(add_pairs(a, c)), bd = bits_as<S32>(add_pairs(b, d));
    return quarter_sum(add_pairs(ac, bd));
  }
  static S32 exact(const int32_t* sums, const Header& header, int i = 0) {
    return bits_as<S32>(bits_as<U32>(load_bytes(sums)) - header.compensation[i]);
  }
  static F32 finish(const int32_t* sums, int64_t, const Header& header) {
    return __builtin_convertvector(exact(sums, header), F32) * broadcast(header.scale);
  }
};

#ifdef LLMKERN_DOT
// x in steps of its row's largest number / 127 · 2²⁴, about 2⁻³¹ of it: finer than fp32 rounds a sum in which that
// number takes part.  A number is four digits to the base 256, each from -128 to 127, the highest first.  Their four
// products of bytes take less time than widening four codes to fp32, and keep up with memory.
struct Digits : Integers {
  static constexpr int kSums = 4;
  static constexpr float kLargest = 127.0f * (1 << 24);  // below what digits hold: it may be rounded up

  // Return true if the row can be prepared so: not if it holds NaN or infinity, or tiny numbers only.
  static bool served(const Header& header) { return header.scale == header.scale; }

  template <class T>
  static void prepare(const T* x, int64_t k, Header& header, int8_t* row) {
    const auto value = [x](int64_t i, int n) { return load_at_most(x + i, n); };
    const float amax = amax_of(value, k);
    const bool in_range = amax >= 0x1p-80f && amax < __builtin_inff();
    header.scale = in_range ? amax / kLargest : amax == 0.0f ? 0.0f : __builtin_nanf("");
    const F32 inv = broadcast(in_range ? kLargest / amax : 0.0f);
    const int64_t stride = padded(k);
    S32 totals[kSums] = {};
    for (int64_t i = 0; i < stride; i += kLanes) {
      S32 rest = i < k && in_range ? round_to_int(value(i, k - i < kLanes ? k - i : kLanes) * inv) : S32{};
      for (int digit = kSums - 1; digit >= 0; --digit) {
        typedef int8_t Narrow __attribute__((vector_size(kLanes)));
        const S32 last = rest << 24 >> 24;
        const Narrow narrow = __builtin_convertvector(last, Narrow);
        std::memcpy(row + digit * stride + i, &narrow, sizeof(narrow));
        totals[digit] += last;
        rest = (rest - last) >> 8;
      }
    }
    for (int digit = 0; digit < kSums; ++digit) header.compensation[digit] = sum(bits_as<U32>(totals[digit])) * kShift;
  }

  static F32 finish(const int32_t* sums, int64_t stride, const Header& header) {
    F32 y = {};
    for (int digit = 0; digit < kSums; ++digit)
      y = y * broadcast(256.0f) + __builtin_convertvector(exact(sums + digit * stride, header, digit), F32);
    return y * broadcast(header.scale);
  }
};
#endif

#ifdef __AVX512BF16__
struct Bf16 {
  static constexpr int kRowsInPlace = 12;  // the rows of Vectors (blocks.h)
  static constexpr int kSums = 1;
  using Code = BFloat16;
  using Sum = float;
  using Sums = F32;
  static constexpr int kPerLane = 2;
  static constexpr int kStep = kPerLane * kLanes;
  static constexpr int64_t kSegment = 32 * kStep;  // a lane adds up as many products as one of Floats

  static Bytes load(const BFloat16* w) { return load_bytes(w); }

  // Every code is a bf16.
  static Bytes load(const int8_t* w) {
    return bits_as<Bytes>(_mm512_cvtne2ps_pbh(LLMKERN_ISA::load(w + kLanes), LLMKERN_ISA::load(w)));
  }

  static Bytes load_part(const BFloat16* p, int64_t n) {
    return bits_as<Bytes>(n >= kStep ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p));
  }

  static F32 multiply(Bytes w, Bytes x, F32 acc) {
    return _mm512_dpbf16_ps(acc, bits_as<__m512bh>(w), bits_as<__m512bh>(x));
  }

  static void prepare(const BFloat16* x, int64_t k, Header&, BFloat16* row) { std::memcpy(row, x, k * sizeof(*x)); }

  static F32 add(F32 a, F32 b) { return a + b; }
  static float total(F32 sums) { return sum(sums); }
  static F32 finish(const float* sums, int64_t, const Header&) { return LLMKERN_ISA::load(sums); }
};
#endif

// A register of a panel as multiply_lane takes it.
template <class Scheme>
inline Bytes operand(Bytes w) {
#if defined(__aarch64__) && !defined(LLMKERN_DOT)
  if constexpr (std::is_same_v<Scheme, Integers>) {  // the even codes, one of each column, then the odd ones
    const uint16x8_t codes = vreinterpretq_u16_u8(w);
    return vreinterpretq_u8_u64(
        vzip1q_u64(vreinterpretq_u64_u16(vuzp1q_u16(codes, codes)), vreinterpretq_u64_u16(vuzp2q_u16(codes, codes))));
  }
#endif
  return w;
}

// acc + w · lane kLane of x.
template <class Scheme, int kLane>
inline typename Scheme::Sums multiply_lane(Bytes w, Bytes x, typename Scheme::Sums acc) {
#ifdef __aarch64__
  if constexpr (std::is_same_v<Scheme, Floats>) {
    return vfmaq_laneq_f32(acc, vreinterpretq_f32_u8(w), vreinterpretq_f32_u8(x), kLane);
  } else {
#ifdef LLMKERN_DOT
    return vdotq_laneq_s32(acc, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x), kLane);
#else
    const int16x8_t w16 = vreinterpretq_s16_u8(w), x16 = vreinterpretq_s16_u8(x);
    const int32x4_t even = vmlal_laneq_s16(acc, vget_low_s16(w16), x16, 2 * kLane);
    return vmlal_high_laneq_s16(even, w16, x16, 2 * kLane + 1);
#endif
  }
#else
  return Scheme::multiply(w, x, acc);
#endif
}

// The first n < kStep weights at w as a register; what stands for the others meets zeros of x.
template <class Scheme, class W>
inline Bytes load_first_weights(const W* w, int n) {
  W padded[Scheme::kStep] = {};
  std::memcpy(padded, w, n * sizeof(W));
  return Scheme::load(padded);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
