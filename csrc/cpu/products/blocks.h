// A linear layer for many rows.  A strip of the weight, two registers of columns, is packed for a part of k: widened
// and transposed, so that a register holds one lane of each column.  Then every row of x passes it by, a lane at a time
// in all lanes of a register, so that the sums of neighbouring columns lie in neighbouring lanes.
// panels   kGroups lanes of k × a strip, 24 KiB at most.  kStripsAtOnce of them come by turns from the L2 cache to one
//          block of rows, of the same size at most, in L1: x is read from beyond L2 once for all of them.
// sums     kRowsAtOnce × 2 registers; where k has several parts they wait on the stack, for kRowsPerPass rows
// stack    at most 352 KiB
// threads  share the strips.  A row's sums are added up in an order that depends on k alone.
// With AMX, tiles.h takes the place of block_rows.
#pragma once

#include "epilogue.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kStripColumns = 2 * kLanes;
constexpr int kStripsAtOnce = 4;
constexpr int64_t kGroups = 192;  // 4-byte lanes of k in a panel; a multiple of kLanes
constexpr int64_t kRowsPerPass = 512;
constexpr int64_t kOperationsPerThread = 1 << 20;

// panel[g][0, 1] = lane g of columns [0, kLanes) and [kLanes, 2 kLanes) of the strip, for k in [begin, end); lanes up
// to a whole transposition are padded.  The next strip's part is fetched meanwhile.
template <class Scheme, class W>
void pack(const Strip& from, int64_t begin, int64_t end, Bytes* panel) {
  const int64_t stride = from.segment->w_stride;
  for (int half = 0; half < 2; ++half) {
    const W* w[kLanes];  // beyond the last column the last one again: computed and not used
    for (int c = 0; c < kLanes; ++c) {
      const int column = half * kLanes + c < from.count ? half * kLanes + c : from.count - 1;
      w[c] = static_cast<const W*>(from.segment->w) + (from.n + column) * stride;
    }
    Bytes* to = panel + half;
    for (int64_t k = begin; k < end; k += Scheme::kStep, to += 2 * kLanes) {
      U32 lanes[kLanes];
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) {
        __builtin_prefetch(w[c] + k + kStripColumns * stride, 0, 2);
        lanes[c] = bits_as<U32>(end - k >= Scheme::kStep ? Scheme::load(w[c] + k)
                                                         : load_first_weights<Scheme>(w[c] + k, end - k));
      }
      transpose(lanes);
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) to[2 * c] = bits_as<Bytes>(lanes[c]);
    }
  }
}

// sums[r] (+)= Σ over the panel's `groups` lanes of x[r] for kRows rows, `stride` bytes apart.
template <class Scheme, int kRows>
inline void block(const char* x, int64_t stride, const Bytes* panel, int64_t groups, bool add,
                  typename Scheme::Sum* sums) {
  typename Scheme::Sums acc[kRows][2] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const Bytes w0 = panel[2 * g], w1 = panel[2 * g + 1];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Bytes lane = broadcast_lane(x + r * stride + g * 4);
      acc[r][0] = Scheme::multiply(w0, lane, acc[r][0]);
      acc[r][1] = Scheme::multiply(w1, lane, acc[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      typename Scheme::Sum* at = sums + r * kStripColumns + half * kLanes;
      if (add) acc[r][half] = Scheme::add(acc[r][half], bits_as<typename Scheme::Sums>(load_bytes(at)));
      std::memcpy(at, &acc[r][half], kVectorBytes);
    }
}

// Registers: 2 sums for each row, 2 of the panel, 1 of x.
struct Vectors {
  static constexpr int kRowsAtOnce = LLMKERN_ISA_LEVEL == 2 ? 12 : 6;

  struct Session {  // what a thread sets up before it calls rows()
    Session() {}
  };

  // Sums of at most kRowsAtOnce rows.
  template <class Scheme>
  static void rows(const char* x, int64_t stride, int rows, const Bytes* panel, int64_t groups, bool add,
                   typename Scheme::Sum* sums) {
    if (rows == kRowsAtOnce) return block<Scheme, kRowsAtOnce>(x, stride, panel, groups, add, sums);
    int r = 0;
    for (; r + 4 <= rows; r += 4)
      block<Scheme, 4>(x + r * stride, stride, panel, groups, add, sums + r * kStripColumns);
    for (; r + 2 <= rows; r += 2)
      block<Scheme, 2>(x + r * stride, stride, panel, groups, add, sums + r * kStripColumns);
    if (r < rows) block<Scheme, 1>(x + r * stride, stride, panel, groups, add, sums + r * kStripColumns);
  }
};

// Up to kStripsAtOnce strips of columns, all rows.
template <class Scheme, class W, class Kernel>
void block_strips(const LinearParams& p, const Strip* to, int strips) {
  using Sum = typename Scheme::Sum;
  constexpr int kRows = Kernel::kRowsAtOnce;
  constexpr int64_t kRowsWaiting = (kRowsPerPass + kRows - 1) / kRows * kRows;
  alignas(64) Bytes panels[kStripsAtOnce][2 * kGroups];
  alignas(64) Sum sums[kStripsAtOnce][kRowsWaiting * kStripColumns];
  const int64_t row_bytes = linear_row_bytes(p.k, p.w8a8);
  const int64_t vectors = (p.k + Scheme::kStep - 1) / Scheme::kStep;  // along k
  const int64_t parts = (vectors * kLanes + kGroups - 1) / kGroups;
  const int64_t part = parts > 0 ? (vectors + parts - 1) / parts * Scheme::kStep : 0;  // of k, in one panel
  const int64_t pass = parts > 1 ? kRowsWaiting : p.rows.count;
  for (int64_t first = 0; first < p.rows.count; first += pass) {
    const int64_t last = first + pass < p.rows.count ? first + pass : p.rows.count;
    int64_t k = 0;
    do {
      const int64_t end = k + part < p.k ? k + part : p.k;
      for (int i = 0; i < strips; ++i) pack<Scheme, W>(to[i], k, end, panels[i]);
      const int64_t groups = (end - k + Scheme::kPerLane - 1) / Scheme::kPerLane;
      for (int64_t r = first; r < last; r += kRows) {
        const int rows = last - r < kRows ? last - r : kRows;
        const char* x = reinterpret_cast<const char*>(prepared_row<Scheme>(p, r) + k);
        for (int i = 0; i < strips; ++i) {
          Sum* here = sums[i] + (parts > 1 ? (r - first) * kStripColumns : 0);
          Kernel::template rows<Scheme>(x, row_bytes, rows, panels[i], groups, k > 0, here);
          if (end == p.k) finish<Scheme>(p, to[i], r, rows, here, kStripColumns);
        }
      }
      k = end;
    } while (k < p.k);
  }
}

template <class Scheme, class W, class Kernel = Vectors>
void blocks(const LinearParams& p, const Threads& threads) {
  const int64_t operations = (p.k + 1) * kStripColumns * p.rows.count;
  const auto body = [&](int64_t begin, int64_t end) {
    const typename Kernel::Session session;
    for (int64_t i = begin; i < end; i += kStripsAtOnce) {
      Strip to[kStripsAtOnce];
      int count = 0;
      for (; count < kStripsAtOnce && i + count < end; ++count) to[count] = strip(p, kStripColumns, i + count);
      block_strips<Scheme, W, Kernel>(p, to, count);
    }
  };
  threads.parallel_for(strips(p, kStripColumns), kOperationsPerThread / operations + 1, body);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
