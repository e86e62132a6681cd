// The products of blocks.h on AMX: 32 rows × 32 columns as 2 × 2 tiles of sums, 64 bytes of k a step.  A tile of x is
// 16 rows as prepare() left them; one of the weight is 16 lanes of k × 16 columns, as pack() left them.
#pragma once

#ifdef __AMX_INT8__

#include <atomic>

#include "blocks.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// Tiles multiply signed by signed: nothing is shifted.
struct TileIntegers : Integers {
  static constexpr int kParts = 1;

  static Bytes load(const int8_t* w) { return load_bytes(w); }

  template <class T>
  static void prepare(const T* x, int64_t k, Header& header, Code* row) {
    codes_of(x, k, header, row);
  }

  static S32 exact(const int32_t* sums, const Header&) { return bits_as<S32>(load_bytes(sums)); }
  static F32 finish(const int32_t* sums, int64_t, const Header& header) {
    return __builtin_convertvector(exact(sums, header), F32) * broadcast(header.scale);
  }

  // Numbers of tiles are part of the instruction's name: gcc takes no constants from templates.
  template <int kSums>
  static void multiply_tiles() {
    if constexpr (kSums == 0) _tile_dpbssd(0, 4, 6);
    if constexpr (kSums == 1) _tile_dpbssd(1, 4, 7);
    if constexpr (kSums == 2) _tile_dpbssd(2, 5, 6);
    if constexpr (kSums == 3) _tile_dpbssd(3, 5, 7);
  }
};

struct TileBf16 : Bf16 {
  static constexpr int kRowsInPlace = 32;
  static constexpr int kParts = 1;

  template <int kSums>
  static void multiply_tiles() {
    if constexpr (kSums == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kSums == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSums == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kSums == 3) _tile_dpbf16ps(3, 5, 7);
  }
};

// fp32 is the sum of three bf16, exactly: 24 bits of it are 8 and 8 and 8.  The weight's codes are bf16, so that three
// products are one of fp32, in a fifth of the time.  A row has the parts by turns, 64 bytes of each.
struct TileFloats : TileBf16 {
  static constexpr int kRowsInPlace = 0;
  static constexpr int kParts = 3;
  struct Code {
    BFloat16 parts[kParts];
  };

  template <class T>
  static void prepare(const T* x, int64_t k, Header&, Code* row) {
    auto* to = reinterpret_cast<BFloat16*>(row);
    for (int64_t i = 0; i < k; i += kStep, to += kParts * kStep)
      for (int half = 0; half < kStep; half += kLanes) {
        const int64_t left = k - i - half;
        F32 rest = left > 0 ? load_at_most(x + i + half, left) : F32{};
        for (int part = 0; part < kParts; ++part) rest = split(rest, to + part * kStep + half);
      }
  }

 private:
  // The upper half of each number goes to `upper`; what it lacks is returned, nothing for NaN and infinity.
  static F32 split(F32 x, BFloat16* upper) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    const auto bits = bits_as<U32>(x);
    const auto is_nan = bits_as<U32>(x != x);
    const U32 kept = (bits & 0xffff0000u) | (is_nan & 0x400000u);  // a NaN with nothing up there stays one
    const Halves halves = __builtin_convertvector(kept >> 16, Halves);
    std::memcpy(upper, &halves, sizeof(halves));
    const auto finite = bits_as<U32>((bits & 0x7f800000u) != 0x7f800000u);
    return bits_as<F32>(bits_as<U32>(x - bits_as<F32>(kept)) & finite);
  }
};

// Eight tiles of 16 rows of 64 bytes, until _tile_release().
inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  _tile_loadconfig(&shapes);
}

struct Tiles {
  static constexpr int kRowsAtOnce = 32;
  static constexpr int kGroupsPerTile = 16;

  // Not by an object's life: its destructor would have the object file export what exceptions need.
  static void begin() { configure_tiles(); }
  static void end() { _tile_release(); }

  // Tiles 0 to 3 hold the sums, 4 and 5 x, 6 and 7 the panel.  Of a row in parts the small ones are added up first, and
  // those of a panel apart from the others: each sum is rounded less often beside a large one.
  template <class Scheme>
  static void rows(const char* x, int64_t stride, int rows, const Bytes* panel, int64_t groups, bool add,
                   typename Scheme::Sum* sums, const LinearParams& p, Unfinished<Scheme>& before) {
    constexpr bool kApart = Scheme::kParts > 1;
    alignas(64) typename Scheme::Sum apart[kApart ? kRowsAtOnce * kStripColumns : 1];
    typename Scheme::Sum* const to = kApart && add ? apart : sums;
    std::atomic_signal_fence(std::memory_order_seq_cst);  // the intrinsics do not say that they read memory
    if (add && !kApart) {
      load_sums(sums);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const int64_t turns = groups * Scheme::kParts / (2 * kGroupsPerTile) + 1;
    const int meanwhile = (kRowsAtOnce + turns - 1) / turns;  // rows of `before`, at every other step
    for (int part = Scheme::kParts - 1; part >= 0; --part)
      for (int64_t g = 0; g < groups; g += kGroupsPerTile) {
        add_products<Scheme>(x + part * kTileBytes + Scheme::kParts * 4 * g, stride, rows, panel + 2 * g);
        if (g / kGroupsPerTile % 2 == 0) before.finish(p, meanwhile);
      }
    store_sums(to);
    if constexpr (kApart) {
      if (!add) return;
      for (int i = 0; i < rows * kStripColumns; i += kLanes) store(sums + i, load(sums + i) + load(apart + i));
    }
  }

 private:
  static constexpr int64_t kTileBytes = 64, kSumsStride = kStripColumns * 4, kPanelStride = 2 * kVectorBytes;

  template <class Scheme>
  static __attribute__((always_inline)) void add_products(const char* x, int64_t stride, int rows, const Bytes* panel) {
    _tile_loadd(6, panel, kPanelStride);
    _tile_loadd(4, x, stride);
    Scheme::template multiply_tiles<0>();
    _tile_loadd(7, panel + 1, kPanelStride);
    Scheme::template multiply_tiles<1>();
    if (rows > 16) {
      _tile_loadd(5, x + 16 * stride, stride);
      Scheme::template multiply_tiles<2>();
      Scheme::template multiply_tiles<3>();
    }
  }

  template <class Sum>
  static void load_sums(const Sum* sums) {
    _tile_loadd(0, sums, kSumsStride);
    _tile_loadd(1, sums + 16, kSumsStride);
    _tile_loadd(2, sums + 16 * kStripColumns, kSumsStride);
    _tile_loadd(3, sums + 16 * kStripColumns + 16, kSumsStride);
  }

  template <class Sum>
  static void store_sums(Sum* sums) {
    _tile_stored(0, sums, kSumsStride);
    _tile_stored(1, sums + 16, kSumsStride);
    _tile_stored(2, sums + 16 * kStripColumns, kSumsStride);
    _tile_stored(3, sums + 16 * kStripColumns + 16, kSumsStride);
  }
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA

#endif
