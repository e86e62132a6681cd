// A linear layer with packed weights (packed.h); x is rounded to int8 in blocks of 32.
// few rows   A panel, 16 outputs, is read once from memory and decoded in registers, a line at a time; the sums of up
//            to four rows stay in registers.
// many rows  A tile, kTilePanels panels × kTileBlocks blocks, is decoded once into the L1 cache, and all rows pass it
//            by, a few at a time.  Their sums wait on the stack for the next tile.
// order      A row's blocks are added up from left to right in fp32 either way, each by the same operations: its bits
//            depend neither on its neighbours nor on the number of threads.
// threads    share panels, and where rows are many the rows.
// stack      at most 100 KiB
#include "llmkern/linear.h"

#include "../isa.h"
#include "packed.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// Traits for epilogue.h.
struct Blocks : Prepared {
  using Code = int8_t;
  using Sum = float;
  using Sums = F32;
  static constexpr int kSums = 1;
  static F32 finish(const float* sums, int64_t, const Header&) { return load(sums); }
};

constexpr int64_t kFewRows = 8;
constexpr int kStreamedAtOnce = kRegisters == 32 ? 4 : 2;
constexpr int64_t kWeightsPerThread = 65536;  // below this, waking a thread costs more than it saves

constexpr int kTilePanels = LLMKERN_ISA_LEVEL == 2 ? 2 : 1, kTileColumns = kTilePanels * kPanelRows;
constexpr int kTileBlocks = 16;
constexpr int kRowsAtOnce = LLMKERN_ISA_LEVEL == 2 ? 6 : LLMKERN_ISA_LEVEL == 1 || kRegisters == 32 ? 4 : 2;
constexpr int64_t kRowsPerChunk = 384;
static_assert(kTileColumns == Columns<Blocks>::kMost);

int64_t row_stride(int64_t k) {
  const int64_t lines = padded(k) / 64 + (k / kPackedBlock * static_cast<int64_t>(sizeof(XBlock)) + 63) / 64;
  return (lines | 1) * 64;
}

PackedRow packed_row(const LinearParams& p, int64_t r) {
  const char* const row = p.workspace + r * row_stride(p.k);
  return {reinterpret_cast<const int8_t*>(row), reinterpret_cast<const XBlock*>(row + padded(p.k))};
}

// Combine the lanes of each register to one number, that of register i in lane i.
template <class V, class F>
V combined(V (&v)[kLanes], const F& f) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) v[i] = f(interleave_lower(v[i], v[i + half]), interleave_upper(v[i], v[i + half]));
  return v[0];
}

// Rounds kLanes blocks of x at most as the op quantize_int8 would each of them, to the bit.
template <class T>
void prepare_lanes(const T* x, int count, int8_t* codes, XBlock* blocks) {
  constexpr int kBlockRegs = kPackedBlock / kLanes;
  S32 most[kLanes] = {};  // as in amax_of
  for (int b = 0; b < count; ++b) {
    S32 largest = {};
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRegs; ++i) {
      const S32 magnitude = bits_as<S32>(load(x + b * kPackedBlock + i * kLanes)) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    most[b] = largest;
  }
  const F32 amax = bits_as<F32>(combined(most, [](S32 a, S32 b) { return a > b ? a : b; }));
  alignas(64) float scale[kLanes], inverse[kLanes];
  store(scale, amax < broadcast(0x1p-118f) ? F32{} : amax / broadcast(127.0f));
  store(inverse, broadcast(127.0f) / amax);
  S32 sums[2][kLanes] = {};
  for (int b = 0; b < count; ++b, x += kPackedBlock, codes += kPackedBlock) {
    if (!(scale[b] > 0.0f && scale[b] < __builtin_inff())) {
      std::memset(codes, 0, kPackedBlock);
      continue;
    }
    const F32 by = broadcast(inverse[b]);
    S32 halves[2] = {};
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRegs; ++i) {
      typedef int8_t Narrow __attribute__((vector_size(kLanes)));
      const S32 rounded = round_to_int(load(x + i * kLanes) * by);
      const Narrow narrow = __builtin_convertvector(rounded, Narrow);
      std::memcpy(codes + i * kLanes, &narrow, sizeof(narrow));
      halves[2 * i / kBlockRegs] += rounded;
    }
    sums[0][b] = halves[0], sums[1][b] = halves[1];
  }
  const auto add = [](S32 a, S32 b) { return a + b; };
  const S32 first = combined(sums[0], add), last = combined(sums[1], add);
  for (int b = 0; b < count; ++b)
    blocks[b] = {.scale = scale[b],
                 .half = {static_cast<float>(first[b]), static_cast<float>(last[b])},
                 .all = static_cast<float>(first[b] + last[b]),
                 .wide = -kWideShift * (first[b] + last[b])};
}

void prepare_blocks(const LinearParams& p, const Threads& threads) {
  with_type(p.dtype, [&]<class T>() {
    threads.parallel_for(p.rows.count, kElementsPerThread / (p.k + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* const x = static_cast<const T*>(p.x) + p.rows.offset(r);
        const PackedRow row = packed_row(p, r);
        for (int64_t b = 0, count = p.k / kPackedBlock; b < count; b += kLanes)
          prepare_lanes(x + b * kPackedBlock, static_cast<int>(std::min<int64_t>(kLanes, count - b)),
                        const_cast<int8_t*>(row.codes) + b * kPackedBlock, const_cast<XBlock*>(row.blocks) + b);
      }
    });
  });
}

// f.template operator()<Codes, kPlain>(), where wide codes alone are told apart: int8 in blocks has them.
template <class F>
void with_kind(const PackedWeight& w, const F& f) {
  with_codes(w.code, [&]<class Codes>() {
    if constexpr (Codes::kWide)
      if (is_plain(w)) return f.template operator()<Codes, true>();
    f.template operator()<Codes, false>();
  });
}

// totals[r][reg] = Σ over k of rows [r0, r0 + kRows) times a panel.
template <class Codes, bool kPlain, int kRows>
void stream_panel(const LinearParams& p, const PackedWeight& w, int64_t panel, int64_t r0,
                  F32 (&totals)[kRows][kRegs]) {
  constexpr int kHalves = Codes::kHalves;
  const int64_t blocks = p.k / kPackedBlock;
  const bool zero = !kPlain && has_zero(w), offset = !kPlain && w.offset.data;
  Reader<kPlain, kHalves> reader(w, p.k, panel, 0);
  PackedRow rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = packed_row(p, r0 + r);
  const uint8_t* block = w.codes + panel * blocks * Codes::kBytes;
  for (int64_t b = 0; b < blocks; ++b, block += Codes::kBytes) {
    for (int64_t line = 0; line < Codes::kBytes; line += 64) __builtin_prefetch(block + kFetchAhead + line);
    S32 sums[kHalves][kRows][kRegs];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int reg = 0; reg < kRegs; ++reg)
        for (int half = 0; half < kHalves; ++half)
          sums[half][r][reg] = rows[r].blocks[b].template first_sum<Codes::kWide>();
    for_constants<kLinesPerBlock / 2>([&]<int i>() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int reg = 0; reg < kRegs; ++reg) {
        Bytes low, high;
        Codes::template lines<i>(block, reg, low, high);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const int8_t* const x = rows[r].codes + b * kPackedBlock + 4 * i;
          S32 &first = sums[0][r][reg], &last = sums[kHalves - 1][r][reg];
          first = multiply_codes<Codes::kWide>(low, broadcast_lane(x), first);
          last = multiply_codes<Codes::kWide>(high, broadcast_lane(x + kPackedBlock / 2), last);
        }
      }
    });
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      Factors factors;
      reader.next(factors);
#pragma GCC unroll 4
      for (int reg = 0; reg < kRegs; ++reg)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const XBlock& x = rows[r].blocks[b];
          totals[r][reg] =
              add_part(totals[r][reg], sums[half][r][reg], factors, reg, zero, offset, x.scale, x.sum<kHalves>(half));
        }
    }
  }
}

template <int kRows>
void stream_rows(const LinearParams& p, const Columns<Blocks>& to, int64_t r0) {
  F32 totals[kRows][kRegs] = {};
  const PackedWeight& w = to.segment->packed;
  with_kind(
      w, [&]<class Codes, bool kPlain>() { stream_panel<Codes, kPlain, kRows>(p, w, to.n / kPanelRows, r0, totals); });
  alignas(64) float y[kRows * Columns<Blocks>::kMost] = {};
  for (int r = 0; r < kRows; ++r)
    for (int reg = 0; reg < kRegs; ++reg) store(y + r * Columns<Blocks>::kMost + reg * kLanes, totals[r][reg]);
  to.finish(p, to, r0, kRows, y, Columns<Blocks>::kMost);
}

void few_rows(const LinearParams& p, const Threads& threads) {
  const int64_t grain = kWeightsPerThread / (kPanelRows * (p.k + 1)) + 1;
  threads.parallel_for(strips(p, kPanelRows), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Columns<Blocks> to;
      set_columns(p, kPanelRows, i, to);
      int64_t r = 0;
      for (; r + kStreamedAtOnce <= p.rows.count; r += kStreamedAtOnce) stream_rows<kStreamedAtOnce>(p, to, r);
      if constexpr (kStreamedAtOnce == 4) {
        if (p.rows.count - r == 3) stream_rows<3>(p, to, r);
        if (p.rows.count - r == 2) stream_rows<2>(p, to, r);
      }
      if (p.rows.count - r == 1) stream_rows<1>(p, to, r);
    }
  });
}

struct Tile {
  alignas(64) Bytes codes[kTileBlocks][kLinesPerBlock][kTilePanels][kRegs];
  Factors factors[2 * kTileBlocks][kTilePanels];
};

// Blocks [begin, end) of k of one panel, the i-th of the tile.
template <class Codes, bool kPlain>
void decode(const PackedWeight& w, int64_t k, int64_t panel, int64_t begin, int64_t end, int i, Tile& tile) {
  constexpr int kHalves = Codes::kHalves;
  Reader<kPlain, kHalves> reader(w, k, panel, begin * kPackedBlock);
  const uint8_t* block = w.codes + (panel * (k / kPackedBlock) + begin) * Codes::kBytes;
  for (int64_t b = 0; b < end - begin; ++b, block += Codes::kBytes) {
    for (int64_t line = 0; line < Codes::kBytes; line += 64) __builtin_prefetch(block + kFetchAhead + line);
    for_constants<kLinesPerBlock / 2>([&]<int line>() __attribute__((always_inline)) {
      for (int reg = 0; reg < kRegs; ++reg)
        Codes::template lines<line>(block, reg, tile.codes[b][line][i][reg], tile.codes[b][line + 4][i][reg]);
    });
    for (int half = 0; half < kHalves; ++half) reader.next(tile.factors[b * kHalves + half][i]);
  }
}

// totals[r] += kRows rows times the tile, which has blocks [begin, end) of k.
template <bool kWide, int kHalves, bool kPlain, int kRows>
void multiply_tile(const LinearParams& p, const Tile& tile, bool has_zero, bool has_offset, int64_t r0, int64_t begin,
                   int64_t end, float* totals) {
  constexpr int kLines = kLinesPerBlock / kHalves, kTileRegs = kTilePanels * kRegs;
  const bool zero = !kPlain && has_zero, offset = !kPlain && has_offset;
  const int64_t stride = row_stride(p.k), x_blocks = padded(p.k);
  const char* const x0 = p.workspace + r0 * stride;
  F32 total[kRows][kTileRegs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kTileRegs; ++i) total[r][i] = load(totals + r * kTileColumns + i * kLanes);
  for (int64_t b = begin; b < end; ++b) {
    const char* x = x0 + b * kPackedBlock;
    const char* const x_block = x0 + x_blocks + b * sizeof(XBlock);
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      S32 sums[kRows][kTileRegs];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const XBlock& of_x = *reinterpret_cast<const XBlock*>(x_block + r * stride);
#pragma GCC unroll 4
        for (int i = 0; i < kTileRegs; ++i) sums[r][i] = of_x.first_sum<kWide>();
      }
      const Bytes* w = &tile.codes[b - begin][half * kLines][0][0];
#pragma GCC unroll 1  // else gcc loads all of x first and has no registers left
      for (int line = 0; line < kLines; ++line, x += 4, w += kTileRegs)
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          const Bytes lane = broadcast_lane(x + r * stride);
#pragma GCC unroll 4
          for (int i = 0; i < kTileRegs; ++i) sums[r][i] = multiply_codes<kWide>(w[i], lane, sums[r][i]);
        }
      const Factors* const factors = tile.factors[(b - begin) * kHalves + half];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const XBlock& of_x = *reinterpret_cast<const XBlock*>(x_block + r * stride);
#pragma GCC unroll 4
        for (int i = 0; i < kTileRegs; ++i)
          total[r][i] = add_part(total[r][i], sums[r][i], factors[i / kRegs], i % kRegs, zero, offset, of_x.scale,
                                 of_x.sum<kHalves>(half));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kTileRegs; ++i) store(totals + r * kTileColumns + i * kLanes, total[r][i]);
}

template <class Codes, bool kPlain>
void many_rows_of(const LinearParams& p, const Columns<Blocks>& to, int64_t first, int64_t last) {
  const PackedWeight& w = to.segment->packed;
  const int64_t blocks = p.k / kPackedBlock, panel = to.n / kPanelRows;
  const int panels = (to.count + kPanelRows - 1) / kPanelRows;
  alignas(64) float totals[kRowsPerChunk * kTileColumns];
  std::memset(totals, 0, (last - first) * kTileColumns * sizeof(float));
  Tile tile;
  const int64_t tiles = (blocks + kTileBlocks - 1) / kTileBlocks;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = blocks * t / tiles, end = blocks * (t + 1) / tiles;
    // Beyond the last panel the last one again: computed and not used.
    for (int i = 0; i < kTilePanels; ++i)
      decode<Codes, kPlain>(w, p.k, panel + std::min(i, panels - 1), begin, end, i, tile);
    int64_t r = first;
    const auto rows = [&]<int kRows>() {
      for (; r + kRows <= last; r += kRows)
        multiply_tile<Codes::kWide, Codes::kHalves, kPlain, kRows>(p, tile, has_zero(w), w.offset.data, r, begin, end,
                                                                   totals + (r - first) * kTileColumns);
    };
    rows.template operator()<kRowsAtOnce>();
    if constexpr (kRowsAtOnce > 4) rows.template operator()<4>();
    if constexpr (kRowsAtOnce > 2) rows.template operator()<2>();
    rows.template operator()<1>();
  }
  to.finish(p, to, first, static_cast<int>(last - first), totals, kTileColumns);
}

void many_rows(const LinearParams& p, const Threads& threads) {
  const int64_t all = strips(p, kTileColumns), chunks = (p.rows.count + kRowsPerChunk - 1) / kRowsPerChunk;
  threads.parallel_for(all * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Columns<Blocks> to;
      set_columns(p, kTileColumns, i % all, to);
      const int64_t first = p.rows.count * (i / all) / chunks, last = p.rows.count * (i / all + 1) / chunks;
      with_kind(to.segment->packed,
                [&]<class Codes, bool kPlain>() { many_rows_of<Codes, kPlain>(p, to, first, last); });
    }
  });
}

}  // namespace

void packed_linear(const LinearParams& p, const Threads& threads) {
  prepare_blocks(p, threads);
  p.rows.count <= kFewRows ? few_rows(p, threads) : many_rows(p, threads);
}

}  // namespace llmkern::LLMKERN_ISA
