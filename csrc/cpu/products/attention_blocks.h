// attention's blocks on the CPU: flash-attention's blocks (Dao 2023, arXiv:2307.08691), turned on their side so that k
// and v are read as they lie and only a block of queries is ever transposed. task     kM rows, kN keys at a time
// (attention_rows.h) block    scores[key][row] = k · qᵀ: lanes are rows, so softmax is vertical, without a sum across a
// register.
//          out[dim][row] += vᵀ · weights: lanes are rows here too.
// tile     kSums registers of sums: in each step the registers of the task's rows, 1 to kC, times one broadcast number
//          per key or dimension.
// stack    q and out transposed, scores, and a block of k or v where it is not multiplied as it lies: 200 KiB at most.
// ISA      fp32 arithmetic; bf16 by pairs with AVX512-BF16, and another way with AMX (attention_tiles.h).
#pragma once

#include "attention_pairs.h"
#include "attention_rows.h"
#include "attention_tiles.h"
#include "schemes.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kSums = kRegisters == 32 ? 24 : 12;  // in registers, beside kC operands and one broadcast number
constexpr int kN = 48;                             // a multiple of kLanes
constexpr int64_t kProductsPerThread = 1 << 20;    // below this, waking a thread costs more than it saves

// Products of a task whose rows see all keys.
inline int64_t products_of_task(const AttentionParams& p) {
  return kM * (p.keys + 1) * (p.dim + p.value_dim);
}

// Lanes are the scheme's: fp32 numbers, or pairs of bf16 along what is summed up.
template <class Scheme>
struct Rows : Seen {
  static constexpr int kPair = Scheme::kPerLane;
  static constexpr int kMostLanes = kMaxHeadDim / kPair;

  alignas(64) uint32_t q[kMostLanes * kM];               // [dim / kPair][row]
  alignas(64) float out[kMaxHeadDim * kM];               // [value_dim][row]
  alignas(64) float scores[kN * kM];                     // [key][row]; then the weights, as lanes [key / kPair][row]
  alignas(64) uint32_t block[kN * kMaxHeadDim / kPair];  // of k or v, where it does not lie as it is to be multiplied
};

template <class T, class Scheme>
void start(const Call& c, Rows<Scheme>& rows) {
  start_softmax(c, rows);
  for (int r0 = 0; r0 < rows.count; r0 += kLanes)
    for (int64_t d = 0; d < c.p.dim; d += Scheme::kStep) {
      U32 square[kLanes];
      for (int r = 0; r < kLanes; ++r)
        square[r] = bits_as<U32>(Scheme::load_part(query_at<T>(c.p, rows, r0 + r) + d, c.p.dim - d));
      transpose(square);
      const int64_t left = (c.p.dim - d + Scheme::kPerLane - 1) / Scheme::kPerLane;
      const int n = left < kLanes ? left : kLanes;
      for (int i = 0; i < n; ++i)
        std::memcpy(rows.q + (d / Scheme::kPerLane + i) * kM + r0, &square[i], sizeof(square[i]));
    }
  std::memset(rows.out, 0, c.p.value_dim * kM * sizeof(float));
}

// Numbers as lanes: number i of step s at `lanes` + i · stride + s · step, in bytes.
struct Numbers {
  const char* lanes;
  int64_t stride, step;
};

// `count` vectors as they lie, or where their lanes are not numbers of the scheme, or not whole, a copy with
// them.
template <class Scheme, class T>
inline Numbers vectors(const T* from, int64_t stride, int count, int64_t dim, uint32_t* copy) {
  if (sizeof(T) * Scheme::kPerLane == 4 && dim % Scheme::kPerLane == 0)
    return {reinterpret_cast<const char*>(from), stride * static_cast<int64_t>(sizeof(T)), 4};
  const int64_t width = (dim + Scheme::kStep - 1) / Scheme::kStep * kLanes;
  for (int j = 0; j < count; ++j)
    for (int64_t d = 0; d < dim; d += Scheme::kStep) {
      const Bytes lanes = Scheme::load_part(from + j * stride + d, dim - d);
      std::memcpy(copy + j * width + d / Scheme::kPerLane, &lanes, sizeof(lanes));
    }
  return {reinterpret_cast<const char*>(copy), width * 4, 4};
}

// to[i][r] = to[i][r] · keep[r] + Σ_step  from(i, step) · with[step][r], for kTile i's and kRegisters of rows r.
template <class Scheme, int kTile, int kRegisters, bool kAdd>
__attribute__((noinline)) void tile(const Numbers& from, const void* with, int64_t steps, const F32 (&keep)[kC],
                                    float* to) {
  F32 acc[kTile][kRegisters] = {};
  for (int64_t step = 0; step < steps; ++step) {
    Bytes row[kRegisters];
#pragma GCC unroll 4
    for (int c = 0; c < kRegisters; ++c)
      row[c] = load_bytes(static_cast<const char*>(with) + (step * kM + c * kLanes) * sizeof(float));
#pragma GCC unroll 24
    for (int i = 0; i < kTile; ++i) {
      const Bytes number = broadcast_lane(from.lanes + i * from.stride + step * from.step);
#pragma GCC unroll 4
      for (int c = 0; c < kRegisters; ++c) acc[i][c] = Scheme::multiply(row[c], number, acc[i][c]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < kRegisters; ++c) {
      float* at = to + i * kM + c * kLanes;
      // Added at the end, not begun with: sums of blocks, each of few numbers, round less than one long sum.
      store(at, kAdd ? load(at) * keep[c] + acc[i][c] : acc[i][c]);
    }
}

// `count` i's, by tiles of kTile, and what is left by smaller ones.
template <class Scheme, int kTile, int kRegisters, bool kAdd>
inline void tiles(int64_t count, Numbers from, const void* with, int64_t steps, const F32 (&keep)[kC], float* to) {
  for (; count >= kTile; count -= kTile, from.lanes += kTile * from.stride, to += kTile * kM)
    tile<Scheme, kTile, kRegisters, kAdd>(from, with, steps, keep, to);
  if constexpr (kTile > 1) tiles<Scheme, kTile / 2, kRegisters, kAdd>(count, from, with, steps, keep, to);
}

// As many registers of rows as the task has; the fewer they are the more i's a tile has.
template <class Scheme, bool kAdd, int kRegisters = kC>
inline void multiply(int registers, int64_t count, const Numbers& from, const void* with, int64_t steps,
                     const F32 (&keep)[kC], float* to) {
  if constexpr (kRegisters > 1)
    if (registers < kRegisters)
      return multiply<Scheme, kAdd, kRegisters - 1>(registers, count, from, with, steps, keep, to);
  tiles<Scheme, kSums / kRegisters, kRegisters, kAdd>(count, from, with, steps, keep, to);
}

template <class Scheme, class T>
void multiply_keys(Rows<Scheme>& rows, const T* k, int64_t stride, int count, int64_t dim) {
  const Numbers keys = vectors<Scheme>(k, stride, count, dim, rows.block);
  multiply<Scheme, false>(rows.registers(), count, keys, rows.q, (dim + Scheme::kPerLane - 1) / Scheme::kPerLane, {},
                          rows.scores);
}

template <class Scheme, class T>
void add_values(Rows<Scheme>& rows, const T* v, int64_t stride, int count, int64_t dim, const F32 (&keep)[kC]) {
  const int steps = (count + Scheme::kPerLane - 1) / Scheme::kPerLane;
  Numbers values;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<Scheme, Bf16>) {
    pair_vectors(v, stride, count, dim, steps, reinterpret_cast<BFloat16*>(rows.block));
    values = {reinterpret_cast<const char*>(rows.block), padded_to_pairs(dim) * 4, 4};
  }
#endif
  if constexpr (std::is_same_v<Scheme, Floats>) values = vectors<Scheme>(v, stride, count, dim, rows.block);
  multiply<Scheme, true>(rows.registers(), dim, {values.lanes, values.step, values.stride}, rows.scores, steps, keep,
                         rows.out);
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

// Weights, e^(scores · factor - shift), take the place of `count` scores, as the scheme's lanes; returns their sum.
template <class Scheme>
inline F32 weigh(float* scores, int count, F32 factor, F32 shift) {
  F32 total[2] = {};
  for (int j = 0; j < count; ++j) {
    const F32 weight = exp_or_0(load(scores + j * kM) * factor - shift);
    total[j % 2] += weight;
    store(scores + j * kM, weight);
  }
  return total[0] + total[1];
}

#ifdef __AVX512BF16__
template <>
inline F32 weigh<Bf16>(float* scores, int count, F32 factor, F32 shift) {
  const F32 to_base_2 = broadcast(0x1.715476p0f);
  F32 total[2] = {};
  for (int j = 0; j < count; j += 2) {
    const auto weight = [&](int i) {
      return i < count ? exp2_or_0((load(scores + i * kM) * factor - shift) * to_base_2) : F32{};
    };
    const F32 first = weight(j), second = weight(j + 1);
    total[0] += first, total[1] += second;
    const Bytes lanes = pairs_of(first, second);
    std::memcpy(scores + j / 2 * kM, &lanes, sizeof(lanes));
  }
  return total[0] + total[1];
}
#endif

// scores → weights of keys [j0, j0 + count); keep is what the rows' sums so far are to be multiplied with.
template <class Scheme>
void softmax(const Call& c, Rows<Scheme>& rows, int64_t j0, int count, F32 (&keep)[kC]) {
  const AttentionParams& p = c.p;
  const bool all_see = j0 >= rows.every_first && j0 + count - 1 <= rows.every_last;
  const bool simple = !c.by_row && p.softcap <= 0.0f;
  const F32 scale = broadcast(p.sm_scale), one = broadcast(1.0f);
  if (p.softcap > 0.0f) {
    const F32 cap = broadcast(p.softcap);
    for (int j = 0; j < count; ++j)
      for (int i = 0; i < rows.registers(); ++i) {
        float* const s = rows.scores + j * kM + i * kLanes;
        store(s, tanh(load(s) * scale / cap) * cap);
      }
  }
  if (c.by_row) add_by_row(c, rows, rows.scores, j0, count, p.softcap > 0.0f ? one : scale);
  // Scores that nothing but the scale changes are left as they are: the largest stays it.
  const bool as_they_are = simple && !c.by_key && all_see && p.sm_scale > 0.0f;
  const F32 factor = as_they_are ? scale : one;
  for (int i = 0; i < rows.registers(); ++i) {
    float* s = rows.scores + i * kLanes;
    if (!as_they_are) {
      S32 first, last;
      std::memcpy(&first, rows.first + i * kLanes, sizeof(first));
      std::memcpy(&last, rows.last + i * kLanes, sizeof(last));
      for (int j = 0; j < count; ++j) {
        F32 score = load(s + j * kM);
        if (simple) score *= scale;
        if (c.by_key) score += broadcast(rows.key_bias[j]);
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
    const F32 total = weigh<Scheme>(s, count, factor, shift);
    store(rows.total + i * kLanes, load(rows.total + i * kLanes) * keep[i] + total);
    store(rows.top + i * kLanes, top);
  }
}

template <class T, class Scheme>
void finish(const Call& c, Rows<Scheme>& rows) {
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

template <class T, class Scheme>
void run(const Call& c, Rows<Scheme>& rows) {
  const AttentionParams& p = c.p;
  start<T>(c, rows);
  for_blocks<T>(c, rows, kN, [&](int64_t j, const Keys<T>& keys) {
    multiply_keys(rows, keys.k, p.k_strides.position, keys.count, p.dim);
    F32 keep[kC];
    softmax(c, rows, j, keys.count, keep);
    add_values(rows, keys.v, p.v_strides.position, keys.count, p.value_dim, keep);
  });
  finish<T>(c, rows);
}

template <class T, class RowsOfTask>
void tasks(const Call& c, int64_t begin, int64_t end) {
  RowsOfTask rows;
  for (int64_t at = begin; at < end; ++at) {
    static_cast<Task&>(rows) = c.task(at);
    if (at + 1 < end) {
      const Task next = c.task(at + 1);
      fetch_queries<T>(c, next);
      if (next.head != rows.head || next.batch != rows.batch) fetch_keys<T>(c.p, next, 0);
    }
    run<T>(c, rows);
  }
}

template <class T>
void tasks_of(const Call& c, int64_t begin, int64_t end) {
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<T, BFloat16>) {
    Tiles::begin();
    tasks<T, TileRows>(c, begin, end);
    return Tiles::end();
  } else
#elif defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>)
    tasks<T, Rows<Bf16>>(c, begin, end);
  else
#endif
    tasks<T, Rows<Floats>>(c, begin, end);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
