// The products of blocks.h by NEON's matrix instructions, smmla and bfmmla: 2 rows × 2 columns of sums, 8 bytes of k.
// operands  Two rows of x, 8 bytes of each, as prepare() left them; two columns of the panel, the lanes of two
//           neighbouring groups side by side.
// sums      5 pairs of rows × 4 pairs of columns in registers.
// bf16      Products are exact.  Sums of pairs are rounded to odd, and what is subnormal is taken for 0.
#pragma once

#if defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define LLMKERN_MATRICES

#include "blocks.h"

namespace llmkern::LLMKERN_ISA {
namespace {

struct Bf16 {
  static constexpr int kRowsInPlace = 10;  // the rows of Matrices
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
    return bits_as<Bytes>(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(LLMKERN_ISA::load(w)), LLMKERN_ISA::load(w + kLanes)));
  }

  static F32 multiply(Bytes w, Bytes x, F32 acc) {
    return vbfdotq_f32(acc, bits_as<bfloat16x8_t>(w), bits_as<bfloat16x8_t>(x));
  }

  static void prepare(const BFloat16* x, int64_t k, Header&, BFloat16* row) { std::memcpy(row, x, k * sizeof(*x)); }

  static F32 add(F32 a, F32 b) { return a + b; }
  static float total(F32 sums) { return sum(sums); }
  static F32 finish(const float* sums, int64_t, const Header&) { return LLMKERN_ISA::load(sums); }
};

// Two rows times two columns: [row 0, column 0], [0, 1], [1, 0], [1, 1].
inline S32 multiply_pairs(Bytes x, Bytes w, S32 acc) {
  return bits_as<S32>(vmmlaq_s32(bits_as<int32x4_t>(acc), bits_as<int8x16_t>(x), bits_as<int8x16_t>(w)));
}

inline F32 multiply_pairs(Bytes x, Bytes w, F32 acc) {
  return vbfmmlaq_f32(acc, bits_as<bfloat16x8_t>(x), bits_as<bfloat16x8_t>(w));
}

// sums[r] (+)= Σ over the panel's `groups` lanes of x[r] for kPairs pairs of rows, `stride` bytes apart, the last
// `last_stride`: 0 where there is but one row, whose sums are the second's too.  Beyond an odd number of groups there
// are zeros in both x and the panel.
template <class Scheme, int kPairs>
inline void block_of_pairs(const char* x, int64_t stride, int64_t last_stride, const Bytes* panel, int64_t groups,
                           bool add, typename Scheme::Sum* sums) {
  using Sums = typename Scheme::Sums;
  constexpr int kColumnPairs = kStripColumns / 2;
  Sums acc[kPairs][kColumnPairs] = {};
  for (int64_t g = 0; g < groups; g += 2, x += 8, panel += 4) {
    Bytes w[kColumnPairs];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const U32 first = bits_as<U32>(panel[half]), second = bits_as<U32>(panel[2 + half]);
      w[2 * half] = bits_as<Bytes>(interleave_lower(first, second));
      w[2 * half + 1] = bits_as<Bytes>(interleave_upper(first, second));
    }
#pragma GCC unroll 5
    for (int pair = 0; pair < kPairs; ++pair) {
      const char* const upper = x + 2 * pair * stride;
      const char* const lower = upper + (pair + 1 < kPairs ? stride : last_stride);
      int64_t rows[2];
      std::memcpy(&rows[0], upper, 8);
      std::memcpy(&rows[1], lower, 8);
      const Bytes both = bits_as<Bytes>(vcombine_s64(vdup_n_s64(rows[0]), vdup_n_s64(rows[1])));
#pragma GCC unroll 4
      for (int c = 0; c < kColumnPairs; ++c) acc[pair][c] = multiply_pairs(both, w[c], acc[pair][c]);
    }
  }
  const auto put = [&](Sums value, typename Scheme::Sum* at) {
    if (add) value = Scheme::add(value, bits_as<Sums>(load_bytes(at)));
    std::memcpy(at, &value, sizeof(value));
  };
#pragma GCC unroll 5
  for (int pair = 0; pair < kPairs; ++pair)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const auto left = bits_as<int64x2_t>(acc[pair][2 * half]), right = bits_as<int64x2_t>(acc[pair][2 * half + 1]);
      typename Scheme::Sum* const at = sums + 2 * pair * kStripColumns + half * kLanes;
      put(bits_as<Sums>(vzip1q_s64(left, right)), at);
      if (pair + 1 < kPairs || last_stride != 0) put(bits_as<Sums>(vzip2q_s64(left, right)), at + kStripColumns);
    }
}

struct Matrices {
  static constexpr int kRowsAtOnce = 10;

  static void begin() {}
  static void end() {}

  template <class Scheme>
  static void rows(const char* x, int64_t stride, int rows, const Bytes* panel, int64_t groups, bool add,
                   typename Scheme::Sum* sums, const LinearParams&, Unfinished<Scheme>&) {
    if (rows == kRowsAtOnce) return block_of_pairs<Scheme, 5>(x, stride, stride, panel, groups, add, sums);
    int r = 0;
    for (; r + 4 <= rows; r += 4)
      block_of_pairs<Scheme, 2>(x + r * stride, stride, stride, panel, groups, add, sums + r * kStripColumns);
    for (; r < rows; r += 2)
      block_of_pairs<Scheme, 1>(x + r * stride, stride, r + 1 < rows ? stride : 0, panel, groups, add,
                                sums + r * kStripColumns);
  }
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA

#endif
