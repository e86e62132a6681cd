// A linear layer for many rows.  A strip of the weight, two registers of columns, is packed by parts of k: widened and
// transposed, so that a register holds one lane of each column.  Then every row of x passes it by, a lane at a time in
// all lanes of a register, so that the sums of neighbouring columns lie in neighbouring lanes.
// panels   kGroups lanes of k × a strip, 24 KiB at most, as much as a block of rows in the same lanes: both fit L1.
//          kPanels of them, in L2, serve each block of rows in turn: x is read once for all of them.
// sums     kRowsAtOnce × 2 registers; they wait on the stack for their other parts of k, for a whole pass where the
//          panels of all parts are too many.
// after    A block's epilogue is interleaved with the next block's products.
// stack    at most 1.3 MiB
// threads  share the strips, or where rows are many the rows, so that a thread goes on with rows that it has computed
//          in other kernels.  A row's sums are added up in an order that depends on k alone.
// With AMX, tiles.h takes the place of Vectors.
#pragma once

#include "epilogue.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kStripColumns = 2 * kLanes;
constexpr int64_t kGroups = 192;  // 4-byte lanes of k in a panel; a multiple of kLanes
constexpr int64_t kPanels = 32, kPartsPerPass = 4;
constexpr int kWaitingBytes = 512 << 10;  // for sums
constexpr int64_t kRowsPerChunk = 1024;   // so many are worth a strip's packing by several threads
constexpr int64_t kOperationsPerThread = 1 << 20;

// Blocking of the work: k is cut into parts of about the same number of registers, each a panel of every strip,
// whatever the rows are; and the parts into passes over the rows.  With few rows pack fewer panels per pass: x is
// cached anyway, and small panels stay in L2.
template <class Scheme>
struct Parts {
  int64_t k, registers, count, passes, strips_at_once;

  Parts(int64_t k, int64_t blocks_of_rows)
      : k(k),
        registers((k + Scheme::kStep - 1) / Scheme::kStep),
        count(std::max<int64_t>(1, (registers * kLanes + kGroups - 1) / kGroups)) {
    const int64_t panels = std::clamp<int64_t>(4 * blocks_of_rows, 4, kPanels);
    const int64_t most = std::min(panels / 4, kPartsPerPass);
    passes = (count + most - 1) / most;
    strips_at_once = panels / ((count + passes - 1) / passes);
  }

  int64_t code(int64_t part) const { return std::min(k, registers * part / count * Scheme::kStep); }
  int64_t pass(int64_t i) const { return count * i / passes; }
};

// panel[g][0, 1] = lane g of columns [0, kLanes) and [kLanes, 2 kLanes) of the strip, for k in [begin, end); lanes up
// to a whole transposition are padded.  The next strip's part is fetched meanwhile.
template <class Scheme, class W>
void pack(const Columns<Scheme>& from, int64_t begin, int64_t end, Bytes* panel) {
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

// sums[r] (+)= Σ over the panel's `groups` lanes of x[r] for kRows rows, `stride` bytes apart.  Beyond those up to a
// multiple of kLanesAtOnce there are zeros in both x and the panel.
template <class Scheme, int kRows>
inline void block(const char* x, int64_t stride, const Bytes* panel, int64_t groups, bool add,
                  typename Scheme::Sum* sums) {
  typename Scheme::Sums acc[kRows][2] = {};
  for (int64_t g = 0; g < groups; g += kLanesAtOnce) {
    Bytes w[kLanesAtOnce][2];
#pragma GCC unroll 4
    for (int i = 0; i < kLanesAtOnce; ++i)
      for (int half = 0; half < 2; ++half) w[i][half] = operand<Scheme>(panel[2 * (g + i) + half]);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Bytes lanes = load_lanes(x + r * stride + g * 4);
      const auto multiply = [&]<int kLane>() __attribute__((always_inline)) {
        acc[r][0] = multiply_lane<Scheme, kLane>(w[kLane][0], lanes, acc[r][0]);
        acc[r][1] = multiply_lane<Scheme, kLane>(w[kLane][1], lanes, acc[r][1]);
      };
      for_constants<kLanesAtOnce>(multiply);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      typename Scheme::Sum* at = sums + r * kStripColumns + half * kLanes;
      typename Scheme::Sums value = acc[r][half];  // acc itself, were it copied, would be kept in memory
      if (add) value = Scheme::add(value, bits_as<typename Scheme::Sums>(load_bytes(at)));
      std::memcpy(at, &value, kVectorBytes);
    }
}

// A block of rows in a strip's columns whose sums are there, and what follows them not yet.
template <class Scheme>
struct Unfinished {
  const Columns<Scheme>* columns = nullptr;
  int64_t r = 0;
  int rows = 0;  // left
  const typename Scheme::Sum* sums = nullptr;

  void finish(const LinearParams& p, int most) {
    if (rows == 0) return;
    const int n = std::min(rows, most);
    columns->finish(p, *columns, r, n, sums, kStripColumns);
    r += n, rows -= n, sums += n * kStripColumns;
  }
};

// Registers: 2 sums for each row, 2 of the panel for each of the lanes at once, 1 of x.
struct Vectors {
  static constexpr int kRowsAtOnce = kLanesAtOnce > 1 ? 8 : kRegisters == 32 ? 12 : 6;

  // A thread calls the one before rows() and the other after.
  static void begin() {}
  static void end() {}

  // Sums of at most kRowsAtOnce rows.
  template <class Scheme>
  static void rows(const char* x, int64_t stride, int rows, const Bytes* panel, int64_t groups, bool add,
                   typename Scheme::Sum* sums, const LinearParams&, Unfinished<Scheme>&) {
    if (rows == kRowsAtOnce) return block<Scheme, kRowsAtOnce>(x, stride, panel, groups, add, sums);
    int r = 0;
    for (; r + 4 <= rows; r += 4)
      block<Scheme, 4>(x + r * stride, stride, panel, groups, add, sums + r * kStripColumns);
    for (; r + 2 <= rows; r += 2)
      block<Scheme, 2>(x + r * stride, stride, panel, groups, add, sums + r * kStripColumns);
    if (r < rows) block<Scheme, 1>(x + r * stride, stride, panel, groups, add, sums + r * kStripColumns);
  }
};

// At most strips_at_once strips of columns, rows [begin, end).
template <class Scheme, class W, class Kernel>
void block_strips(const LinearParams& p, const Parts<Scheme>& parts, const Columns<Scheme>* to, int strips,
                  int64_t rows_begin, int64_t rows_end) {
  using Sum = typename Scheme::Sum;
  constexpr int kRows = Kernel::kRowsAtOnce, kSums = kRows * kStripColumns;
  constexpr int kWaiting = kWaitingBytes / (kSums * sizeof(Sum));
  alignas(64) Bytes panels[kPanels][2 * kGroups];
  alignas(64) Sum sums[kWaiting][kSums];
  Unfinished<Scheme> before;
  int turn = 0;
  const int64_t most_rows = parts.passes == 1 ? p.rows.count : kWaiting / strips * kRows;
  for (int64_t first = rows_begin; first < rows_end; first += most_rows) {
    const int64_t last = std::min(first + most_rows, rows_end);
    for (int64_t pass = 0; pass < parts.passes; ++pass) {
      const int64_t part0 = parts.pass(pass), part_end = parts.pass(pass + 1);
      Bytes(*panel)[2 * kGroups] = panels;
      for (int64_t part = part0; part < part_end; ++part)
        for (int i = 0; i < strips; ++i) pack<Scheme, W>(to[i], parts.code(part), parts.code(part + 1), *panel++);
      for (int64_t r = first; r < last; r += kRows) {
        const int rows = std::min<int64_t>(last - r, kRows);
        const Source x = source<Scheme>(p, r, rows);
        const int64_t block = (r - first) / kRows;
        Sum(*const here)[kSums] = sums + (parts.passes == 1 ? block % 2 : block) * strips;
        panel = panels;
        for (int64_t part = part0; part < part_end; ++part) {
          const int64_t begin = parts.code(part), end = parts.code(part + 1);
          const int64_t groups = (end - begin + Scheme::kPerLane - 1) / Scheme::kPerLane;
          const char* const lanes = x.rows + begin * sizeof(typename Scheme::Code);
          for (int i = 0; i < strips; ++i) {
            Sum* const sum = parts.count == 1 ? sums[turn++ % 2] : here[i];
            Kernel::template rows<Scheme>(lanes, x.stride, rows, *panel++, groups, part > 0, sum, p, before);
            before.finish(p, kRows);
            if (part + 1 == parts.count) before = {&to[i], r, rows, sum};
          }
        }
      }
      before.finish(p, kRows);
    }
  }
}

template <class Scheme, class W, class Kernel = Vectors>
void blocks(const LinearParams& p, const Threads& threads) {
  constexpr int64_t kRows = Kernel::kRowsAtOnce;
  const int64_t row_blocks = (p.rows.count + kRows - 1) / kRows, all = strips(p, kStripColumns);
  const int64_t chunks = std::max<int64_t>(1, p.rows.count / kRowsPerChunk);
  const Parts<Scheme> parts(p.k, row_blocks);
  // Strips [first, last) of the rows of chunks [from, to).
  const auto rectangle = [&](int64_t from, int64_t to, int64_t first, int64_t last) {
    const int64_t rows_begin = row_blocks * from / chunks * kRows;
    const int64_t rows_end = std::min(row_blocks * to / chunks * kRows, p.rows.count);
    const int64_t turns = (last - first + parts.strips_at_once - 1) / parts.strips_at_once;
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t i = first + (last - first) * turn / turns, after = first + (last - first) * (turn + 1) / turns;
      Columns<Scheme> columns[kPanels];
      for (int64_t s = i; s < after; ++s) set_columns(p, kStripColumns, s, columns[s - i]);
      block_strips<Scheme, W, Kernel>(p, parts, columns, after - i, rows_begin, rows_end);
    }
  };
  // The strips of the first chunk, of the second, …: a thread's share begins and ends within a chunk, perhaps, and has
  // whole ones between, for which a strip is packed once.
  const auto body = [&](int64_t begin, int64_t end) {
    Kernel::begin();
    const int64_t from = (begin + all - 1) / all, to = end / all;
    if (from > to) {
      rectangle(to, from, begin - to * all, end - to * all);
    } else {
      if (begin < from * all) rectangle(from - 1, from, begin - (from - 1) * all, all);
      if (from < to) rectangle(from, to, 0, all);
      if (to * all < end) rectangle(to, to + 1, 0, end - to * all);
    }
    Kernel::end();
  };
  const int64_t operations = (p.k + 1) * kStripColumns * (p.rows.count / chunks + 1);
  threads.parallel_for(all * chunks, kOperationsPerThread / operations + 1, body);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
