// A linear layer for few rows: the weight is read once, as it is stored, and everything else follows its pace.
// columns  16 outputs of a row are finished together: scale, bias, activation, residual, rounding.
// block    kRows × kColumns sums in registers, each one register wide and added up over k from left to right: a
//          result depends neither on its neighbours nor on the number of threads.  A weight's vector is widened once
//          for up to four rows; further rows find it in the L1 cache.  A row in digits is as many rows.
// order    Integers are read from memory as they lie: so Zen 4 reads 20 GB/s on one core, and 7 by turns from eight
//          columns, which its prefetchers do not follow.  One sum to a column multiplies a column at a time and leaves
//          fetching to them: asked besides, they read 5 to 20% less.  Several, as of digits, multiply four columns by
//          each register of x, which are read by turns from the cache, as the block before fetched them in order.  On a
//          Xeon with AMX turns are as fast.
// threads  share the columns.
#pragma once

#include "epilogue.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kColumnsAtOnce = 16;
constexpr int kRowsAtOnce = 4;
constexpr int kAccumulators = kRegisters / 2;
constexpr int kColumnsInTurn = 4;
constexpr int64_t kBytesAhead = 8192;
#ifdef __AMX_INT8__
constexpr bool kIntegersInOrder = false;
#else
constexpr bool kIntegersInOrder = true;
#endif
constexpr int64_t kWeightsPerThread = 65536;  // below this, waking a thread costs more than it saves

// Software prefetch, since the hardware's prefetchers stop at a page's end: nothing, the elements `ahead` of each
// column, or from `ahead` of the first column on as many, in order.
enum class Fetch { none, columns, in_order };

// y[r, c] += Σ_k x[r] · w[c] over k in [begin, end) for kRows rows and kColumns columns.
template <class Scheme, int kRows, int kColumns, Fetch kFetch, class W>
inline void stream_block(const typename Scheme::Code* const (&x)[kRows], const W* const (&w)[kColumns], int64_t ahead,
                         int64_t begin, int64_t end, typename Scheme::Sum* y) {
  constexpr int kBytes = Scheme::kStep * sizeof(W);
  constexpr int kLines = kFetch == Fetch::none ? 0 : kBytes > 64 ? kBytes / 64 : 1;
  typename Scheme::Sums acc[kRows][kColumns] = {};
  const auto step = [&](int64_t i, const auto& load_w) {
    Bytes values[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) values[r] = load_bytes(x[r] + i);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const W* const next = kFetch == Fetch::in_order ? w[0] + i * kColumns + c * Scheme::kStep : w[c] + i;
      for (int line = 0; line < kLines; ++line)
        __builtin_prefetch(reinterpret_cast<const char*>(next + ahead) + line * 64, 0,
                           kFetch == Fetch::in_order ? 2 : 3);
      const Bytes weights = load_w(w[c] + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r][c] = Scheme::multiply(weights, values[r], acc[r][c]);
    }
  };
  int64_t i = begin;
  for (; i + Scheme::kStep <= end; i += Scheme::kStep) step(i, [](const W* p) { return Scheme::load(p); });
  if (const int n = end - i; n > 0) step(i, [n](const W* p) { return load_first_weights<Scheme>(p, n); });
  if constexpr (kRows == 4 && std::is_same_v<typename Scheme::Sum, int32_t>) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const auto totals = Scheme::totals(acc[0][c], acc[1][c], acc[2][c], acc[3][c]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) y[r * kColumnsAtOnce + c] += totals[r];
    }
    return;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) y[r * kColumnsAtOnce + c] += Scheme::total(acc[r][c]);
}

// out[r0, r0 + kRows) in the strip's columns.
template <class Scheme, int kRows, class W>
void stream_columns(const LinearParams& p, int64_t r0, const Columns<Scheme>& to) {
  constexpr int kSums = kRows * Scheme::kSums;
  constexpr int kMost = kAccumulators / kSums;
  constexpr bool kWide = kSums == 1 && sizeof(W) > 1;  // memory alone sets the pace: the fewer streams the faster
  constexpr bool kInOrder = kIntegersInOrder && std::is_same_v<typename Scheme::Sum, int32_t>;
  constexpr int kTurns = kMost >= 8 ? 8 : kMost >= 4 ? 4 : 2;
  constexpr int kColumns = kWide ? 2 : !kInOrder ? kTurns : kSums == 1 ? 1 : std::min(kTurns, kColumnsInTurn);
  constexpr Fetch kFetch = !kInOrder ? Fetch::columns : kSums == 1 ? Fetch::none : Fetch::in_order;
  alignas(64) typename Scheme::Sum y[kSums * kColumnsAtOnce] = {};
  const typename Scheme::Code* x[kSums];
  for (int i = 0; i < kSums; ++i)
    x[i] = prepared_row<Scheme>(p, r0 + i / Scheme::kSums) + i % Scheme::kSums * padded(p.k);
  const int64_t stride = to.segment->w_stride;
  constexpr int64_t kAhead = kBytesAhead / sizeof(W);
  // Else the next block's same place; in order at least a block, of which all is read by turns.
  const int64_t ahead = kWide ? kAhead : kInOrder ? std::max(kAhead, kColumns * stride) : kColumns * stride;
  for (int c0 = 0; c0 < to.count; c0 += kColumns) {
    const W* w[kColumns];  // beyond the last column the last one again: computed and not used
    for (int c = 0; c < kColumns; ++c)
      w[c] = static_cast<const W*>(to.segment->w) + (to.n + (c0 + c < to.count ? c0 + c : to.count - 1)) * stride;
    for (int64_t k = 0; k < p.k; k += Scheme::kSegment) {
      const int64_t end = p.k - k > Scheme::kSegment ? k + Scheme::kSegment : p.k;
      stream_block<Scheme, kSums, kColumns, kFetch>(x, w, ahead, k, end, y + c0);
    }
  }
  to.finish(p, to, r0, kRows, y, kColumnsAtOnce);
}

template <class Scheme, class W>
void stream(const LinearParams& p, const Threads& threads) {
  const int64_t grain = kWeightsPerThread / (kColumnsAtOnce * (p.k + 1)) + 1;
  threads.parallel_for(strips(p, kColumnsAtOnce), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Columns<Scheme> to;
      set_columns(p, kColumnsAtOnce, i, to);
      constexpr int kMost = kRowsAtOnce / Scheme::kSums;
      int64_t r = 0;
      for (; r + kMost <= p.rows.count; r += kMost) stream_columns<Scheme, kMost, W>(p, r, to);
      if constexpr (kMost > 1) {
        if (p.rows.count - r == 3) stream_columns<Scheme, 3, W>(p, r, to);
        if (p.rows.count - r == 2) stream_columns<Scheme, 2, W>(p, r, to);
        if (p.rows.count - r == 1) stream_columns<Scheme, 1, W>(p, r, to);
      }
    }
  });
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
