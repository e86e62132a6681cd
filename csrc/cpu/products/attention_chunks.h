// attention_decode's chunks on the CPU: every key and value is read once, where it lies, for all queries of its head's
// group. rows     The group's queries: row r is query head hk · group + r / queries, query r % queries.  They are kept
// in the
//          workspace as they are multiplied, with what they collect: the output and the online softmax's maximum and
//          sum.
// task     kChunk keys of one key head.  The chunks of a sequence are put together in order, whoever computed them, so
//          that a result does not depend on the number of threads.
// block    Up to kBlock keys of a chunk, not beyond a page's end: scores, softmax and weighted values for kRows rows at
//          a time, while the block's keys and values are in the cache.
// ISA      A score is kLanes sums over the dimensions, added up for four keys together, in fp32: of bf16 by pairs with
//          AVX512-BF16.  int8 codes are widened in registers, and their scales multiply scores and weights.
#pragma once

#include "../math.h"
#include "llmkern/attention_decode.h"
#include "schemes.h"

namespace llmkern::LLMKERN_ISA {
namespace {
namespace decoding {  // beside attention_blocks.h, whose tasks are others

constexpr int kBlock = 64;
constexpr int kRows = kRegisters == 32 ? 4 : 2;
constexpr int kVectors = kRegisters == 32 ? 4 : 2;  // of a row's output, in registers
constexpr int kKeys = 4;                            // whose scores are added up together
constexpr int64_t kChunk = 128;
constexpr int64_t kElementsPerThread = 32768;  // of the cache; below this, waking a thread costs more than it saves
constexpr float kInfinity = __builtin_inff();

typedef float F4 __attribute__((vector_size(16)));

constexpr int64_t to_lines(int64_t floats) {
  return (floats + 15) / 16 * 16;
}

// The call, with what every task derives from it.
struct Call {
  const AttentionDecodeParams& p;
  int64_t group = p.heads / p.kv_heads;
  int64_t rows = group * p.queries;
  int64_t capacity = p.capacity();
  int64_t most_chunks = capacity > kChunk ? (capacity + kChunk - 1) / kChunk : 1;
  int64_t q_floats = to_lines(p.dim), out_floats = to_lines(p.value_dim);
  int64_t task_floats = to_lines(rows * (q_floats + out_floats + 2));

  int64_t length(int64_t b) const {
    if (!p.lengths) return capacity;
    const int64_t at = b * p.lengths_stride;
    const int64_t n =
        p.lengths_are_64 ? static_cast<const int64_t*>(p.lengths)[at] : static_cast<const int32_t*>(p.lengths)[at];
    return n < 0 ? 0 : n > capacity ? capacity : n;
  }

  // The first key that a query of a sequence of this length sees.
  int64_t first(int64_t length) const {
    const int64_t left = p.window_left < 0 ? 0 : length - p.queries - p.window_left;
    return left < 0 ? 0 : left;
  }

  int64_t chunks(int64_t length) const { return (length - first(length) + kChunk - 1) / kChunk; }
};

// A task's part of the workspace.
struct Task {
  float *q, *out, *top, *total;  // [rows, q_floats], [rows, out_floats], [rows], [rows]

  Task(const Call& c, int64_t head, int64_t chunk) {
    q = reinterpret_cast<float*>(c.p.workspace) + (head * c.most_chunks + chunk) * c.task_floats;
    out = q + c.rows * c.q_floats;
    top = out + c.rows * c.out_floats;
    total = top + c.rows;
  }
};

// The sums of four registers.
inline F4 sums(F32 a, F32 b, F32 c, F32 d) {
#if LLMKERN_ISA_LEVEL == 2
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const F32 abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const auto half = __builtin_shufflevector(abcd, abcd, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(abcd, abcd, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif LLMKERN_ISA_LEVEL == 1
  const F32 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return __builtin_shufflevector(abcd, abcd, 0, 1, 2, 3) + __builtin_shufflevector(abcd, abcd, 4, 5, 6, 7);
#else
  const F32 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const F32 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

// Fetch what is read next into the L2 cache: a core has more requests for that under way than for its L1 cache.
inline void fetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

// scores[r][j] = q[r] · k[j] for kR rows and `count` keys; up to the next multiple of kKeys the last key again.
// Vectors at `later`, which are read next, are fetched meanwhile.
template <class Scheme, int kR, class C>
inline void multiply(const float* q, int64_t q_floats, const C* k, int64_t k_stride, int count, int64_t dim,
                     const C* later, int64_t later_stride, float (*scores)[kBlock]) {
  for (int j = 0; j < count; j += kKeys) {
    const C* key[kKeys];
    for (int i = 0; i < kKeys; ++i) key[i] = k + (j + i < count ? j + i : count - 1) * k_stride;
    F32 acc[kR][kKeys] = {};
    const auto step = [&](int64_t d, const auto& load_key) {
      Bytes keys[kKeys];
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) {
        keys[i] = load_key(key[i] + d);
        fetch(later + (j + i) * later_stride + d);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) {
        const Bytes query = load_bytes(reinterpret_cast<const typename Scheme::Code*>(q + r * q_floats) + d);
#pragma GCC unroll 4
        for (int i = 0; i < kKeys; ++i) acc[r][i] = Scheme::multiply(keys[i], query, acc[r][i]);
      }
    };
    int64_t d = 0;
    for (; d + Scheme::kStep <= dim; d += Scheme::kStep) step(d, [](const C* p) { return Scheme::load(p); });
    if (const int n = dim - d; n > 0) step(d, [n](const C* p) { return Scheme::load_part(p, n); });
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      const F4 sum = sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
      std::memcpy(scores[r] + j, &sum, sizeof(sum));
    }
  }
}

// out[r][0, width) = out[r] · keep[r] + Σ_j weights[r][j] · v[j], kN registers of each row; fetches as multiply does.
template <int kR, int kN, class C, class Load>
inline void add_columns(const float (*weights)[kBlock], const float* keep, const C* v, int64_t v_stride, int count,
                        const C* later, int64_t later_stride, float* out, int64_t out_floats, const Load& load_value) {
  F32 acc[kR][kN] = {};  // a block's alone: sums of blocks round less than one long sum
  for (int j = 0; j < count; ++j) {
    F32 value[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      value[n] = load_value(v + j * v_stride + n * kLanes);
      fetch(later + j * later_stride + n * kLanes);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) acc[r][n] += broadcast(weights[r][j]) * value[n];
  }
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      float* at = out + r * out_floats + n * kLanes;
      store(at, load(at) * broadcast(keep[r]) + acc[r][n]);
    }
}

template <int kR, class C>
inline void add_values(const float (*weights)[kBlock], const float* keep, const C* v, int64_t v_stride, int count,
                       int64_t dim, const C* later, int64_t later_stride, float* out, int64_t out_floats) {
  const auto columns = [&]<int kN>(int64_t d, const auto& load_value) {
    add_columns<kR, kN>(weights, keep, v + d, v_stride, count, later + d, later_stride, out + d, out_floats,
                        load_value);
  };
  const auto whole = [](const C* p) { return load(p); };
  int64_t d = 0;
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes) columns.template operator()<kVectors>(d, whole);
  for (; d + kLanes <= dim; d += kLanes) columns.template operator()<1>(d, whole);
  if (const int n = dim - d; n > 0) columns.template operator()<1>(d, [n](const C* p) { return load_first(p, n); });
}

// Keys of one block: they lie behind each other at a stride, and stand at positions from `position` on.
template <class C>
struct Block {
  const C *k, *v;
  const float *k_scale, *v_scale;  // [count]; null for none
  int64_t position;
  int count;
};

// Rows [r0, r0 + kR) see the block.
template <class Scheme, int kR, class C>
void attend(const Call& c, const Task& task, const Block<C>& block, int64_t length, int64_t r0) {
  const AttentionDecodeParams& p = c.p;
  alignas(64) float scores[kR][kBlock];
  multiply<Scheme, kR>(task.q + r0 * c.q_floats, c.q_floats, block.k, p.k_strides.position, block.count, p.dim, block.v,
                       p.v_strides.position, scores);
  float keep[kR];
  for (int r = 0; r < kR; ++r) {
    // The keys that the query sees, counted from the block's first.
    const int64_t own = length - p.queries + (r0 + r) % p.queries - block.position;
    const int64_t first = p.window_left < 0 ? 0 : own - p.window_left;
    const int begin = first < 0 ? 0 : first > block.count ? block.count : static_cast<int>(first);
    const int end = own < 0 ? 0 : own >= block.count ? block.count : static_cast<int>(own + 1);
    float* s = scores[r];
    F32 most = broadcast(-kInfinity);
    for (int j = 0; j < block.count; j += kLanes) {
      F32 score = load(s + j) * broadcast(p.sm_scale);
      if (block.k_scale) score *= load(block.k_scale + j);
      if (p.softcap > 0.0f) score = tanh(score / broadcast(p.softcap)) * broadcast(p.softcap);
      const S32 at = lane_numbers() + j;
      score = (at >= begin) & (at < end) ? score : broadcast(-kInfinity);
      most = score > most ? score : most;  // a NaN stays out of the maximum, and comes back with its weight
      store(s + j, score);
    }
    float top = task.top[r0 + r];
    for (int i = 0; i < kLanes; ++i) top = most[i] > top ? most[i] : top;
    const float shift = top == -kInfinity ? 0.0f : top;
    F32 total = {};
    for (int j = 0; j < block.count; j += kLanes) {
      F32 weight = exp_or_0(load(s + j) - broadcast(shift));
      total += weight;
      if (block.v_scale) weight *= load(block.v_scale + j);
      store(s + j, weight);
    }
    keep[r] = exp_or_0(broadcast(task.top[r0 + r] - shift))[0];
    task.total[r0 + r] = task.total[r0 + r] * keep[r] + sum(total);
    task.top[r0 + r] = top;
  }
  add_values<kR>(scores, keep, block.v, p.v_strides.position, block.count, p.value_dim,
                 block.k + block.count * p.k_strides.position, p.k_strides.position, task.out + r0 * c.out_floats,
                 c.out_floats);
}

template <class Scheme, class C>
void attend(const Call& c, const Task& task, const Block<C>& block, int64_t length) {
  int64_t r = 0;
  for (; r + kRows <= c.rows; r += kRows) attend<Scheme, kRows>(c, task, block, length, r);
  if constexpr (kRows > 2) {
    if (c.rows - r == 3) attend<Scheme, 3>(c, task, block, length, r);
    if (c.rows - r == 2) attend<Scheme, 2>(c, task, block, length, r);
  }
  if (c.rows - r == 1) attend<Scheme, 1>(c, task, block, length, r);
}

// The keys [begin, end) of sequence b, block by block.
template <class Scheme, class C>
void run(const Call& c, const Task& task, int64_t b, int64_t head, int64_t length, int64_t begin, int64_t end) {
  const AttentionDecodeParams& p = c.p;
  alignas(64) float k_scale[kBlock] = {}, v_scale[kBlock] = {};
  while (begin < end) {
    int64_t cell = b, slot = begin, count = end - begin;
    if (p.block_table) {
      const int64_t entry = p.block_table[b * p.table_batch_stride + begin / p.slots * p.table_block_stride];
      cell = entry < 0 ? 0 : entry >= p.blocks ? p.blocks - 1 : entry;
      slot = begin % p.slots;
      count = count < p.slots - slot ? count : p.slots - slot;
    }
    count = count < kBlock ? count : kBlock;
    Block<C> block{
        .k = static_cast<const C*>(p.k_cache) + p.k_strides.offset(cell, head, slot),
        .v = static_cast<const C*>(p.v_cache) + p.v_strides.offset(cell, head, slot),
        .k_scale = nullptr,
        .v_scale = nullptr,
        .position = begin,
        .count = static_cast<int>(count),
    };
    if (p.k_scale) {
      const float* from_k = p.k_scale + p.k_scale_strides.offset(cell, head, slot);
      const float* from_v = p.v_scale + p.v_scale_strides.offset(cell, head, slot);
      for (int64_t j = 0; j < count; ++j) k_scale[j] = from_k[j * p.k_scale_strides.position];
      for (int64_t j = 0; j < count; ++j) v_scale[j] = from_v[j * p.v_scale_strides.position];
      block.k_scale = k_scale, block.v_scale = v_scale;
    }
    attend<Scheme>(c, task, block, length);
    begin += count;
  }
}

// Puts the chunks of head `at` = b · kv_heads + head together, and the sinks to them.
template <class T>
void finish(const Call& c, int64_t at, int64_t chunks) {
  const AttentionDecodeParams& p = c.p;
  const int64_t b = at / p.kv_heads, head = at % p.kv_heads;
  for (int64_t r = 0; r < c.rows; ++r) {
    const int64_t h = head * c.group + r / p.queries, i = r % p.queries;
    float sink = -kInfinity;
    if (p.sinks)
      sink = with_type(p.sinks_dtype, [&]<class S>() { return load_first(static_cast<const S*>(p.sinks) + h, 1)[0]; });
    float top = sink > -kInfinity ? sink : -kInfinity;  // not NaN
    for (int64_t n = 0; n < chunks; ++n) {
      const float other = Task(c, at, n).top[r];
      top = other > top ? other : top;
    }
    const float shift = top == -kInfinity ? 0.0f : top;
    float total = exp_or_0(broadcast(sink - shift))[0];
    for (int64_t n = 0; n < chunks; ++n) {
      const Task task(c, at, n);
      task.top[r] = exp_or_0(broadcast(task.top[r] - shift))[0];  // the chunk's part from here on
      total += task.total[r] * task.top[r];
    }
    const F32 divisor = broadcast(total == 0.0f ? 1.0f : total);
    T* out = static_cast<T*>(p.out) + p.out_strides.offset(b, h, i);
    for (int64_t d = 0; d < p.value_dim; d += kLanes) {
      F32 acc = {};
      for (int64_t n = 0; n < chunks; ++n) {
        const Task task(c, at, n);
        acc += load(task.out + r * c.out_floats + d) * broadcast(task.top[r]);
      }
      store_at_most(out + d, acc / divisor, p.value_dim - d);
    }
    if (p.lse) p.lse[p.lse_at(b, h, i)] = total == 0.0f ? -kInfinity : shift + __builtin_logf(total);
  }
}

// Product of queries of type T with keys of type C.
template <class T, class C>
struct SchemeOf {
  using Type = Floats;
};

#ifdef __AVX512BF16__
template <>
struct SchemeOf<BFloat16, BFloat16> {
  using Type = Bf16;
};
#endif

// Attends to chunk `chunk` of head `at` = b · kv_heads + head, if the sequence has it.
template <class T, class C>
void run_chunk(const Call& c, int64_t at, int64_t chunk) {
  using Scheme = typename SchemeOf<T, C>::Type;
  const AttentionDecodeParams& p = c.p;
  const int64_t b = at / p.kv_heads, head = at % p.kv_heads;
  const int64_t length = c.length(b), first = c.first(length) + chunk * kChunk;
  if (first >= length) return;
  const Task task(c, at, chunk);
  for (int64_t r = 0; r < c.rows; ++r) {
    const T* q = static_cast<const T*>(p.q) + p.q_strides.offset(b, head * c.group + r / p.queries, r % p.queries);
    auto* const to = reinterpret_cast<typename Scheme::Code*>(task.q + r * c.q_floats);
    for (int64_t d = 0; d < p.dim; d += Scheme::kStep) {
      const Bytes numbers = Scheme::load_part(q + d, p.dim - d);
      std::memcpy(to + d, &numbers, sizeof(numbers));
    }
    task.top[r] = -kInfinity, task.total[r] = 0.0f;
  }
  std::memset(task.out, 0, c.rows * c.out_floats * sizeof(float));
  run<Scheme, C>(c, task, b, head, length, first, first + kChunk < length ? first + kChunk : length);
}

inline int64_t workspace_bytes(const Call& c) {
  return c.p.batch * c.p.kv_heads * c.most_chunks * c.task_floats * static_cast<int64_t>(sizeof(float));
}

}  // namespace decoding
}  // namespace
}  // namespace llmkern::LLMKERN_ISA
