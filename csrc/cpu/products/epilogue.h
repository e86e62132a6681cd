// What a linear layer shares between few rows and many: its rows prepared in the workspace, its columns as one list
// over the segments, and everything that follows the sums.
#pragma once

#include <type_traits>

#include "../activation.h"
#include "llmkern/linear.h"
#include "schemes.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // below this, waking a thread costs more than it saves

// The workspace: a header for each row, then the rows; both for whole blocks of 32 rows.
inline Header* headers(const LinearParams& p) {
  return reinterpret_cast<Header*>(p.workspace);
}

template <class Scheme>
inline typename Scheme::Code* prepared_row(const LinearParams& p, int64_t r) {
  const int64_t blocks = (p.rows.count + 31) / 32 * 32;
  char* row = p.workspace + blocks * sizeof(Header) + r * linear_row_bytes(p.k, p.w8a8);
  return reinterpret_cast<typename Scheme::Code*>(row);
}

template <class Scheme, class T>
void prepare(const LinearParams& p, const T* x, const Threads& threads) {
  const int64_t used = p.k * sizeof(typename Scheme::Code);
  threads.parallel_for(p.rows.count, kElementsPerThread / (p.k + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      typename Scheme::Code* row = prepared_row<Scheme>(p, r);
      std::memset(reinterpret_cast<char*>(row) + used, 0, (used + 63) / 64 * 64 - used);
      Scheme::prepare(x + p.rows.offset(r), p.k, headers(p)[r], row);
      if (std::is_same_v<T, int8_t>) headers(p)[r].scale = p.x_scale ? p.x_scale[r] : 1.0f;
    }
  });
}

// Strips: `width` neighbouring columns of one segment, the last of each segment perhaps fewer.
struct Strip {
  const LinearSegment* segment;
  int64_t n;
  int count;
};

inline int64_t strips(const LinearParams& p, int width) {
  int64_t total = 0;
  for (int i = 0; i < p.segments; ++i) total += (p.segment[i].n + width - 1) / width;
  return total;
}

inline Strip strip(const LinearParams& p, int width, int64_t i) {
  const LinearSegment* s = p.segment;
  for (; i >= (s->n + width - 1) / width; ++s) i -= (s->n + width - 1) / width;
  const int64_t n = i * width;
  return {s, n, static_cast<int>(s->n - n < width ? s->n - n : width)};
}

inline F32 load_typed(DType dtype, const void* p, int64_t i, int64_t n) {
  return with_type(dtype, [&]<class T>() { return load_at_most(static_cast<const T*>(p) + i, n); });
}

// out[r0, r0 + rows) in the strip's columns from `sums`: kSums rows of them for each row, `stride` apart and padded to
// whole registers.
template <class Scheme, class T>
void finish_as(const LinearParams& p, const Strip& to, int64_t r0, int rows, const typename Scheme::Sum* sums,
               int64_t stride) {
  const LinearSegment& s = *to.segment;
  for (int c = 0; c < to.count; c += kLanes) {
    const int64_t n = to.n + c, left = to.count - c;
    const F32 scale = s.w_scale ? load_at_most(s.w_scale + n, left) : broadcast(1.0f);
    const F32 bias = s.bias ? load_typed(p.bias_dtype, s.bias, n, left) : F32{};
    for (int r = 0; r < rows; ++r) {
      const Header& header = headers(p)[r0 + r];
      const F32 product = Scheme::finish(sums + r * Scheme::kSums * stride + c, stride, header);
      F32 y = activate(s.activation, product * scale + bias);
      if (s.residual) y += load_typed(p.residual_dtype, s.residual, (r0 + r) * s.residual_stride + n, left);
      store_at_most(static_cast<T*>(s.out) + (r0 + r) * s.out_stride + n, y, left);
    }
  }
}

template <class Scheme>
void finish(const LinearParams& p, const Strip& to, int64_t r0, int rows, const typename Scheme::Sum* sums,
            int64_t stride) {
  if constexpr (std::is_same_v<typename Scheme::Sum, int32_t> && Scheme::kSums == 1) {
    if (p.sums) {
      for (int r = 0; r < rows; ++r) {
        int32_t* out = static_cast<int32_t*>(to.segment->out) + (r0 + r) * to.segment->out_stride + to.n;
        for (int c = 0; c < to.count; c += kLanes) {
          const S32 exact = Scheme::exact(sums + r * stride + c, headers(p)[r0 + r]);
          if (to.count - c >= kLanes)
            std::memcpy(out + c, &exact, sizeof(exact));
          else
            std::memcpy(out + c, &exact, (to.count - c) * sizeof(int32_t));
        }
      }
      return;
    }
  }
  with_type(p.out_dtype, [&]<class T>() { finish_as<Scheme, T>(p, to, r0, rows, sums, stride); });
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
