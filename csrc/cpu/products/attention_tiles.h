// attention in bf16 on AMX, as flash-attention has it: lanes are keys.
// scores   [row][key] = q · kᵀ.  Tiles of q are its rows; a block of k becomes pairs of dimensions, [dim / 2][key].
// weights  [row][key], rounded to bf16.
// out      [row][dim] += weights · v; a block of v becomes pairs of keys, [key / 2][dim].
// tiles    32 × 32 numbers are 2 × 2 tiles of sums, 0 to 3, of left operands 4 and 5 and right ones 6 and 7, 32
// products
//          a step.
#pragma once

#ifdef __AMX_BF16__

#include "attention_pairs.h"
#include "tiles.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kBlockRegisters = kMostKeys / kLanes;

struct TileRows : Seen {
  alignas(64) BFloat16 q[kM * kMaxHeadDim];              // [row][dim], padded with zeros to whole tiles, as all are
  alignas(64) BFloat16 keys[kMostKeys * kMaxHeadDim];    // [dim / 2][key][2]
  alignas(64) BFloat16 values[kMostKeys * kMaxHeadDim];  // [key / 2][dim][2]
  alignas(64) BFloat16 weights[kM * kMostKeys];          // [row][key]
  alignas(64) float scores[kM * kMostKeys];              // [row][key]
  alignas(64) float totals[kM * kLanes];                 // [row][key % kLanes]: each row's, to be added up
  alignas(64) float keep[kM], shift[kM];                 // of the online softmax, for each row
  alignas(64) float out[kM * kMaxHeadDim];               // [row][dim]
  bool any;                                              // whether something was added to out
};

// to[i][r] (+)= Σ left[i] · right[r], for 32 i's and 32 r's; strides in bytes, `steps` of 32 products.
inline void multiply_tiles(const void* left, int64_t left_stride, const void* right, int64_t right_stride,
                           int64_t steps, bool add, float* to, int64_t to_stride) {
  const char *a = static_cast<const char*>(left), *b = static_cast<const char*>(right);
  float* below = to + 16 * (to_stride / 4);
  if (add) {
    _tile_loadd(0, to, to_stride);
    _tile_loadd(1, to + 16, to_stride);
    _tile_loadd(2, below, to_stride);
    _tile_loadd(3, below + 16, to_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += 64, b += 16 * right_stride) {
    _tile_loadd(4, a, left_stride);
    _tile_loadd(6, b, right_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 64, right_stride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * left_stride, left_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, to_stride);
  _tile_stored(1, to + 16, to_stride);
  _tile_stored(2, below, to_stride);
  _tile_stored(3, below + 16, to_stride);
}

inline void start(const Call& c, TileRows& rows) {
  start_softmax(c, rows);
  const int64_t dim = padded_to_pairs(c.p.dim);
  for (int r = 0; r < kM; ++r) {
    const BFloat16* const q = query_at<BFloat16>(c.p, rows, r);
    for (int64_t d = 0; d < dim; d += 32)
      _mm512_store_si512(rows.q + r * dim + d, bits_as<__m512i>(Bf16::load_part(q + d, c.p.dim - d)));
    store(rows.totals + r * kLanes, first(broadcast(rows.total[r]), 1));
  }
  rows.any = false;
}

// A block of k, transposed by pairs of dimensions.
inline void turn_keys(const BFloat16* k, int64_t stride, int count, int64_t dim, BFloat16* to) {
  for (int64_t d = 0; d < dim; d += 32)
    for (int j = 0; j < padded_to_pairs(count); j += kLanes) {
      U32 square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = j + i < count ? bits_as<U32>(Bf16::load_part(k + (j + i) * stride + d, dim - d)) : U32{};
      transpose(square);
      for (int i = 0; i < kLanes; ++i) std::memcpy(to + ((d / 2 + i) * kMostKeys + j) * 2, &square[i], sizeof(U32));
    }
}

// The scale, softcap, masks and limits of keys [j0, j0 + count); beyond them -infinity to the end of their register.
inline void bias_scores(const Call& c, TileRows& rows, int64_t j0, int count, bool all_see) {
  const AttentionParams& p = c.p;
  const F32 scale = broadcast(p.sm_scale), cap = broadcast(p.softcap);
  for (int r = 0; r < rows.count; ++r)
    for (int j = 0; j < count; j += kLanes) {
      const int n = count - j < kLanes ? count - j : kLanes;
      float* const s = rows.scores + r * kMostKeys + j;
      F32 score = load(s) * scale;
      if (p.softcap > 0.0f) score = tanh(score / cap) * cap;
      if (c.by_row) score += added_by_row(c, rows, r, j0 + j, n);
      if (c.by_key) score += load(rows.key_bias + j);
      if (!all_see) {
        const S32 key = lane_numbers() + static_cast<int32_t>(j0 + j);
        score = (key >= rows.first[r]) & (key <= rows.last[r]) ? score : broadcast(-kInfinity);
      }
      store(s, lane_numbers() < n ? score : broadcast(-kInfinity));
    }
}

// The lanes of 16 registers, combined by f: the j-th register's in lane j.
template <class F>
inline F32 across(F32 (&v)[kLanes], const F& f) {
  transpose(v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) v[i] = f(v[i], v[i + half]);
  return v[0];
}

// scores → weights of keys [j0, j0 + count).
inline void softmax(const Call& c, TileRows& rows, int64_t j0, int count) {
  const AttentionParams& p = c.p;
  const bool all_see = j0 >= rows.every_first && j0 + count - 1 <= rows.every_last;
  // Scores that nothing but the scale changes are left as they are: the largest stays it.
  const bool as_they_are =
      !c.by_row && p.softcap <= 0.0f && !c.by_key && all_see && p.sm_scale > 0.0f && count % kLanes == 0;
  if (!as_they_are) bias_scores(c, rows, j0, count, all_see);
  const F32 factor = broadcast(as_they_are ? p.sm_scale : 1.0f);
  const int registers = (count + kLanes - 1) / kLanes;
  for (int r0 = 0; r0 < rows.count; r0 += kLanes) {
    F32 largest[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      largest[i] = broadcast(-kInfinity);
      for (int j = 0; j < registers; ++j) {
        const F32 score = load(rows.scores + (r0 + i) * kMostKeys + j * kLanes);
        largest[i] = score > largest[i] ? score : largest[i];  // a NaN is left out, and comes back with its weight
      }
    }
    const F32 before = load(rows.top + r0);
    const F32 here = across(largest, [](F32 a, F32 b) { return a > b ? a : b; }) * factor;
    const F32 top = here > before ? here : before, shift = top == -kInfinity ? F32{} : top;
    store(rows.top + r0, top);
    store(rows.shift + r0, shift);
    store(rows.keep + r0, exp_or_0(before - shift));
    for (int r = r0; r < r0 + kLanes; ++r) {
      const F32 shift_r = broadcast(rows.shift[r]);
      const float* const s = rows.scores + r * kMostKeys;
      const auto weight = [&](int j) {
        return j < registers ? exp2_or_0((load(s + j * kLanes) * factor - shift_r) * 0x1.715476p0f) : F32{};
      };
      F32 total = {};
      for (int j = 0; j < registers; j += 2) {
        const F32 first = weight(j), second = weight(j + 1);
        store_two(rows.weights + r * kMostKeys + j * kLanes, first, second);
        total += first + second;
      }
      float* const totals = rows.totals + r * kLanes;
      store(totals, load(totals) * broadcast(rows.keep[r]) + total);
    }
  }
}

inline void add_values(const AttentionParams& p, TileRows& rows, int count) {
  const int64_t width = padded_to_pairs(p.value_dim);
  for (int r = 0; rows.any && r < rows.count; ++r) {
    const F32 keep = broadcast(rows.keep[r]);
    for (int64_t d = 0; d < width; d += kLanes) store(rows.out + r * width + d, load(rows.out + r * width + d) * keep);
  }
  for (int r = 0; r < rows.count; r += 32)
    for (int64_t d = 0; d < width; d += 32)
      multiply_tiles(rows.weights + r * kMostKeys, kMostKeys * 2, rows.values + d * 2, width * 4,
                     padded_to_pairs(count) / 32, rows.any, rows.out + r * width + d, width * 4);
  rows.any = true;
}

inline void finish(const Call& c, TileRows& rows) {
  const AttentionParams& p = c.p;
  const int64_t width = padded_to_pairs(p.value_dim);
  if (!rows.any) std::memset(rows.out, 0, kM * width * sizeof(float));
  for (int r0 = 0; r0 < rows.count; r0 += kLanes) {
    F32 totals[kLanes];
    for (int i = 0; i < kLanes; ++i) totals[i] = load(rows.totals + (r0 + i) * kLanes);
    const F32 factors = finish_softmax(p, rows, r0, across(totals, [](F32 a, F32 b) { return a + b; }));
    for (int r = r0; r < r0 + kLanes && r < rows.count; ++r) {
      BFloat16* const out = out_at<BFloat16>(p, rows, r);
      const float* const sums = rows.out + r * width;
      const F32 factor = broadcast(factors[r - r0]);
      for (int64_t d = 0; d < p.value_dim; d += 2 * kLanes) {
        const F32 first = load(sums + d) * factor, second = load(sums + d + kLanes) * factor;
        const int64_t left = p.value_dim - d;
        if (left >= 2 * kLanes) {
          store_two(out + d, first, second);
        } else {
          store_at_most(out + d, first, left);
          if (left > kLanes) store_at_most(out + d + kLanes, second, left - kLanes);
        }
      }
    }
  }
}

template <class T>
void run(const Call& c, TileRows& rows) {
  const AttentionParams& p = c.p;
  start(c, rows);
  const int64_t dim = padded_to_pairs(p.dim);
  for_blocks<BFloat16>(c, rows, kMostKeys, [&](int64_t j, const Keys<BFloat16>& keys) {
    const int count = keys.count;
    turn_keys(keys.k, p.k_strides.position, count, p.dim, rows.keys);
    // (A tile that is loaded from what was stored a moment ago waits for the stores to reach the cache.)
    pair_vectors(keys.v, p.v_strides.position, count, p.value_dim, padded_to_pairs(count) / 2, rows.values);
    for (int r = 0; r < rows.count; r += 32)
      for (int i = 0; i < count; i += 32)
        multiply_tiles(rows.q + r * dim, dim * 2, rows.keys + i * 2, kMostKeys * 4, dim / 32, false,
                       rows.scores + r * kMostKeys + i, kMostKeys * 4);
    softmax(c, rows, j, count);
    add_values(p, rows, count);
  });
  finish(c, rows);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA

#endif
