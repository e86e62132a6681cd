// Shared parts of attention's blocks in either layout: the rows of a task, the keys that each of them sees, masks,
// and fetching ahead.
//   rows     The queries of a key head's group: row g is query g / group of the group's head g % group.
//   task     kM rows against all the keys that one of them sees, a block of keys at a time; nothing is shared between
//            tasks, so that a result does not depend on the number of threads.
#pragma once

#include "../math.h"
#include "../vec.h"
#include "llmkern/attention.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kC = kRegisters == 32 ? 4 : 2;  // registers of rows
constexpr int kM = kC * kLanes;
constexpr int kMostKeys = 64;  // of any block
constexpr float kInfinity = __builtin_inff();

// kM rows of a key head, perhaps fewer.
struct Task {
  int64_t batch, head, first_row;
  int count;

  int registers() const { return (count + kLanes - 1) / kLanes; }
};

// State of a task's rows, for either layout of its blocks.
struct Seen : Task {
  int64_t of_head[kM], of_query[kM];      // what its rows are; beyond the last the last one again, not to be used
  int32_t first[kM], last[kM];            // keys that each sees; none where first > last
  int64_t mask_at[kM], bias_at[kM];       // where their rows of the mask and of the bias begin, in elements
  float slope[kM];                        // their heads'
  int32_t some_first, some_last;          // that some row sees
  int32_t every_first, every_last;        // that every row sees
  alignas(64) float top[kM], total[kM];   // of the online softmax
  alignas(64) float key_bias[kMostKeys];  // added to a key's scores in every row
};

struct Call {
  const AttentionParams& p;
  int64_t group = p.heads / p.kv_heads;
  int64_t rows = group * p.queries;
  int64_t blocks = (rows + kM - 1) / kM;
  // Additions to scores, the same for all rows of a task or by row.
  bool mask_by_key = p.mask && is_by_key(p.mask_strides), mask_by_row = p.mask && !mask_by_key;
  bool bias_by_key = p.bias && is_by_key(p.bias_strides), bias_by_row = p.bias && !bias_by_key;
  bool slopes_by_key = p.slopes && group == 1, slopes_by_row = p.slopes && group > 1;
  bool by_key = p.key_padding || mask_by_key || bias_by_key || slopes_by_key;
  bool by_row = mask_by_row || bias_by_row || slopes_by_row;

  bool is_by_key(const ScoreStrides& strides) const { return strides.query == 0 && (strides.head == 0 || group == 1); }

  // f(r, head, query) for a task's rows; a division for each would take longer than some tasks.
  template <class F>
  void for_rows(const Task& task, const F& f) const {
    int64_t query = task.first_row / group, member = task.first_row % group;
    for (int r = 0; r < task.count; ++r) {
      f(r, task.head * group + member, query);
      if (++member == group) member = 0, ++query;
    }
  }

  Task task(int64_t at) const {
    // The first block, the last, the second, the last but one: neighbours' work sums up alike under causality.
    const int64_t i = at % blocks, block = i % 2 ? blocks - 1 - i / 2 : i / 2;
    return {at / blocks / p.kv_heads, at / blocks % p.kv_heads, block * kM,
            static_cast<int>(rows - block * kM < kM ? rows - block * kM : kM)};
  }
};

// Brings `count` vectors near: where a head's are far apart no hardware sees what comes next.
template <class T>
inline void fetch(const T* from, int64_t stride, int64_t count, int64_t dim) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + j * stride + d);
}

// `count` keys and values that lie behind each other.
template <class T>
struct Keys {
  const T *k, *v;
  int count;
};

// The keys from `first` on, at most `most` of them, and of a paged cache those of one page.
template <class T>
Keys<T> keys_from(const AttentionParams& p, const Task& task, int64_t first, int64_t most) {
  int64_t cell = task.batch, slot = first, count = p.keys - first < most ? p.keys - first : most;
  if (p.block_table && count > 0) {
    const int64_t block = p.block_table[first / p.block_size * p.table_stride];
    cell = block < 0 ? 0 : block >= p.blocks ? p.blocks - 1 : block;
    slot = first % p.block_size;
    count = count < p.block_size - slot ? count : p.block_size - slot;
  }
  return {static_cast<const T*>(p.k) + p.k_strides.offset(cell, task.head, slot),
          static_cast<const T*>(p.v) + p.v_strides.offset(cell, task.head, slot), static_cast<int>(count)};
}

template <class T>
void fetch_keys(const AttentionParams& p, const Task& task, int64_t first) {
  const Keys<T> keys = keys_from<T>(p, task, first, kMostKeys);
  fetch(keys.k, p.k_strides.position, keys.count, p.dim);
  fetch(keys.v, p.v_strides.position, keys.count, p.value_dim);
}

template <class T>
void fetch_queries(const Call& c, const Task& task) {
  const AttentionParams& p = c.p;
  c.for_rows(task, [&](int, int64_t head, int64_t query) {
    fetch(static_cast<const T*>(p.q) + p.q_strides.offset(task.batch, head, query), 0, 1, p.dim);
  });
}

// Set the range of keys that the rows see, by causality and window.
inline void set_limits(const Call& c, Seen& rows) {
  const AttentionParams& p = c.p;
  const int64_t right = p.causal ? 0 : p.window_right;
  rows.some_first = INT32_MAX, rows.some_last = -1, rows.every_first = 0, rows.every_last = INT32_MAX;
  for (int r = 0; r < kM; ++r) {
    const int64_t position = rows.of_query[r] + p.keys - p.queries;
    int64_t first = p.window_left >= 0 ? position - p.window_left : 0;
    int64_t last = right >= 0 ? position + right : p.keys - 1;
    first = first < 0 ? 0 : first;
    last = last >= p.keys ? p.keys - 1 : last;
    if (r >= rows.count || first > last) first = p.keys, last = -1;
    rows.first[r] = first, rows.last[r] = last;
    if (r >= rows.count) continue;
    rows.some_first = rows.first[r] < rows.some_first ? rows.first[r] : rows.some_first;
    rows.some_last = rows.last[r] > rows.some_last ? rows.last[r] : rows.some_last;
    rows.every_first = rows.first[r] > rows.every_first ? rows.first[r] : rows.every_first;
    rows.every_last = rows.last[r] < rows.every_last ? rows.last[r] : rows.every_last;
  }
}

inline float number_at(DType dtype, const void* p, int64_t i) {
  return with_type(dtype, [&]<class T>() { return load_first(static_cast<const T*>(p) + i, 1)[0]; });
}

// Set up the rows and the keys that they see, with the softmax over the sink alone.
inline void start_softmax(const Call& c, Seen& rows) {
  const AttentionParams& p = c.p;
  c.for_rows(rows, [&](int r, int64_t head, int64_t query) { rows.of_head[r] = head, rows.of_query[r] = query; });
  for (int r = rows.count; r < kM; ++r)
    rows.of_head[r] = rows.of_head[rows.count - 1], rows.of_query[r] = rows.of_query[rows.count - 1];
  set_limits(c, rows);
  for (int r = 0; r < kM; ++r) {
    const auto row_of = [&](const ScoreStrides& s) {
      return rows.batch * s.batch + rows.of_head[r] * s.head + rows.of_query[r] * s.query;
    };
    rows.mask_at[r] = row_of(p.mask_strides), rows.bias_at[r] = row_of(p.bias_strides);
    rows.slope[r] = p.slopes ? number_at(p.slopes_dtype, p.slopes, rows.of_head[r]) : 0.0f;
    rows.top[r] = -kInfinity;
    rows.total[r] = 0.0f;
    if (!p.sinks || r >= rows.count) continue;
    const float sink = number_at(p.sinks_dtype, p.sinks, rows.of_head[r]);
    if (sink > -kInfinity) rows.top[r] = sink;  // not NaN
    rows.total[r] = exp(broadcast(sink == -kInfinity ? sink : sink - rows.top[r]))[0];
  }
}

template <class T>
inline const T* query_at(const AttentionParams& p, const Seen& rows, int r) {
  return static_cast<const T*>(p.q) + p.q_strides.offset(rows.batch, rows.of_head[r], rows.of_query[r]);
}

template <class T>
inline T* out_at(const AttentionParams& p, const Seen& rows, int r) {
  return static_cast<T*>(p.out) + p.out_strides.offset(rows.batch, rows.of_head[r], rows.of_query[r]);
}

// n <= kLanes numbers, `step` elements apart.
template <class M>
inline F32 numbers_at(const M* p, int64_t step, int n) {
  if (step == 1) return load_at_most(p, n);
  M few[kLanes] = {};
  for (int l = 0; l < n; ++l) few[l] = p[l * step];
  return load(few);
}

// Return the addition of the mask's row r to n <= kLanes scores from key j on: 0 or −infinity for a bool mask.
inline F32 mask_of(const AttentionParams& p, const Seen& rows, int r, int64_t j, int n) {
  const int64_t step = p.mask_strides.key, at = rows.mask_at[r] + j * step;
  if (p.mask_is_bool) {
    const F32 seen = numbers_at(static_cast<const int8_t*>(p.mask) + at, step, n);
    return seen != 0.0f ? F32{} : broadcast(-kInfinity);
  }
  return with_type(p.mask_dtype, [&]<class M>() { return numbers_at(static_cast<const M*>(p.mask) + at, step, n); });
}

inline F32 bias_of(const AttentionParams& p, const Seen& rows, int r, int64_t j, int n) {
  const int64_t step = p.bias_strides.key, at = rows.bias_at[r] + j * step;
  return with_type(p.bias_dtype, [&]<class B>() { return numbers_at(static_cast<const B*>(p.bias) + at, step, n); });
}

inline F32 slope_of(const AttentionParams& p, const Seen& rows, int r, int64_t j) {
  const S32 distance = lane_numbers() + static_cast<int32_t>(j + 1 - p.keys);
  return __builtin_convertvector(distance, F32) * rows.slope[r];
}

// Return the addition to the scores of row r alone, for n <= kLanes keys from j on.
inline F32 added_by_row(const Call& c, const Seen& rows, int r, int64_t j, int n) {
  F32 added = c.mask_by_row ? mask_of(c.p, rows, r, j, n) : F32{};
  if (c.bias_by_row) added += bias_of(c.p, rows, r, j, n);
  if (c.slopes_by_row) added += slope_of(c.p, rows, r, j);
  return added;
}

// Scales the scores, [key][row], and adds what differs between rows: squares of kLanes rows and keys, read along the
// keys.
inline void add_by_row(const Call& c, Seen& rows, float* scores, int64_t j0, int count, F32 scale) {
  for (int r0 = 0; r0 < rows.count; r0 += kLanes)
    for (int j = 0; j < count; j += kLanes) {
      const int n = count - j < kLanes ? count - j : kLanes;
      F32 square[kLanes];
      for (int r = 0; r < kLanes; ++r) square[r] = added_by_row(c, rows, r0 + r, j0 + j, n);
      transpose(square);
      for (int l = 0; l < n; ++l) {
        float* s = scores + (j + l) * kM + r0;
        store(s, load(s) * scale + square[l]);
      }
    }
}

// Fills key_bias for keys [j0, j0 + count); false where no row sees any of them.
inline bool set_key_bias(const Call& c, Seen& rows, int64_t j0, int count) {
  const AttentionParams& p = c.p;
  bool any = false;
  for (int j = 0; j < count; j += kLanes) {
    const int n = count - j < kLanes ? count - j : kLanes;
    F32 added = c.mask_by_key ? mask_of(p, rows, 0, j0 + j, n) : F32{};
    if (c.bias_by_key) added += bias_of(p, rows, 0, j0 + j, n);
    if (c.slopes_by_key) added += slope_of(p, rows, 0, j0 + j);
    for (int l = 0; l < n; ++l) {
      const bool real =
          !p.key_padding || p.key_padding[rows.batch * p.padding_strides.batch + (j0 + j + l) * p.padding_strides.key];
      rows.key_bias[j + l] = real ? added[l] : -kInfinity;
      any |= rows.key_bias[j + l] != -kInfinity;
    }
  }
  return any;
}

// f(j, keys from j on) for blocks of at most `most` keys that some row sees; meanwhile the next ones are fetched.
template <class T, class F>
inline void for_blocks(const Call& c, Seen& rows, int64_t most, const F& f) {
  for (int64_t j = rows.some_first; j <= rows.some_last;) {
    const int64_t left = rows.some_last - j + 1;
    const Keys<T> keys = keys_from<T>(c.p, rows, j, left < most ? left : most);
    const int64_t here = j;
    j += keys.count;
    if (j <= rows.some_last) fetch_keys<T>(c.p, rows, j);
    if (c.by_key && !set_key_bias(c, rows, here, keys.count)) continue;
    f(here, keys);
  }
}

// Return the reciprocals that normalise the rows' sums; writes the log-sum-exp of the rows if wanted.
inline F32 finish_softmax(const AttentionParams& p, const Seen& rows, int r0, F32 total) {
  for (int r = 0; p.lse && r < kLanes && r0 + r < rows.count; ++r)
    p.lse[p.lse_at(rows.batch, rows.of_head[r0 + r], rows.of_query[r0 + r])] =
        total[r] == 0.0f ? -kInfinity : rows.top[r0 + r] + __builtin_logf(total[r]);
  return 1.0f / (total == 0.0f ? broadcast(1.0f) : total);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
