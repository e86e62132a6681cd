// Parts of a linear layer shared between few rows and many: its rows prepared in the workspace, its columns as one list
// over the segments, and everything that follows the sums.
#pragma once

#include <type_traits>

#include "../activation.h"
#include "llmkern/linear.h"
#include "schemes.h"

namespace llmkern::LLMKERN_ISA {
namespace {

struct Nothing {};  // the type of a residual that is not there

constexpr int64_t kElementsPerThread = 16384;  // below this, waking a thread costs more than it saves

// The workspace: a header for each row, then the rows; both for whole blocks of 32 rows.
inline Header* headers(const LinearParams& p) {
  return reinterpret_cast<Header*>(p.workspace);
}

// Bytes from one prepared row to the next, an odd number of cache lines: rows 4096 bytes apart would share a few lines
// of the L1 cache.
template <class Scheme>
inline int64_t row_bytes(int64_t k) {
  return (Scheme::kSums * padded(k) * static_cast<int64_t>(sizeof(typename Scheme::Code)) / 64 | 1) * 64;
}

template <class Scheme>
inline typename Scheme::Code* prepared_row(const LinearParams& p, int64_t r) {
  const int64_t blocks = (p.rows.count + 31) / 32 * 32;
  char* row = p.workspace + blocks * sizeof(Header) + r * row_bytes<Scheme>(p.k);
  return reinterpret_cast<typename Scheme::Code*>(row);
}

// Rows of x as the scheme multiplies them, `stride` bytes apart.
struct Source {
  const char* rows;
  int64_t stride;
};

// Bytes from one row of x to the next where it lies, as codes of the scheme.
template <class Scheme>
inline int64_t x_stride(const LinearParams& p) {
  return p.rows.stride0 * static_cast<int64_t>(sizeof(typename Scheme::Code));
}

// Are these rows of x, a block of them, multiplied where they lie?  Tiles are read to their ends, by whole cache lines,
// and rows a multiple of 2048 bytes apart share a few lines of the L1 cache.
template <class Scheme>
inline bool in_place(const LinearParams& p, int64_t rows) {
  const int64_t stride = x_stride<Scheme>(p);
  return rows == Scheme::kRowsInPlace && p.k % Scheme::kStep == 0 && p.rows.size1 == 1 && p.rows.size2 == 1 &&
         reinterpret_cast<uintptr_t>(p.x) % 64 == 0 && stride % 64 == 0 && stride % 2048 != 0;
}

template <class Scheme>
inline Source source(const LinearParams& p, int64_t r, int64_t rows) {
  if (!in_place<Scheme>(p, rows))
    return {reinterpret_cast<const char*>(prepared_row<Scheme>(p, r)), row_bytes<Scheme>(p.k)};
  const int64_t stride = x_stride<Scheme>(p);
  return {static_cast<const char*>(p.x) + r * stride, stride};
}

template <class Scheme, class T>
void prepare(const LinearParams& p, const T* x, const Threads& threads) {
  const int64_t used = p.k * sizeof(typename Scheme::Code);
  constexpr int64_t kBlock = Scheme::kRowsInPlace;
  const int64_t kept = kBlock > 0 && in_place<Scheme>(p, kBlock) ? p.rows.count - p.rows.count % kBlock : 0;
  threads.parallel_for(p.rows.count - kept, kElementsPerThread / (p.k + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = kept + begin; r < kept + end; ++r) {
      typename Scheme::Code* row = prepared_row<Scheme>(p, r);
      std::memset(reinterpret_cast<char*>(row) + used, 0, (used + 63) / 64 * 64 - used);
      Scheme::prepare(x + p.rows.offset(r), p.k, headers(p)[r], row);
      if (std::is_same_v<T, int8_t>) headers(p)[r].scale = p.x_scale ? p.x_scale[r] : 1.0f;
    }
  });
}

// Strips of so many columns, of all segments.
inline int64_t strips(const LinearParams& p, int width) {
  int64_t total = 0;
  for (int i = 0; i < p.segments; ++i) total += (p.segment[i].n + width - 1) / width;
  return total;
}

inline F32 load_typed(DType dtype, const void* p, int64_t i, int64_t n) {
  return with_type(dtype, [&]<class T>() { return load_at_most(static_cast<const T*>(p) + i, n); });
}

// A strip of columns, and the function that finishes their sums.
template <class Scheme>
struct Columns {
  static constexpr int kMost = kLanes > 8 ? 2 * kLanes : 16;

  // Finish `rows` rows from r0 on; sums has kSums rows for each, `stride` apart and padded to pairs of registers.
  using Finish = void (*)(const LinearParams& p, const Columns& columns, int64_t r0, int rows,
                          const typename Scheme::Sum* sums, int64_t stride);

  const LinearSegment* segment;
  int64_t n;
  int count;
  Finish finish;
  alignas(64) float scale[kMost], bias[kMost];
};

// v, whose last operation is not fused with the next one: gelu ends with a product, and whether a residual added to it
// made one fma of both would depend on where the columns end.
inline F32 apart(F32 v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

template <class Scheme, class T, class R, Activation kActivation>
void finish_rows(const Columns<Scheme>& columns, int c, T* out, const R* residual, const Header* header, int rows,
                 const typename Scheme::Sum* sums, int64_t stride) {
  const LinearSegment& s = *columns.segment;
  const int left = columns.count - c;
  const F32 scale[2] = {load(columns.scale + c), load(columns.scale + c + kLanes)};
  const F32 bias[2] = {load(columns.bias + c), load(columns.bias + c + kLanes)};
  const F32 multiplier = broadcast(s.multiplier);
  for (int r = 0; r < rows; ++r, ++header, sums += Scheme::kSums * stride, out += s.out_stride) {
    const auto value = [&](int half, int n) {
      const F32 product = Scheme::finish(sums + half * kLanes, stride, *header);
      const F32 y = activate<kActivation>(product * scale[half] + bias[half]);
      if constexpr (std::is_same_v<R, Nothing>)
        return y;
      else
        return apart(y) * multiplier + load_at_most(residual + r * s.residual_stride + half * kLanes, n);
    };
    if (left >= 2 * kLanes) {
      store_two(out, value(0, kLanes), value(1, kLanes));
    } else {
      store_at_most(out, value(0, left), left);
      if (left > kLanes) store_at_most(out + kLanes, value(1, left - kLanes), left - kLanes);
    }
  }
}

template <class Scheme, class T, Activation kActivation>
void finish_as(const LinearParams& p, const Columns<Scheme>& columns, int64_t r0, int rows,
               const typename Scheme::Sum* sums, int64_t stride) {
  const LinearSegment& s = *columns.segment;
  for (int c = 0; c < columns.count; c += 2 * kLanes) {
    T* const out = static_cast<T*>(s.out) + r0 * s.out_stride + columns.n + c;
    const auto added_to = [&]<class R>(const R* residual) {
      finish_rows<Scheme, T, R, kActivation>(columns, c, out, residual, headers(p) + r0, rows, sums + c, stride);
    };
    if (!s.residual)
      added_to(static_cast<const Nothing*>(nullptr));
    else
      with_type(p.residual_dtype, [&]<class R>() {
        added_to(static_cast<const R*>(s.residual) + r0 * s.residual_stride + columns.n + c);
      });
  }
}

template <class Scheme>
void finish_sums(const LinearParams& p, const Columns<Scheme>& columns, int64_t r0, int rows, const int32_t* sums,
                 int64_t stride) {
  const LinearSegment& s = *columns.segment;
  for (int r = 0; r < rows; ++r) {
    int32_t* out = static_cast<int32_t*>(s.out) + (r0 + r) * s.out_stride + columns.n;
    for (int c = 0; c < columns.count; c += kLanes) {
      const S32 exact = Scheme::exact(sums + r * stride + c, headers(p)[r0 + r]);
      if (columns.count - c >= kLanes)
        std::memcpy(out + c, &exact, sizeof(exact));
      else
        std::memcpy(out + c, &exact, (columns.count - c) * sizeof(int32_t));
    }
  }
}

// The i-th strip of `width` columns, neighbours in one segment, the last of each segment perhaps fewer.
template <class Scheme>
void set_columns(const LinearParams& p, int width, int64_t i, Columns<Scheme>& columns) {
  const LinearSegment* s = p.segment;
  for (; i >= (s->n + width - 1) / width; ++s) i -= (s->n + width - 1) / width;
  columns.segment = s;
  columns.n = i * width;
  columns.count = s->n - columns.n < width ? s->n - columns.n : width;
  for (int c = 0; c < Columns<Scheme>::kMost; c += kLanes) {
    const int64_t n = columns.n + c, left = columns.count - c;
    store(columns.scale + c, s->w_scale && left > 0 ? load_at_most(s->w_scale + n, left) : broadcast(1.0f));
    store(columns.bias + c, s->bias && left > 0 ? load_typed(p.bias_dtype, s->bias, n, left) : F32{});
  }
  if constexpr (std::is_same_v<typename Scheme::Sum, int32_t> && Scheme::kSums == 1)
    if (p.sums) return columns.finish = finish_sums<Scheme>, void();
  columns.finish = with_type(p.out_dtype, [&]<class T>() {
    return with_activation(s->activation, []<Activation kActivation>() -> typename Columns<Scheme>::Finish {
      return finish_as<Scheme, T, kActivation>;
    });
  });
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
