// The products of blocks.h on AMX: 32 rows × 32 columns as 2 × 2 tiles of sums, 64 bytes of k a step.  A tile of x is
// 16 rows as prepare() left them; one of the weight is 16 lanes of k × 16 columns, as pack() left them.
#pragma once

#ifdef __AMX_INT8__

#include <atomic>

#include "schemes.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// Tiles multiply signed by signed: nothing is shifted.
struct TileIntegers : Integers {
  static Bytes load(const int8_t* w) { return load_bytes(w); }

  template <class T>
  static void prepare(const T* x, int64_t k, Header& header, Code* row) {
    codes_of(x, k, header, row);
  }

  static S32 exact(S32 sums, const Header&) { return sums; }
  static F32 finish(S32 sums, const Header& header) {
    return __builtin_convertvector(sums, F32) * broadcast(header.scale);
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

struct TileBf16 {
  using Code = BFloat16;
  using Sum = float;
  using Sums = F32;
  static constexpr int kPerLane = 2;
  static constexpr int kStep = kPerLane * kLanes;

  static Bytes load(const BFloat16* w) { return load_bytes(w); }

  // Every code is a bf16.
  static Bytes load(const int8_t* w) {
    return bits_as<Bytes>(_mm512_cvtne2ps_pbh(LLMKERN_ISA::load(w + kLanes), LLMKERN_ISA::load(w)));
  }

  static void prepare(const BFloat16* x, int64_t k, Header&, BFloat16* row) { std::memcpy(row, x, k * sizeof(*x)); }

  static F32 finish(F32 sums, const Header&) { return sums; }

  template <int kSums>
  static void multiply_tiles() {
    if constexpr (kSums == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kSums == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSums == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kSums == 3) _tile_dpbf16ps(3, 5, 7);
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

  struct Session {
    Session() { configure_tiles(); }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
  };

  // Tiles 0 to 3 hold the sums, 4 and 5 x, 6 and 7 the panel.
  template <class Scheme>
  static void rows(const char* x, int64_t stride, int rows, const Bytes* panel, int64_t groups, bool add,
                   typename Scheme::Sum* sums) {
    constexpr int64_t kSumsStride = 2 * kVectorBytes, kPanelStride = 2 * kVectorBytes;
    typename Scheme::Sum* const lower = sums + 16 * kSumsStride / 4;
    const char* const x_lower = x + 16 * stride;
    std::atomic_signal_fence(std::memory_order_seq_cst);  // the intrinsics do not say that they read memory
    if (add) {
      _tile_loadd(0, sums, kSumsStride);
      _tile_loadd(1, sums + 16, kSumsStride);
      _tile_loadd(2, lower, kSumsStride);
      _tile_loadd(3, lower + 16, kSumsStride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t g = 0; g < groups; g += kGroupsPerTile) {
      _tile_loadd(6, panel + 2 * g, kPanelStride);
      _tile_loadd(4, x + 4 * g, stride);
      Scheme::template multiply_tiles<0>();
      _tile_loadd(7, panel + 2 * g + 1, kPanelStride);
      Scheme::template multiply_tiles<1>();
      if (rows > 16) {
        _tile_loadd(5, x_lower + 4 * g, stride);
        Scheme::template multiply_tiles<2>();
        Scheme::template multiply_tiles<3>();
      }
    }
    _tile_stored(0, sums, kSumsStride);
    _tile_stored(1, sums + 16, kSumsStride);
    _tile_stored(2, lower, kSumsStride);
    _tile_stored(3, lower + 16, kSumsStride);
  }
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA

#endif
