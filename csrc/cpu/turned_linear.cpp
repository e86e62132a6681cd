// turned_linear on the CPU (transposed weight): SIMD lanes are output columns; each weight row times a broadcast x.
// strip    kWidth columns, whose sums lie in the L1 or L2 cache; kGroup rows of the weight at a time pass them by, each
//          a stream of memory, and kBlock of them serve all rows of x before the next come.
// sums     in fp32: kGroup products from left to right, then the groups, in an order that depends neither on the number
//          of threads nor on the row's neighbours.
// threads  share the columns.
// stack    36 KiB
#include "llmkern/turned_linear.h"

#include "isa.h"
#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kWidth = 512, kGroup = 8, kBlock = 64, kMostRows = 16;
constexpr int kColumnsPerTask = 64;           // whole cache lines of any dtype
constexpr int64_t kWeightsPerThread = 65536;  // below this, waking a thread costs more than it saves

struct Strip {
  alignas(64) float sums[kMostRows][kWidth];
  alignas(64) float x[kMostRows][kBlock];
};

// Accumulate kG rows of w into kR rows: sums[r] += x[r][i … i + kG) · w.
template <int kR, int kG, class T>
inline void group(Strip& s, int r, int i, const T* w, int64_t stride, int64_t n) {
  for_registers(n, [&](int64_t c, int m) {
    F32 sum[kR];
#pragma GCC unroll 8
    for (int g = 0; g < kG; ++g) {
      __builtin_prefetch(w + (g + kG) * stride + c);
      const F32 weights = load_at_most(w + g * stride + c, m);
#pragma GCC unroll 4
      for (int j = 0; j < kR; ++j) {
        const F32 product = weights * broadcast(s.x[r + j][i + g]);
        sum[j] = g ? sum[j] + product : product;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kR; ++j) {
      float* const to = s.sums[r + j] + c;
      store_at_most(to, load_at_most(to, m) + sum[j], m);
    }
  });
}

template <int kR, class T>
void rows_of(Strip& s, int r, const T* w, int64_t stride, int count, int64_t n) {
  int i = 0;
  for (; i + kGroup <= count; i += kGroup) group<kR, kGroup>(s, r, i, w + i * stride, stride, n);
  for (; i < count; ++i) group<kR, 1>(s, r, i, w + i * stride, stride, n);
}

// Compute columns [n0, n0 + n) of `rows` rows, starting at row r0.
template <class T>
void strip(const TurnedLinearParams& p, int64_t r0, int rows, int64_t n0, int64_t n) {
  Strip s;
  for (int r = 0; r < rows; ++r) std::memset(s.sums[r], 0, n * sizeof(float));
  for (int64_t i0 = 0; i0 < p.k; i0 += kBlock) {
    const int count = static_cast<int>(p.k - i0 < kBlock ? p.k - i0 : kBlock);
    for (int r = 0; r < rows; ++r) {
      const T* const from = static_cast<const T*>(p.x) + (r0 + r) * p.x_stride + i0;
      for_registers(count, [&](int64_t i, int m) { store_at_most(s.x[r] + i, load_at_most(from + i, m), m); });
    }
    const T* const w = static_cast<const T*>(p.w) + i0 * p.w_stride + n0;
    int r = 0;
    for (; r + 4 <= rows; r += 4) rows_of<4>(s, r, w, p.w_stride, count, n);
    for (; r + 2 <= rows; r += 2) rows_of<2>(s, r, w, p.w_stride, count, n);
    for (; r < rows; ++r) rows_of<1>(s, r, w, p.w_stride, count, n);
  }
  for (int r = 0; r < rows; ++r) {
    T* const out = static_cast<T*>(p.out) + (r0 + r) * p.out_stride + n0;
    const T* const bias = p.bias ? static_cast<const T*>(p.bias) + n0 : nullptr;
    for_registers(n, [&](int64_t j, int m) {
      const F32 sum = load_at_most(s.sums[r] + j, m);
      store_at_most(out + j, bias ? sum + load_at_most(bias + j, m) : sum, m);
    });
  }
}

}  // namespace

void turned_linear(const TurnedLinearParams& p, const Threads& threads) {
  const int64_t tasks = (p.n + kColumnsPerTask - 1) / kColumnsPerTask;
  with_type(p.dtype, [&]<class T>() {
    threads.parallel_for(tasks, kWeightsPerThread / (kColumnsPerTask * (p.k + 1)) + 1, [&](int64_t begin, int64_t end) {
      const int64_t last = end * kColumnsPerTask < p.n ? end * kColumnsPerTask : p.n;
      for (int64_t n = begin * kColumnsPerTask; n < last; n += kWidth)
        for (int64_t r = 0; r < p.rows; r += kMostRows)
          strip<T>(p, r, static_cast<int>(p.rows - r < kMostRows ? p.rows - r : kMostRows), n,
                   last - n < kWidth ? last - n : kWidth);
    });
  });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(turned_linear, TurnedLinearParams)
