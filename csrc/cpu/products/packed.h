// Packed weights on the CPU: a line of a panel, 16 rows × 4 columns in 64 bytes, as registers of codes that multiply
// by four bytes of x in every lane.
//   small codes  of 4, 5 and 6 bits, unsigned: 0 … 63, of which the shift is taken from the sums
//   wide codes   s8 and nl4's levels; with vpdpbusd, which multiplies unsigned by signed, 128 more, which the sums
//                begin without
#pragma once

#include "../int8.h"
#include "epilogue.h"
#include "llmkern/packed.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kLineBytes = 4 * kPanelRows, kLinesPerBlock = kPackedBlock / 4;
constexpr int kRegs = kLineBytes / kVectorBytes;  // of a line, and of the sums of a panel
constexpr int64_t kFetchAhead = 4096;

#if defined(LLMKERN_DOT) && !defined(__aarch64__)
constexpr int kWideShift = 128;
#else
constexpr int kWideShift = 0;
#endif

typedef uint16_t Words __attribute__((vector_size(kVectorBytes)));
typedef int16_t SignedWords __attribute__((vector_size(kVectorBytes)));

// Each byte shifted left by kBits, or right by -kBits, and masked with what no neighbour's bits reach.
template <int kBits, int kMask>
inline Bytes shifted(Bytes v) {
  const Words words = bits_as<Words>(v);
  if constexpr (kBits >= 0)
    return bits_as<Bytes>(words << kBits) & static_cast<uint8_t>(kMask);
  else
    return bits_as<Bytes>(words >> -kBits) & static_cast<uint8_t>(kMask);
}

// The level of each code 0 … 15.
inline Bytes levels_of(Bytes codes) {
  constexpr int8_t kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  alignas(64) uint8_t table[kVectorBytes];  // once in each 16 bytes
  for (int i = 0; i < kVectorBytes; ++i) table[i] = static_cast<uint8_t>(kLevels[i % 16] + kWideShift);
#if LLMKERN_ISA_LEVEL == 2
  return bits_as<Bytes>(_mm512_shuffle_epi8(bits_as<__m512i>(load_bytes(table)), bits_as<__m512i>(codes)));
#elif LLMKERN_ISA_LEVEL == 1
  return bits_as<Bytes>(_mm256_shuffle_epi8(bits_as<__m256i>(load_bytes(table)), bits_as<__m256i>(codes)));
#elif defined(__aarch64__)
  return vqtbl1q_u8(load_bytes(table), codes);
#else
  Bytes out;
  for (int i = 0; i < kVectorBytes; ++i) out[i] = table[codes[i]];
  return out;
#endif
}

// Unpack one kind of codes: lines<i>(block, reg, low, high) gives lines i and i + 4, register `reg` of each.
struct NibbleCodes {
  static constexpr bool kWide = false;
  static constexpr int kHalves = 1;  // groups of scales in a block
  static constexpr int64_t kBytes = 4 * kLineBytes;

  template <int i>
  static void lines(const uint8_t* block, int reg, Bytes& low, Bytes& high) {
    const Bytes both = load_bytes(block + i * kLineBytes + reg * kVectorBytes);
    low = both & uint8_t{15};
    high = shifted<-4, 15>(both);
  }
};

struct LevelCodes : NibbleCodes {
  static constexpr bool kWide = true;

  template <int i>
  static void lines(const uint8_t* block, int reg, Bytes& low, Bytes& high) {
    NibbleCodes::lines<i>(block, reg, low, high);
    low = levels_of(low), high = levels_of(high);
  }
};

struct FiveBitCodes : NibbleCodes {
  static constexpr int64_t kBytes = 5 * kLineBytes;

  template <int i>
  static void lines(const uint8_t* block, int reg, Bytes& low, Bytes& high) {
    NibbleCodes::lines<i>(block, reg, low, high);
    const Bytes fifth = load_bytes(block + 4 * kLineBytes + reg * kVectorBytes);
    low |= shifted<4 - i, 16>(fifth), high |= shifted<-i, 16>(fifth);
  }
};

struct SixBitCodes : NibbleCodes {
  static constexpr int kHalves = 2;
  static constexpr int64_t kBytes = 6 * kLineBytes;

  template <int i>
  static void lines(const uint8_t* block, int reg, Bytes& low, Bytes& high) {
    NibbleCodes::lines<i>(block, reg, low, high);
    const uint8_t* const upper = block + 4 * kLineBytes + reg * kVectorBytes;
    low |= shifted<4 - 2 * i, 48>(load_bytes(upper));
    high |= shifted<4 - 2 * i, 48>(load_bytes(upper + kLineBytes));
  }
};

struct ByteCodes : NibbleCodes {
  static constexpr bool kWide = true;
  static constexpr int64_t kBytes = 8 * kLineBytes;

  template <int i>
  static void lines(const uint8_t* block, int reg, Bytes& low, Bytes& high) {
    const auto line = [&](int n) {
      return load_bytes(block + n * kLineBytes + reg * kVectorBytes) ^ static_cast<uint8_t>(kWideShift);
    };
    low = line(i), high = line(i + 4);
  }
};

inline int shift_of(PackedCode code) {
  switch (code) {
    case PackedCode::s4:
      return 8;
    case PackedCode::s5:
      return 16;
    case PackedCode::s6:
      return 32;
    default:
      return 0;
  }
}

template <class F>
void with_codes(PackedCode code, const F& f) {
  switch (code) {
    case PackedCode::s8:
      return f.template operator()<ByteCodes>();
    case PackedCode::s4:
    case PackedCode::u4:
      return f.template operator()<NibbleCodes>();
    case PackedCode::nl4:
      return f.template operator()<LevelCodes>();
    case PackedCode::s5:
    case PackedCode::u5:
      return f.template operator()<FiveBitCodes>();
    case PackedCode::s6:
      return f.template operator()<SixBitCodes>();
  }
}

// acc + Σ of each lane's four codes times four bytes of x.
template <bool kWide>
inline S32 multiply_codes(Bytes w, Bytes x, S32 acc) {
#ifdef LLMKERN_DOT
  return Integers::multiply(w, x, acc);
#else
#if LLMKERN_ISA_LEVEL > 0
  if constexpr (!kWide) {  // pairs of products fit into 16 bits
#if LLMKERN_ISA_LEVEL == 2
    const __m512i pairs = _mm512_maddubs_epi16(bits_as<__m512i>(w), bits_as<__m512i>(x));
    return acc + bits_as<S32>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#else
    const __m256i pairs = _mm256_maddubs_epi16(bits_as<__m256i>(w), bits_as<__m256i>(x));
    return acc + bits_as<S32>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  }
#endif
#ifdef __aarch64__
  const int16x8_t low = vmull_s8(vget_low_s8(vreinterpretq_s8_u8(w)), vget_low_s8(vreinterpretq_s8_u8(x)));
  const int16x8_t high = vmull_high_s8(vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x));
  return acc + bits_as<S32>(vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#else
  const auto even = [](Bytes v) { return bits_as<Bytes>(bits_as<SignedWords>(v) << 8 >> 8); };
  const auto odd = [](Bytes v) { return bits_as<Bytes>(bits_as<SignedWords>(v) >> 8); };
  return Integers::multiply(odd(w), odd(x), Integers::multiply(even(w), even(x), acc));
#endif
#endif
}

// kLanes values of 8 bits.
template <class T>
inline F32 load_small(const void* p) {
  typedef T Narrow __attribute__((vector_size(kLanes)));
  Narrow v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(__builtin_convertvector(v, S32), F32);
}

// kLanes values of a group type from the i-th on.
inline F32 load_group_values(const PackedGroups& groups, int64_t i) {
  switch (groups.type) {
    case GroupType::f32:
      return load(static_cast<const float*>(groups.data) + i);
    case GroupType::bf16:
      return load(static_cast<const BFloat16*>(groups.data) + i);
    case GroupType::f16:
      return load(static_cast<const Float16*>(groups.data) + i);
    case GroupType::s8:
      return load_small<int8_t>(static_cast<const int8_t*>(groups.data) + i);
    case GroupType::u8:
      return load_small<uint8_t>(static_cast<const uint8_t*>(groups.data) + i);
  }
  __builtin_unreachable();
}

// Values of a panel's rows, part by part of k, each part 32 / kHalves columns; loaded where their group begins.
template <int kHalves>
class GroupReader {
 public:
  GroupReader(const PackedGroups& groups, int64_t k, int64_t panel, int64_t column) : groups_(groups) {
    if (!given()) return;
    constexpr int64_t kPart = kPackedBlock / kHalves;
    parts_ = groups.size / kPart;
    next_ = (panel * (k / groups.size) + column / groups.size) * kPanelRows;
    if (const int64_t passed = column % groups.size / kPart; passed > 0) {
      next();
      left_ = parts_ - passed;
    }
  }

  bool given() const { return groups_.data; }

 const F32 (&next()) [kRegs] {
   if (left_ == 0) {
     for (int reg = 0; reg < kRegs; ++reg) values_[reg] = load_group_values(groups_, next_ + reg * kLanes);
     next_ += kPanelRows;
     left_ = parts_;
   }
   --left_;
   return values_;
 }

 private : const PackedGroups& groups_;
  int64_t parts_ = 0, left_ = 0, next_ = 0;
  F32 values_[kRegs];
};

// Factors of a part's sums, and the zero points and codes' shift subtracted before.
struct Factors {
  F32 scale[kRegs], zero[kRegs], offset[kRegs];
};

// The factors of a panel, part by part.
template <int kHalves>
class FactorReader {
 public:
  FactorReader(const PackedWeight& w, int64_t k, int64_t panel, int64_t column)
      : scale_(w.scale, k, panel, column),
        super_scale_(w.super_scale, k, panel, column),
        zero_(w.zero, k, panel, column),
        offset_(w.offset, k, panel, column),
        super_offset_(w.super_offset, k, panel, column),
        shift_(broadcast(static_cast<float>(shift_of(w.code)))) {}

  void next(Factors& to) {
    put(to.scale, scale_.next());
    if (super_scale_.given()) multiply(to.scale, super_scale_.next());
    for (F32& zero : to.zero) zero = shift_;
    if (zero_.given()) put(to.zero, zero_.next());
    if (offset_.given()) put(to.offset, offset_.next());
    if (super_offset_.given()) multiply(to.offset, super_offset_.next());
  }

 private:
  static void put(F32 (&to)[kRegs], const F32 (&from)[kRegs]) {
    for (int reg = 0; reg < kRegs; ++reg) to[reg] = from[reg];
  }

  static void multiply(F32 (&to)[kRegs], const F32 (&by)[kRegs]) {
    for (int reg = 0; reg < kRegs; ++reg) to[reg] *= by[reg];
  }

  GroupReader<kHalves> scale_, super_scale_, zero_, offset_, super_offset_;
  F32 shift_;
};

// Codes with nothing but a scale for each block.
inline bool is_plain(const PackedWeight& w) {
  return w.scale.size == kPackedBlock && !w.super_scale.data && !w.zero.data && !w.offset.data;
}

// The factors of a panel of a plain weight with wide codes, block by block: scales.
class PlainReader {
 public:
  PlainReader(const PackedWeight& w, int64_t k, int64_t panel, int64_t column)
      : scale_(w.scale), next_((panel * (k / kPackedBlock) + column / kPackedBlock) * kPanelRows) {}

  void next(Factors& to) {
    for (int reg = 0; reg < kRegs; ++reg) to.scale[reg] = load_group_values(scale_, next_ + reg * kLanes);
    next_ += kPanelRows;
  }

 private:
  const PackedGroups& scale_;
  int64_t next_;
};

template <bool kPlain, int kHalves>
using Reader = std::conditional_t<kPlain, PlainReader, FactorReader<kHalves>>;

inline bool has_zero(const PackedWeight& w) {
  return w.zero.data || shift_of(w.code);
}

// A quantized block of 32 numbers of x: the scale of its codes, the sums (integers) of the codes in each half and in
// all, and the initial sum of products with wide codes.
struct XBlock {
  float scale, half[2], all;
  int32_t wide;

  template <int kHalves>
  float sum(int i) const {
    return kHalves == 2 ? half[i] : all;
  }

  template <bool kWide>
  S32 first_sum() const {
    return kWide && kWideShift != 0 ? S32{} + wide : S32{};
  }
};

// A row of x in the workspace: codes, then an XBlock for each 32 of them.
struct PackedRow {
  const int8_t* codes;
  const XBlock* blocks;
};

// total + a part of a row of x times a register of weights, from the sums of their codes' products.
inline F32 add_part(F32 total, S32 sums, const Factors& f, int reg, bool has_zero, bool has_offset, float x_scale,
                    float x_sum) {
  F32 product = __builtin_convertvector(sums, F32);
  if (has_zero) product -= f.zero[reg] * broadcast(x_sum);  // exact: integers below 2²⁴
  total += f.scale[reg] * product * broadcast(x_scale);
  if (has_offset) total += f.offset[reg] * broadcast(x_scale) * broadcast(x_sum);
  return total;
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
