// int8_linear on the CPU for few rows: the weight is read once, as it is stored, and everything else follows its pace.
// rows     Each row of x goes to the workspace first: as fp32, or under W8A8 as codes with their scale.  There it is
//          padded with zeros, so that only the weight has a tail.
// columns  16 outputs of a row are finished together: scale, bias, activation, rounding.
// block    kRows × kColumns sums in registers, each one register wide and added up over k from left to right: a
//          result depends neither on its neighbours nor on the number of threads.  A weight's vector is widened once
//          for up to four rows; further rows find it in the L1 cache.
// threads  share the columns.
// ISA      Weight-only: widening to fp32 and FMA.  W8A8: VNNI, or what csrc/cpu/int8.h makes of AVX2 and SSE2.
#include "llmkern/int8_linear.h"

#include "activation.h"
#include "int8.h"
#include "isa.h"
#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kColumnsAtOnce = 16;
constexpr int kRowsAtOnce = 4;
constexpr int kAccumulators = LLMKERN_ISA_LEVEL == 2 ? 16 : 8;  // half of the registers
constexpr int64_t kWeightsPerThread = 65536;                    // below this, waking a thread costs more than it saves
constexpr int64_t kElementsPerThread = 16384;

// What precedes each row in the workspace.
struct Header {
  float scale;
  uint32_t compensation;  // kShift · Σ codes, modulo 2³²
};
static_assert(sizeof(Header) <= 64);

struct WeightOnly {
  using X = float;
  using Vector = F32;
  using Accumulator = F32;
  static constexpr int kStep = kLanes;
  static constexpr int64_t kSegment = 64 * kStep;  // added up apart, so that long sums lose no accuracy

  static Vector load_x(const X* x) { return load(x); }
  static Vector load_w(const int8_t* w) { return load(w); }
  static Vector load_first_w(const int8_t* w, int n) { return load_first(w, n); }
  static Accumulator multiply(Vector w, Vector x, Accumulator acc) { return acc + w * x; }
  static float finish(Accumulator acc, const Header&) { return sum(acc); }

  template <class T>
  static void prepare(const T* x, int64_t k, Header&, X* row) {
    for (int64_t i = 0; i < k; i += kLanes) store(row + i, load_at_most(x + i, k - i));
  }
};

struct W8A8 {
  using X = int8_t;
  using Vector = S8;
  using Accumulator = S32;
  static constexpr int kStep = kVectorBytes;
  static constexpr int64_t kSegment = int64_t{1} << 62;  // exact at any length

  static Vector load_x(const X* x) { return load_codes(x); }
  static Vector load_w(const int8_t* w) { return load_codes(w); }
  static Vector load_first_w(const int8_t* w, int n) { return load_first_codes(w, n); }
  static Accumulator multiply(Vector w, Vector x, Accumulator acc) { return LLMKERN_ISA::multiply(w, x, acc); }
  static float finish(Accumulator acc, const Header& header) {
    const uint32_t total = sum(bits_as<U32>(acc)) - header.compensation;
    return static_cast<float>(static_cast<int32_t>(total)) * header.scale;
  }

  template <class T>
  static void prepare(const T* x, int64_t k, Header& header, X* row) {
    const int64_t padded = (k + kStep - 1) / kStep * kStep;
    header.scale = quantize_row(x, k, row);
    std::memset(row + k, 0, padded - k);
    int32_t total = 0;
    for (int64_t i = 0; i < padded; ++i) total += row[i];
    header.compensation = static_cast<uint32_t>(total) * kShift;
  }
};

template <class Scheme>
struct Row {
  char* bytes;

  Header& header() const { return *reinterpret_cast<Header*>(bytes); }
  typename Scheme::X* values() const { return reinterpret_cast<typename Scheme::X*>(bytes + 64); }
};

template <class Scheme>
Row<Scheme> row(const Int8LinearParams& p, int64_t r) {
  return {p.workspace + r * int8_linear_row_bytes(p.k, p.w8a8)};
}

// y[r, c] += Σ_k x[r] · w[c] over k in [begin, end), times the row's scale, for kRows rows and kColumns columns.
// The bytes `ahead` of w are fetched meanwhile: the same place of the next block's columns, as the hardware's
// prefetchers stop at a page's end (from memory, one thread: 576² 52 → 36 µs, 4096² 1.42 → 1.25 ms).
template <class Scheme, int kRows, int kColumns>
inline void block(const Row<Scheme> (&x)[kRows], const int8_t* const (&w)[kColumns], int64_t ahead, int64_t begin,
                  int64_t end, float* y) {
  typename Scheme::Accumulator acc[kRows][kColumns] = {};
  const auto step = [&](int64_t i, const auto& load_w) {
    typename Scheme::Vector values[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) values[r] = Scheme::load_x(x[r].values() + i);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      __builtin_prefetch(w[c] + i + ahead);
      const typename Scheme::Vector weights = load_w(w[c] + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r][c] = Scheme::multiply(weights, values[r], acc[r][c]);
    }
  };
  int64_t i = begin;
  for (; i + Scheme::kStep <= end; i += Scheme::kStep) step(i, [](const int8_t* p) { return Scheme::load_w(p); });
  if (const int n = end - i; n > 0) step(i, [n](const int8_t* p) { return Scheme::load_first_w(p, n); });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) y[r * kColumnsAtOnce + c] += Scheme::finish(acc[r][c], x[r].header());
}

// Scale, bias, activation and rounding of y[0, count), which are out[r, n...].
void finish(const Int8LinearParams& p, int64_t r, int64_t n, int count, float* y) {
  for (int c = 0; c < count; c += kLanes) store(y + c, load(y + c) * load_at_most(p.w_scale + n + c, count - c));
  if (p.bias) {
    with_type(p.bias_dtype, [&]<class B>() {
      const B* bias = static_cast<const B*>(p.bias) + n;
      for (int c = 0; c < count; c += kLanes) store(y + c, load(y + c) + load_at_most(bias + c, count - c));
    });
  }
  if (p.activation != Activation::none)
    for (int c = 0; c < count; ++c) y[c] = activate(p.activation, y[c]);
  with_type(p.dtype, [&]<class T>() {
    T* out = static_cast<T*>(p.out) + r * p.n + n;
    for (int c = 0; c < count; c += kLanes) store_at_most(out + c, load(y + c), count - c);
  });
}

// out[r0, r0 + kRows) in columns [n, n + count).
template <class Scheme, int kRows>
void columns(const Int8LinearParams& p, int64_t r0, int64_t n, int count) {
  constexpr int kMost = kAccumulators / kRows;
  constexpr int kColumns = kMost >= 8 ? 8 : kMost >= 4 ? 4 : 2;
  alignas(64) float y[kRows * kColumnsAtOnce] = {};
  Row<Scheme> x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = row<Scheme>(p, r0 + r);
  for (int c0 = 0; c0 < count; c0 += kColumns) {
    const int8_t* w[kColumns];  // beyond the last column the last one again: computed and not used
    for (int c = 0; c < kColumns; ++c) w[c] = p.w_q + (n + (c0 + c < count ? c0 + c : count - 1)) * p.w_stride;
    for (int64_t k = 0; k < p.k; k += Scheme::kSegment) {
      const int64_t end = p.k - k > Scheme::kSegment ? k + Scheme::kSegment : p.k;
      block(x, w, kColumns * p.w_stride, k, end, y + c0);
    }
  }
  for (int r = 0; r < kRows; ++r) finish(p, r0 + r, n, count, y + r * kColumnsAtOnce);
}

template <class Scheme, class T>
void linear(const Int8LinearParams& p, const Threads& threads) {
  threads.parallel_for(p.rows.count, kElementsPerThread / (p.k + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<Scheme> to = row<Scheme>(p, r);
      Scheme::prepare(static_cast<const T*>(p.x) + p.rows.offset(r), p.k, to.header(), to.values());
    }
  });
  const int64_t groups = (p.n + kColumnsAtOnce - 1) / kColumnsAtOnce;
  const int64_t grain = kWeightsPerThread / (kColumnsAtOnce * (p.k + 1)) + 1;
  threads.parallel_for(groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kColumnsAtOnce; n < end * kColumnsAtOnce && n < p.n; n += kColumnsAtOnce) {
      const int count = p.n - n < kColumnsAtOnce ? p.n - n : kColumnsAtOnce;
      int64_t r = 0;
      for (; r + kRowsAtOnce <= p.rows.count; r += kRowsAtOnce) columns<Scheme, kRowsAtOnce>(p, r, n, count);
      if (p.rows.count - r == 3) columns<Scheme, 3>(p, r, n, count);
      if (p.rows.count - r == 2) columns<Scheme, 2>(p, r, n, count);
      if (p.rows.count - r == 1) columns<Scheme, 1>(p, r, n, count);
    }
  });
}

}  // namespace

void int8_linear(const Int8LinearParams& p, const Threads& threads) {
  with_type(p.dtype, [&]<class T>() { p.w8a8 ? linear<W8A8, T>(p, threads) : linear<WeightOnly, T>(p, threads); });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(int8_linear, Int8LinearParams)
