// attention on the CPU: flash-attention's blocks (Dao 2023, arXiv:2307.08691), turned on their side so that k and v are
// read as they lie and only a block of queries is ever transposed.
// task     kM rows, kN keys at a time (attention_rows.h)
// block    scores[key][row] = k · qᵀ: lanes are rows, so softmax is vertical, without a sum across a register.
//          out[dim][row] += vᵀ · weights: lanes are rows here too.
// tile     kR × kM sums in registers: in each step the registers of kM rows, times one broadcast number per key or
//          dimension.
// stack    q and out transposed, scores, and a block of k or v where it must be widened: 200 KiB at most.
// ISA      fp32 arithmetic; with AMX, bf16 goes another way (attention_tiles.h).
#include "llmkern/attention.h"

#include "../isa.h"
#include "attention_rows.h"
#include "attention_tiles.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kR = LLMKERN_ISA_LEVEL == 2 ? 6 : 4;  // kR · kC accumulators, kC operands, one broadcast number
constexpr int kN = 48;                              // a multiple of kR and of kLanes
constexpr int64_t kProductsPerThread = 1 << 20;     // below this, waking a thread costs more than it saves

struct Rows : Seen {
  alignas(64) float q[kMaxHeadDim * kM];    // [dim][row]
  alignas(64) float out[kMaxHeadDim * kM];  // [value_dim][row]
  alignas(64) float scores[kN * kM];        // [key][row], then the weights
  alignas(64) float widened[kN * kMaxHeadDim];
};

template <class T>
void start(const Call& c, Rows& rows) {
  start_softmax(c, rows);
  for (int r0 = 0; r0 < kM; r0 += kLanes)
    for (int64_t d = 0; d < c.p.dim; d += kLanes) {
      F32 square[kLanes];
      for (int r = 0; r < kLanes; ++r) square[r] = load_at_most(query_at<T>(c.p, rows, r0 + r) + d, c.p.dim - d);
      transpose(square);
      const int n = c.p.dim - d < kLanes ? c.p.dim - d : kLanes;
      for (int i = 0; i < n; ++i) store(rows.q + (d + i) * kM + r0, square[i]);
    }
  std::memset(rows.out, 0, c.p.value_dim * kM * sizeof(float));
}

// `count` vectors in fp32: themselves, or widened.
template <class T>
inline const float* in_fp32(const T* from, int64_t& stride, int count, int64_t dim, float* widened) {
  if constexpr (sizeof(T) == 4) {
    return from;
  } else {
    const int64_t to_stride = (dim + kLanes - 1) / kLanes * kLanes;
    for (int j = 0; j < count; ++j)
      for (int64_t d = 0; d < dim; d += kLanes)
        store(widened + j * to_stride + d, load_at_most(from + j * stride + d, dim - d));
    stride = to_stride;
    return widened;
  }
}

// to[i][r] = to[i][r] · keep[r] + Σ_step  from[i · from_stride + step · from_step] · with[step][r], for kTile i's and
// kM rows r.
template <int kTile, bool kAdd>
inline void tile(const float* from, int64_t from_stride, int64_t from_step, const float* with, int64_t steps,
                 const F32 (&keep)[kC], float* to) {
  F32 acc[kTile][kC] = {};
  for (int64_t step = 0; step < steps; ++step) {
    F32 row[kC];
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) row[c] = load(with + step * kM + c * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      const F32 number = broadcast(from[i * from_stride + step * from_step]);
#pragma GCC unroll 4
      for (int c = 0; c < kC; ++c) acc[i][c] += number * row[c];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      float* at = to + i * kM + c * kLanes;
      // Added at the end, not begun with: sums of blocks, each of few numbers, round less than one long sum.
      store(at, kAdd ? load(at) * keep[c] + acc[i][c] : acc[i][c]);
    }
}

template <int kTile, bool kAdd>
inline void rest(int count, const float* from, int64_t from_stride, int64_t from_step, const float* with, int64_t steps,
                 const F32 (&keep)[kC], float* to) {
  if constexpr (kTile > 0) {
    if (count == kTile) return tile<kTile, kAdd>(from, from_stride, from_step, with, steps, keep, to);
    rest<kTile - 1, kAdd>(count, from, from_stride, from_step, with, steps, keep, to);
  }
}

template <class T>
void multiply_keys(Rows& rows, const T* from, int64_t k_stride, int count, int64_t dim) {
  const float* k = in_fp32(from, k_stride, count, dim, rows.widened);
  const F32 none[kC] = {};
  int j = 0;
  for (; j + kR <= count; j += kR)
    tile<kR, false>(k + j * k_stride, k_stride, 1, rows.q, dim, none, rows.scores + j * kM);
  rest<kR - 1, false>(count - j, k + j * k_stride, k_stride, 1, rows.q, dim, none, rows.scores + j * kM);
}

template <class T>
void add_values(Rows& rows, const T* from, int64_t v_stride, int count, int64_t dim, const F32 (&keep)[kC]) {
  const float* v = in_fp32(from, v_stride, count, dim, rows.widened);
  int64_t d = 0;
  for (; d + kR <= dim; d += kR) tile<kR, true>(v + d, 1, v_stride, rows.scores, count, keep, rows.out + d * kM);
  rest<kR - 1, true>(dim - d, v + d, 1, v_stride, rows.scores, count, keep, rows.out + d * kM);
}

// Scales the scores and adds a mask that differs between rows: squares of kLanes rows and keys, read along the keys.
void add_mask(const Call& c, Rows& rows, int64_t j0, int count, F32 scale) {
  for (int r0 = 0; r0 < rows.count; r0 += kLanes)
    for (int j = 0; j < count; j += kLanes) {
      const int n = count - j < kLanes ? count - j : kLanes;
      F32 square[kLanes];
      for (int r = 0; r < kLanes; ++r) square[r] = bias(c.p, rows.mask_at[r0 + r], j0 + j, n);
      transpose(square);
      for (int l = 0; l < n; ++l) {
        float* s = rows.scores + (j + l) * kM + r0;
        store(s, load(s) * scale + square[l]);
      }
    }
}

// The largest of `count` scores, a row's in each lane, NaN left out: it comes back with its weight.
inline F32 largest(const float* scores, int count) {
  F32 top[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  for (int j = 0; j < count; ++j) {
    const F32 score = load(scores + j * kM);
    top[j % 2] = score > top[j % 2] ? score : top[j % 2];
  }
  return top[0] > top[1] ? top[0] : top[1];
}

// e^(scores · factor - shift) takes the place of `count` scores; returns their sum.
inline F32 weigh(float* scores, int count, F32 factor, F32 shift) {
  F32 total[2] = {};
  for (int j = 0; j < count; ++j) {
    const F32 weight = exp_or_0(load(scores + j * kM) * factor - shift);
    total[j % 2] += weight;
    store(scores + j * kM, weight);
  }
  return total[0] + total[1];
}

// scores → weights of keys [j0, j0 + count); keep is what the rows' sums so far are to be multiplied with.
void softmax(const Call& c, Rows& rows, int64_t j0, int count, bool by_key, F32 (&keep)[kC]) {
  const AttentionParams& p = c.p;
  const bool by_row = p.mask && !c.mask_by_key;
  const bool all_see = j0 >= rows.every_first && j0 + count - 1 <= rows.every_last;
  const bool simple = !by_row && p.softcap <= 0.0f;
  const F32 scale = broadcast(p.sm_scale), one = broadcast(1.0f);
  if (p.softcap > 0.0f) {
    const F32 cap = broadcast(p.softcap);
    for (int i = 0; i < count * kM; i += kLanes)
      store(rows.scores + i, tanh(load(rows.scores + i) * scale / cap) * cap);
  }
  if (by_row) add_mask(c, rows, j0, count, p.softcap > 0.0f ? one : scale);
  // Scores that nothing but the scale changes are left as they are: the largest stays it.
  const bool as_they_are = simple && !by_key && all_see && p.sm_scale > 0.0f;
  const F32 factor = as_they_are ? scale : one;
  for (int i = 0; i < kC; ++i) {
    float* s = rows.scores + i * kLanes;
    if (!as_they_are) {
      S32 first, last;
      std::memcpy(&first, rows.first + i * kLanes, sizeof(first));
      std::memcpy(&last, rows.last + i * kLanes, sizeof(last));
      for (int j = 0; j < count; ++j) {
        F32 score = load(s + j * kM);
        if (simple) score *= scale;
        if (by_key) score += broadcast(rows.key_bias[j]);
        if (!all_see) {
          const S32 key = S32{} + static_cast<int32_t>(j0 + j);
          score = (key >= first) & (key <= last) ? score : broadcast(-kInfinity);
        }
        store(s + j * kM, score);
      }
    }
    const F32 before = load(rows.top + i * kLanes), here = largest(s, count) * factor;
    const F32 top = here > before ? here : before;
    const F32 shift = top == -kInfinity ? F32{} : top;
    keep[i] = exp_or_0(before - shift);
    const F32 total = weigh(s, count, factor, shift);
    store(rows.total + i * kLanes, load(rows.total + i * kLanes) * keep[i] + total);
    store(rows.top + i * kLanes, top);
  }
}

template <class T>
void finish(const Call& c, Rows& rows) {
  const AttentionParams& p = c.p;
  for (int r0 = 0; r0 < rows.count; r0 += kLanes) {
    const F32 factor = finish_softmax(p, rows, r0, load(rows.total + r0));
    for (int64_t d = 0; d < p.value_dim; d += kLanes) {
      F32 square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = d + i < p.value_dim ? load(rows.out + (d + i) * kM + r0) * factor : F32{};
      transpose(square);
      for (int r = 0; r < kLanes && r0 + r < rows.count; ++r)
        store_at_most(out_at<T>(p, rows, r0 + r) + d, square[r], p.value_dim - d);
    }
  }
}

template <class T>
void run(const Call& c, Rows& rows) {
  const AttentionParams& p = c.p;
  start<T>(c, rows);
  const bool by_key = p.key_padding || c.mask_by_key;
  const T* k = static_cast<const T*>(p.k) + p.k_strides.offset(rows.batch, rows.head, 0);
  const T* v = static_cast<const T*>(p.v) + p.v_strides.offset(rows.batch, rows.head, 0);
  for (int64_t j = rows.some_first; j <= rows.some_last; j += kN) {
    const int count = rows.some_last - j + 1 < kN ? rows.some_last - j + 1 : kN;
    if (j + count <= rows.some_last) fetch_keys<T>(p, rows, j + count);
    if (by_key && !set_key_bias(c, rows, j, count)) continue;
    multiply_keys(rows, k + j * p.k_strides.position, p.k_strides.position, count, p.dim);
    F32 keep[kC];
    softmax(c, rows, j, count, by_key, keep);
    add_values(rows, v + j * p.v_strides.position, p.v_strides.position, count, p.value_dim, keep);
  }
  finish<T>(c, rows);
}

inline void run(const Call& c, Rows& rows) {
  with_type(c.p.dtype, [&]<class T>() { run<T>(c, rows); });
}

template <class RowsOfTask>
void tasks(const Call& c, int64_t begin, int64_t end) {
  RowsOfTask rows;
  for (int64_t at = begin; at < end; ++at) {
    static_cast<Task&>(rows) = c.task(at);
    if (at + 1 < end)
      with_type(c.p.dtype, [&]<class T>() {
        const Task next = c.task(at + 1);
        fetch_queries<T>(c, next);
        if (next.head != rows.head || next.batch != rows.batch) fetch_keys<T>(c.p, next, 0);
      });
    run(c, rows);
  }
}

}  // namespace

void attention(const AttentionParams& p, const Threads& threads) {
  const Call c{p};
  const int64_t products = kM * (p.keys + 1) * (p.dim + p.value_dim);
  threads.parallel_for(p.batch * p.kv_heads * c.blocks, kProductsPerThread / products + 1,
                       [&](int64_t begin, int64_t end) {
#ifdef __AMX_BF16__
                         if (p.dtype == DType::bf16) {
                           Tiles::begin();
                           tasks<TileRows>(c, begin, end);
                           return Tiles::end();
                         }
#endif
                         tasks<Rows>(c, begin, end);
                       });
}

}  // namespace llmkern::LLMKERN_ISA

#if LLMKERN_ISA_LEVEL == 0
int64_t llmkern::attention_workspace_bytes(const AttentionParams&) {
  return 0;
}
#endif

LLMKERN_PRODUCTS_LAUNCHER(attention, AttentionParams)
