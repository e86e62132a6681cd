// linear on the CPU: rows of x go to the workspace as the scheme has them, padded with zeros, so that only the weight
// has a tail; then few rows stream the weight past them (stream.h) and many pass by packed blocks of it (blocks.h).
// A row's result depends on neither its neighbours, but for whether they are few (linear_keeps_rows_alone: not on that
// either), nor on the number of threads.
#include "llmkern/linear.h"

#include <atomic>

#include "../isa.h"
#include "blocks.h"
#include "matrices.h"
#include "stream.h"
#include "tiles.h"

namespace llmkern::LLMKERN_ISA {

void packed_linear(const LinearParams& p, const Threads& threads);  // packed_linear.cpp

namespace {

// At most so many rows stream the weight, which then sets the pace; with more, packing it pays.
constexpr int64_t kFewIntegers = 8, kFewFloats = LLMKERN_ISA_LEVEL == 2 ? 8 : 4, kFewForTiles = 4;

#ifdef __AMX_INT8__
using ManyBf16 = TileBf16;
using ForBf16 = Tiles;
constexpr int64_t kFewForBf16 = kFewForTiles;
#elif defined(__AVX512BF16__)
using ManyBf16 = Bf16;
using ForBf16 = Vectors;
constexpr int64_t kFewForBf16 = kFewFloats;
#endif

#ifdef __AVX512BF16__
// A streaming product reads every row from the workspace, however many there are.
struct FewBf16 : Bf16 {
  static constexpr int kRowsInPlace = 0;
};
#endif

#ifdef LLMKERN_MATRICES
using ForIntegers = Matrices;
#else
using ForIntegers = Vectors;
#endif

template <class F>
void with_weight(WeightType type, const F& f) {
  switch (type) {
    case WeightType::f32:
      return f.template operator()<float>();
    case WeightType::bf16:
      return f.template operator()<BFloat16>();
    case WeightType::f16:
      return f.template operator()<Float16>();
    case WeightType::s8:
      return f.template operator()<int8_t>();
    case WeightType::packed:
      break;
  }
  __builtin_unreachable();
}

template <class Scheme>
void prepare_codes(const LinearParams& p, const Threads& threads) {
  if (p.x_q) return prepare<Scheme>(p, p.x_q, threads);
  with_type(p.dtype, [&]<class T>() { prepare<Scheme>(p, static_cast<const T*>(p.x), threads); });
}

void integers(const LinearParams& p, const Threads& threads) {
#ifdef __AMX_INT8__
  if (p.rows.count > kFewIntegers) {
    prepare_codes<TileIntegers>(p, threads);
    return blocks<TileIntegers, int8_t, Tiles>(p, threads);
  }
#endif
  prepare_codes<Integers>(p, threads);
  if (p.rows.count <= kFewIntegers) return stream<Integers, int8_t>(p, threads);
  blocks<Integers, int8_t, ForIntegers>(p, threads);
}

#ifdef LLMKERN_DOT
// The call for row r alone.
LinearParams row_of(LinearParams p, int64_t r) {
  p.x = static_cast<const char*>(p.x) + p.rows.offset(r) * size_of(p.dtype);
  for (int i = 0; i < p.segments; ++i) {
    LinearSegment& s = p.segment[i];
    s.out = static_cast<char*>(s.out) + r * s.out_stride * size_of(p.out_dtype);
    if (s.residual)
      s.residual = static_cast<const char*>(s.residual) + r * s.residual_stride * size_of(p.residual_dtype);
  }
  p.rows = dense_rows(1, p.k);
  return p;
}
#endif

void floats(const LinearParams& p, const Threads& threads) {
  const bool alone = linear_keeps_rows_alone();
  const bool few = alone || p.rows.count <= kFewFloats;
#ifdef __AVX512BF16__
  const bool exact = p.weight_type == WeightType::bf16 || p.weight_type == WeightType::s8;
  if (!alone && p.rows.count > kFewForBf16 && p.dtype == DType::bf16 && exact) {
    prepare<ManyBf16>(p, static_cast<const BFloat16*>(p.x), threads);
    if (p.weight_type == WeightType::bf16) return blocks<ManyBf16, BFloat16, ForBf16>(p, threads);
    return blocks<ManyBf16, int8_t, ForBf16>(p, threads);
  }
  if (p.dtype == DType::bf16 && p.weight_type == WeightType::bf16) {
    prepare<FewBf16>(p, static_cast<const BFloat16*>(p.x), threads);
    return stream<FewBf16, BFloat16>(p, threads);
  }
#endif
#ifdef __AMX_INT8__
  if (!alone && p.rows.count > kFewForTiles && p.weight_type == WeightType::s8) {
    with_type(p.dtype, [&]<class T>() { prepare<TileFloats>(p, static_cast<const T*>(p.x), threads); });
    return blocks<TileFloats, int8_t, Tiles>(p, threads);
  }
#endif
#ifdef LLMKERN_MATRICES
  if (p.dtype == DType::bf16 && p.weight_type == WeightType::bf16) {
    prepare<Bf16>(p, static_cast<const BFloat16*>(p.x), threads);
    if (few) return stream<Bf16, BFloat16>(p, threads);
    return blocks<Bf16, BFloat16, Matrices>(p, threads);
  }
  if (p.dtype == DType::bf16 && p.weight_type == WeightType::s8 && !few) {
    prepare<Bf16>(p, static_cast<const BFloat16*>(p.x), threads);
    return blocks<Bf16, int8_t, Matrices>(p, threads);
  }
#endif
#ifdef LLMKERN_DOT
  if (few && p.weight_type == WeightType::s8 && p.k <= kMostExactProducts) {
    with_type(p.dtype, [&]<class T>() { prepare<Digits>(p, static_cast<const T*>(p.x), threads); });
    const Header* const rows = headers(p);
    if (std::all_of(rows, rows + p.rows.count, Digits::served)) return stream<Digits, int8_t>(p, threads);
    if (p.rows.count > 1) {
      for (int64_t r = 0; r < p.rows.count; ++r) floats(row_of(p, r), threads);
      return;
    }
  }
#endif
  with_type(p.dtype, [&]<class T>() { prepare<Floats>(p, static_cast<const T*>(p.x), threads); });
  with_weight(p.weight_type, [&]<class W>() {
    if (few) return stream<Floats, W>(p, threads);
    blocks<Floats, W>(p, threads);
  });
}

}  // namespace

void linear(const LinearParams& p, const Threads& threads) {
  if (p.rows.count == 0) return;
  if (p.weight_type == WeightType::packed) return packed_linear(p, threads);
  p.w8a8 ? integers(p, threads) : floats(p, threads);
}

}  // namespace llmkern::LLMKERN_ISA

#ifdef LLMKERN_PORTABLE
namespace {
std::atomic<bool> rows_alone{false};
}

bool llmkern::linear_keeps_rows_alone() {
  return rows_alone.load(std::memory_order_relaxed);
}

extern "C" __attribute__((visibility("default"))) void llmkern_set_batch_invariant(int value) {
  rows_alone = value != 0;
}

bool llmkern::linear_takes_many_rows(WeightType weight) {
  return (isa() == Isa::avx512_bf16 || isa() == Isa::amx) && weight == WeightType::bf16;
}
#endif

LLMKERN_PRODUCTS_LAUNCHER(linear, LinearParams)
