// attention on the CPU: flash-attention's blocks (Dao 2023, arXiv:2307.08691), turned on their side so that k and v are
// read as they lie and only a block of queries is ever transposed.
// rows     The queries of a key head's group: row g is query g / group of the group's head g % group.
// task     kM rows against all the keys that one of them sees, kN at a time; nothing is shared between tasks, so that a
//          result does not depend on the number of threads.
// block    scores[key][row] = k · qᵀ: lanes are rows, so softmax is vertical, without a sum across a register.
//          out[dim][row] += vᵀ · weights: lanes are rows here too.
// tile     kR × kM sums in registers: in each step the registers of kM rows, times one broadcast number per key or
//          dimension.
// stack    q and out transposed, scores, and a block of k or v where it must be widened: 200 KiB at most.
// ISA      fp32 arithmetic; bf16 on AMX where there is one, the weights rounded to bf16 (attention_tiles.h).
#include "llmkern/attention.h"

#include <type_traits>

#include "../isa.h"
#include "../math.h"
#include "../vec.h"
#include "attention_tiles.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kC = LLMKERN_ISA_LEVEL == 2 ? 4 : 2;  // registers of a row of a tile
constexpr int kR = LLMKERN_ISA_LEVEL == 2 ? 6 : 4;  // kR · kC accumulators, kC operands, one broadcast number
constexpr int kM = kC * kLanes;
constexpr int kN = 48;                           // a multiple of kR and of kLanes
constexpr int kMostKeys = 64;                    // of any block
constexpr int64_t kProductsPerThread = 1 << 20;  // below this, waking a thread costs more than it saves
constexpr float kInfinity = __builtin_inff();

#ifdef __AMX_BF16__
template <class T>
constexpr bool kTiles = std::is_same_v<T, BFloat16>;
static_assert(kTileKeys <= kMostKeys);
#else
template <class T>
constexpr bool kTiles = false;
#endif

// kM rows of a key head, perhaps fewer.
struct Task {
  int64_t batch, head, first_row;
  int count;
};

// What a task keeps of its rows.
struct Rows : Task {
  int32_t first[kM], last[kM];               // keys that each sees; none where first > last
  int64_t mask_at[kM];                       // where their rows of the mask begin, in elements
  int32_t some_first, some_last;             // that some row sees
  int32_t every_first, every_last;           // that every row sees
  alignas(64) float top[kM], total[kM];      // of the online softmax
  alignas(64) float q[kMaxHeadDim * kM];     // [dim][row]; pairs of dimensions [dim / 2][row] for tiles
  alignas(64) float out[kMaxHeadDim * kM];   // [value_dim][row]
  alignas(64) float scores[kMostKeys * kM];  // [key][row], then the weights; pairs of keys [key / 2][row] for tiles
  alignas(64) float widened[kMostKeys * kMaxHeadDim];
  alignas(64) float key_bias[kMostKeys];  // added to a key's scores in every row
};

struct Call {
  const AttentionParams& p;
  int64_t group = p.heads / p.kv_heads;
  int64_t rows = group * p.queries;
  int64_t blocks = (rows + kM - 1) / kM;
  bool mask_by_key = p.mask && p.mask_strides.head == 0 && p.mask_strides.query == 0;

  int64_t query(int64_t row) const { return row / group; }
  int64_t head(int64_t kv_head, int64_t row) const { return kv_head * group + row % group; }

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

template <class T>
void fetch_keys(const AttentionParams& p, const Task& task, int64_t first) {
  const int64_t count = p.keys - first < kMostKeys ? p.keys - first : kMostKeys;
  fetch(static_cast<const T*>(p.k) + p.k_strides.offset(task.batch, task.head, first), p.k_strides.position, count,
        p.dim);
  fetch(static_cast<const T*>(p.v) + p.v_strides.offset(task.batch, task.head, first), p.v_strides.position, count,
        p.value_dim);
}

template <class T>
void fetch_queries(const Call& c, const Task& task) {
  for (int r = 0; r < task.count; ++r) {
    const int64_t row = task.first_row + r;
    fetch(static_cast<const T*>(c.p.q) + c.p.q_strides.offset(task.batch, c.head(task.head, row), c.query(row)), 0, 1,
          c.p.dim);
  }
}

// Which keys the rows see, by causality and window.
void set_limits(const Call& c, Rows& rows) {
  const AttentionParams& p = c.p;
  const int64_t right = p.causal ? 0 : p.window_right;
  rows.some_first = INT32_MAX, rows.some_last = -1, rows.every_first = 0, rows.every_last = INT32_MAX;
  for (int r = 0; r < kM; ++r) {
    const int64_t position = c.query(rows.first_row + r) + p.keys - p.queries;
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

// A register of a query: of numbers, or for tiles of pairs.
template <class T>
inline F32 load_lanes(const T* p, int64_t n) {
#ifdef __AMX_BF16__
  if constexpr (kTiles<T>) return load_pairs(p, n);
#endif
  return load_at_most(p, n);
}

template <class T>
void start(const Call& c, Rows& rows) {
  const AttentionParams& p = c.p;
  for (int r0 = 0; r0 < kM; r0 += kLanes) {
    const T* q[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const int64_t row = rows.first_row + (r0 + r < rows.count ? r0 + r : rows.count - 1);
      const int64_t h = c.head(rows.head, row), i = c.query(row);
      q[r] = static_cast<const T*>(p.q) + p.q_strides.offset(rows.batch, h, i);
      rows.mask_at[r0 + r] = rows.batch * p.mask_strides.batch + h * p.mask_strides.head + i * p.mask_strides.query;
    }
    constexpr int kPerLane = kTiles<T> ? 2 : 1;
    for (int64_t d = 0; d < p.dim; d += kPerLane * kLanes) {
      F32 square[kLanes];
      for (int r = 0; r < kLanes; ++r) square[r] = load_lanes(q[r] + d, p.dim - d);
      transpose(square);
      const int n = kTiles<T> || p.dim - d > kLanes ? kLanes : p.dim - d;
      for (int i = 0; i < n; ++i) store(rows.q + (d / kPerLane + i) * kM + r0, square[i]);
    }
  }
  set_limits(c, rows);
  for (int r = 0; r < kM; ++r) {
    rows.top[r] = -kInfinity;
    rows.total[r] = 0.0f;
    if (!p.sinks || r >= rows.count) continue;
    const int64_t h = c.head(rows.head, rows.first_row + r);
    const float sink =
        with_type(p.sinks_dtype, [&]<class S>() { return load_first(static_cast<const S*>(p.sinks) + h, 1)[0]; });
    if (sink > -kInfinity) rows.top[r] = sink;  // not NaN
    rows.total[r] = exp(broadcast(sink == -kInfinity ? sink : sink - rows.top[r]))[0];
  }
  const int64_t value_dim = kTiles<T> ? (p.value_dim + 31) / 32 * 32 : p.value_dim;
  std::memset(rows.out, 0, value_dim * kM * sizeof(float));
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
#ifdef __AMX_BF16__
  if constexpr (kTiles<T>) {
    const T* k = whole_tiles(from, k_stride, count, dim, reinterpret_cast<T*>(rows.widened));
    for (int j = 0; j < count; j += 32)
      for (int r = 0; r < rows.count; r += 32)
        multiply_tiles(k + j * k_stride, k_stride * 2, rows.q + r, kM * 4, padded_to_tiles(dim) / 32, false,
                       rows.scores + j * kM + r, kM * 4);
    return;
  }
#endif
  const float* k = in_fp32(from, k_stride, count, dim, rows.widened);
  const F32 none[kC] = {};
  int j = 0;
  for (; j + kR <= count; j += kR)
    tile<kR, false>(k + j * k_stride, k_stride, 1, rows.q, dim, none, rows.scores + j * kM);
  rest<kR - 1, false>(count - j, k + j * k_stride, k_stride, 1, rows.q, dim, none, rows.scores + j * kM);
}

template <class T>
void add_values(Rows& rows, const T* from, int64_t v_stride, int count, int64_t dim, const F32 (&keep)[kC]) {
#ifdef __AMX_BF16__
  if constexpr (kTiles<T>) {
    T* turned = reinterpret_cast<T*>(rows.widened);
    turn(from, v_stride, count, dim, turned);
    for (int64_t d = 0; d < dim; ++d)
      for (int i = 0; i < kC; ++i) {
        float* out = rows.out + d * kM + i * kLanes;
        store(out, load(out) * keep[i]);
      }
    for (int64_t d = 0; d < dim; d += 32)
      for (int r = 0; r < rows.count; r += 32)
        multiply_tiles(turned + d * kTileKeys, kTileKeys * 2, rows.scores + r, kM * 4, (count + 31) / 32, true,
                       rows.out + d * kM + r, kM * 4);
    return;
  }
#endif
  const float* v = in_fp32(from, v_stride, count, dim, rows.widened);
  int64_t d = 0;
  for (; d + kR <= dim; d += kR) tile<kR, true>(v + d, 1, v_stride, rows.scores, count, keep, rows.out + d * kM);
  rest<kR - 1, true>(dim - d, v + d, 1, v_stride, rows.scores, count, keep, rows.out + d * kM);
}

// What the mask's row at element `at` adds to n <= kLanes scores from key j on: 0 or −infinity where it is bool.
inline F32 bias(const AttentionParams& p, int64_t at, int64_t j, int n) {
  const int64_t step = p.mask_strides.key;
  const auto numbers = [&]<class M>(const M* mask) {
    if (step == 1) return load_at_most(mask + j, n);
    M few[kLanes] = {};
    for (int l = 0; l < n; ++l) few[l] = mask[(j + l) * step];
    return load(few);
  };
  if (p.mask_is_bool) {
    const F32 seen = numbers(static_cast<const int8_t*>(p.mask) + at);
    return seen != 0.0f ? F32{} : broadcast(-kInfinity);
  }
  return with_type(p.mask_dtype, [&]<class M>() { return numbers(static_cast<const M*>(p.mask) + at); });
}

// Fills key_bias for keys [j0, j0 + count); false where no row sees any of them.
bool set_key_bias(const Call& c, Rows& rows, int64_t j0, int count) {
  const AttentionParams& p = c.p;
  bool any = false;
  for (int j = 0; j < count; j += kLanes) {
    const int n = count - j < kLanes ? count - j : kLanes;
    const F32 mask = c.mask_by_key ? bias(p, rows.mask_at[0], j0 + j, n) : F32{};
    for (int l = 0; l < n; ++l) {
      const bool real =
          !p.key_padding || p.key_padding[rows.batch * p.padding_strides.batch + (j0 + j + l) * p.padding_strides.key];
      rows.key_bias[j + l] = real ? mask[l] : -kInfinity;
      any |= rows.key_bias[j + l] != -kInfinity;
    }
  }
  return any;
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
template <class T>
inline F32 weigh(float* scores, int count, F32 factor, F32 shift) {
  F32 total[2] = {};
#ifdef __AMX_BF16__
  if constexpr (kTiles<T>) {
    const auto weight = [&](int j) { return exp2_or_0((load(scores + j * kM) * factor - shift) * 0x1.715476p0f); };
    // Pairs overtake no score that is still to be read: pair j / 2 is not behind key j.
    for (int j = 0; j < count; j += 2) {
      const F32 even = weight(j), odd = j + 1 < count ? weight(j + 1) : F32{};
      total[0] += even, total[1] += odd;
      store(scores + j / 2 * kM, pairs(even, odd));
    }
    for (int j = (count + 1) / 2; j % 16 != 0; ++j) store(scores + j * kM, F32{});
    return total[0] + total[1];
  }
#endif
  for (int j = 0; j < count; ++j) {
    const F32 weight = exp_or_0(load(scores + j * kM) * factor - shift);
    total[j % 2] += weight;
    store(scores + j * kM, weight);
  }
  return total[0] + total[1];
}

// scores → weights of keys [j0, j0 + count); keep is what the rows' sums so far are to be multiplied with.
template <class T>
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
    const F32 total = weigh<T>(s, count, factor, shift);
    store(rows.total + i * kLanes, load(rows.total + i * kLanes) * keep[i] + total);
    store(rows.top + i * kLanes, top);
  }
}

template <class T>
void finish(const Call& c, Rows& rows) {
  const AttentionParams& p = c.p;
  for (int r0 = 0; r0 < rows.count; r0 += kLanes) {
    const int n = rows.count - r0 < kLanes ? rows.count - r0 : kLanes;
    const F32 total = load(rows.total + r0), factor = 1.0f / (total == 0.0f ? broadcast(1.0f) : total);
    T* out[kLanes];
    for (int r = 0; r < n; ++r) {
      const int64_t row = rows.first_row + r0 + r, h = c.head(rows.head, row), i = c.query(row);
      out[r] = static_cast<T*>(p.out) + p.out_strides.offset(rows.batch, h, i);
      if (p.lse)
        p.lse[(rows.batch * p.heads + h) * p.queries + i] =
            total[r] == 0.0f ? -kInfinity : rows.top[r0 + r] + __builtin_logf(total[r]);
    }
    for (int64_t d = 0; d < p.value_dim; d += kLanes) {
      F32 square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = d + i < p.value_dim ? load(rows.out + (d + i) * kM + r0) * factor : F32{};
      transpose(square);
      for (int r = 0; r < n; ++r) store_at_most(out[r] + d, square[r], p.value_dim - d);
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
  constexpr int kKeys = kTiles<T> ? kMostKeys : kN;
  for (int64_t j = rows.some_first; j <= rows.some_last; j += kKeys) {
    const int count = rows.some_last - j + 1 < kKeys ? rows.some_last - j + 1 : kKeys;
    if (j + count <= rows.some_last) fetch_keys<T>(p, rows, j + count);
    if (by_key && !set_key_bias(c, rows, j, count)) continue;
    multiply_keys(rows, k + j * p.k_strides.position, p.k_strides.position, count, p.dim);
    F32 keep[kC];
    softmax<T>(c, rows, j, count, by_key, keep);
    add_values(rows, v + j * p.v_strides.position, p.v_strides.position, count, p.value_dim, keep);
  }
  finish<T>(c, rows);
}

}  // namespace

void attention(const AttentionParams& p, const Threads& threads) {
  const Call c{p};
  const auto tasks = [&](int64_t begin, int64_t end) {
#ifdef __AMX_BF16__
    Tiles::begin();
#endif
    Rows rows;
    for (int64_t at = begin; at < end; ++at) {
      static_cast<Task&>(rows) = c.task(at);
      with_type(p.dtype, [&]<class T>() {
        if (at + 1 < end) {
          const Task next = c.task(at + 1);
          fetch_queries<T>(c, next);
          if (next.head != rows.head || next.batch != rows.batch) fetch_keys<T>(p, next, 0);
        }
        run<T>(c, rows);
      });
    }
#ifdef __AMX_BF16__
    Tiles::end();
#endif
  };
  const int64_t products = kM * (p.keys + 1) * (p.dim + p.value_dim);
  threads.parallel_for(p.batch * p.kv_heads * c.blocks, kProductsPerThread / products + 1, tasks);
}

}  // namespace llmkern::LLMKERN_ISA

#if LLMKERN_ISA_LEVEL == 0
int64_t llmkern::attention_workspace_bytes(const AttentionParams&) {
  return 0;
}
#endif

LLMKERN_PRODUCTS_LAUNCHER(attention, AttentionParams)
