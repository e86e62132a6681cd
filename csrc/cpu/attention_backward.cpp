// attention_backward on the CPU: flash-attention's backward (Dao 2023, arXiv:2307.08691, algorithm 2) in fp32.
// task     kM rows of a key head against the keys that one of them sees, kN at a time (products/attention_rows.h)
// block    scores[key][row] = k · qᵀ and dP[key][row] = v · dOᵀ: lanes are rows.  From them P and dS take their places.
//          dq[dim][row] += kᵀ · dS: lanes are rows.  dv[key][dim] += P · dO and dk[key][dim] += dS · q: lanes are
//          dimensions.
// splits   The tasks of a key head are cut into splits, by sizes alone.  A thread takes whole splits; each has its own
//          sums of dk and dv in the workspace, which are added up at the end.
// rows     P is computed again from each row's log-sum-exp; where that was not kept, or where a mask of large numbers
// has
//          rounded its digits away, from the row's maximum and sum, which another pass over the keys finds.
// stack    q and dO, each as it lies and transposed, dq, scores, dP and slopes, and blocks of k and v: 500 KiB at most.
#include "llmkern/attention_backward.h"

#include "isa.h"
#include "products/attention_rows.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kSums = kRegisters == 32 ? 24 : 12;  // in registers, beside kC operands and one broadcast number
constexpr int kN = 48;                             // a multiple of kLanes

struct Rows : Seen {
  alignas(64) float q[kM * kMaxHeadDim], dout[kM * kMaxHeadDim];                // [row][dim], rows kLanes-padded
  alignas(64) float q_turned[kMaxHeadDim * kM], dout_turned[kMaxHeadDim * kM];  // [dim][row]
  alignas(64) float dq[kMaxHeadDim * kM];                                       // [dim][row]
  alignas(64) float weights[kN * kM], dscores[kN * kM], slopes[kN * kM];        // [key][row]
  alignas(64) float k[kN * kMaxHeadDim], v[kN * kMaxHeadDim];                   // [key][dim], of half precision in fp32
  alignas(64) float shift[kM], factor[kM], delta[kM];
};

constexpr int64_t padded_to_registers(int64_t dim) {
  return (dim + kLanes - 1) / kLanes * kLanes;
}

// Numbers in fp32: number i of step s at values + i · stride + s · step.
struct Numbers {
  const float* values;
  int64_t stride, step;
};

// Registers of lanes: that of step s at values + s · stride.
struct Lanes {
  const float* values;
  int64_t stride;
};

// to[i] += Σ_s numbers(i, s) · lanes(s), for kTile i's and kRegisters of lanes; without kAdd the sums replace.
template <int kTile, int kRegisters, bool kAdd>
__attribute__((noinline)) void tile(const Numbers& numbers, const Lanes& lanes, int64_t steps, float* to,
                                    int64_t to_stride) {
  F32 acc[kTile][kRegisters] = {};
  for (int64_t s = 0; s < steps; ++s) {
    F32 with[kRegisters];
#pragma GCC unroll 4
    for (int c = 0; c < kRegisters; ++c) with[c] = load(lanes.values + s * lanes.stride + c * kLanes);
#pragma GCC unroll 24
    for (int i = 0; i < kTile; ++i) {
      const F32 number = broadcast(numbers.values[i * numbers.stride + s * numbers.step]);
#pragma GCC unroll 4
      for (int c = 0; c < kRegisters; ++c) acc[i][c] += with[c] * number;
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < kRegisters; ++c) {
      float* const at = to + i * to_stride + c * kLanes;
      store(at, kAdd ? load(at) + acc[i][c] : acc[i][c]);
    }
}

template <int kTile, int kRegisters, bool kAdd>
inline void tiles(int64_t count, Numbers numbers, const Lanes& lanes, int64_t steps, float* to, int64_t to_stride) {
  for (; count >= kTile; count -= kTile, numbers.values += kTile * numbers.stride, to += kTile * to_stride)
    tile<kTile, kRegisters, kAdd>(numbers, lanes, steps, to, to_stride);
  if constexpr (kTile > 1) tiles<kTile / 2, kRegisters, kAdd>(count, numbers, lanes, steps, to, to_stride);
}

// As `tile` for `count` i's and any number of registers, at most kC at a time.
template <bool kAdd, int kRegisters = kC>
inline void multiply(int64_t count, const Numbers& numbers, Lanes lanes, int registers, int64_t steps, float* to,
                     int64_t to_stride) {
  for (; registers >= kRegisters;
       registers -= kRegisters, lanes.values += kRegisters * kLanes, to += kRegisters * kLanes)
    tiles<kSums / kRegisters, kRegisters, kAdd>(count, numbers, lanes, steps, to, to_stride);
  if constexpr (kRegisters > 1)
    if (registers > 0) multiply<kAdd, kRegisters - 1>(count, numbers, lanes, registers, steps, to, to_stride);
}

// A row's vector in fp32, as it lies and transposed; vectors beyond the last row are 0.
template <class T, class At>
void load_rows(const Rows& rows, int64_t dim, const At& at, float* as_it_lies, float* turned) {
  const int64_t width = padded_to_registers(dim);
  for (int r0 = 0; r0 < kM; r0 += kLanes)
    for (int64_t d = 0; d < dim; d += kLanes) {
      F32 square[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        square[r] = r0 + r < rows.count ? load_at_most(static_cast<const T*>(at(r0 + r)) + d, dim - d) : F32{};
        store(as_it_lies + (r0 + r) * width + d, square[r]);
      }
      transpose(square);
      for (int i = 0; i < kLanes && d + i < dim; ++i) store(turned + (d + i) * kM + r0, square[i]);
    }
}

// `count` vectors as numbers: where they lie, or widened to fp32 in `copy`.
template <class T>
Numbers vectors(const T* from, int64_t stride, int count, int64_t dim, float* copy) {
  if constexpr (sizeof(T) == 4) return {from, stride, 1};
  for (int j = 0; j < count; ++j)
    for_registers(dim,
                  [&](int64_t d, int n) { store(copy + j * kMaxHeadDim + d, load_at_most(from + j * stride + d, n)); });
  return {copy, kMaxHeadDim, 1};
}

struct Backward {
  const AttentionBackwardParams& p;
  const Call c{p.forward};
  const int64_t splits = attention_backward_splits(p.forward);
  const int64_t k_stride = attention_backward_stride(p.forward.dim);
  const int64_t v_stride = attention_backward_stride(p.forward.value_dim);
  const int64_t rows = p.forward.batch * p.forward.heads * p.forward.queries;
  // In fp32 the rounding of a log-sum-exp would be the largest error of all.
  const bool lse_is_exact =
      p.forward.lse && p.forward.dtype != DType::f32 && !(p.forward.mask && !p.forward.mask_is_bool);

  // Sums of dk, then of dv, of one split of one key head.
  float* split_at(int64_t head, int64_t split) const {
    return p.workspace + (head * splits + split) * p.forward.keys * (k_stride + v_stride);
  }
  float* dsinks() const { return split_at(p.forward.batch * p.forward.kv_heads, 0); }  // [batch, heads, queries]
  float* dmask() const { return dsinks() + (p.forward.sinks ? rows : 0); }             // [batch, heads, queries, keys]
  int64_t row_at(const Rows& r, int i) const {
    return (r.batch * p.forward.heads + r.of_head[i]) * p.forward.queries + r.of_query[i];
  }
};

// k · qᵀ of keys [j0, j0 + count) becomes scores: scaled, capped, masked; slopes are the cap's.
void finish_scores(const Backward& b, Rows& rows, int64_t j0, int count) {
  const AttentionParams& p = b.p.forward;
  const int lanes = rows.registers() * kLanes;
  const F32 scale = broadcast(p.sm_scale), cap = broadcast(p.softcap);
  for (int j = 0; j < count; ++j)
    for (int r = 0; r < lanes; r += kLanes) {
      float* const s = rows.weights + j * kM + r;
      if (p.softcap > 0.0f) {
        const F32 t = tanh(load(s) * scale / cap);
        store(rows.slopes + j * kM + r, 1.0f - t * t);
        store(s, t * cap);
      } else {
        store(s, load(s) * scale);
      }
    }
  if (b.c.by_row) add_by_row(b.c, rows, rows.weights, j0, count, broadcast(1.0f));
  const bool all_see =
      j0 >= rows.every_first && j0 + count - 1 <= rows.every_last && rows.count == rows.registers() * kLanes;
  if (all_see && !b.c.by_key) return;
  for (int r = 0; r < lanes; r += kLanes) {
    S32 first, last;
    std::memcpy(&first, rows.first + r, sizeof(first));
    std::memcpy(&last, rows.last + r, sizeof(last));
    for (int j = 0; j < count; ++j) {
      float* const s = rows.weights + j * kM + r;
      F32 score = load(s);
      if (b.c.by_key) score += broadcast(rows.key_bias[j]);
      const S32 key = S32{} + static_cast<int32_t>(j0 + j);
      store(s, (key >= first) & (key <= last) ? score : broadcast(-kInfinity));
    }
  }
}

// f(j, count, k as numbers) for each block of keys that some row sees, its scores finished.
template <class T, class F>
void for_scores(const Backward& b, Rows& rows, const F& f) {
  const AttentionParams& p = b.p.forward;
  const T* const k = static_cast<const T*>(p.k) + p.k_strides.offset(rows.batch, rows.head, 0);
  for (int64_t j = rows.some_first; j <= rows.some_last; j += kN) {
    const int count = rows.some_last - j + 1 < kN ? rows.some_last - j + 1 : kN;
    if (b.c.by_key && !set_key_bias(b.c, rows, j, count)) continue;
    const Numbers keys = vectors(k + j * p.k_strides.position, p.k_strides.position, count, p.dim, rows.k);
    multiply<false>(count, keys, {rows.q_turned, kM}, rows.registers(), p.dim, rows.weights, kM);
    finish_scores(b, rows, j, count);
    f(j, count, keys);
  }
}

// Shift of the scores, and factor of their exponentials, that turn them into the weights.
template <class T>
void set_shift(const Backward& b, Rows& rows) {
  if (b.lse_is_exact) {
    for (int r = 0; r < kM; ++r) {
      const float lse = r < rows.count ? b.p.forward.lse[b.row_at(rows, r)] : 0.0f;
      rows.shift[r] = lse == -kInfinity ? 0.0f : lse, rows.factor[r] = 1.0f;
    }
    return;
  }
  for_scores<T>(b, rows, [&](int64_t, int count, const Numbers&) {
    for (int r = 0; r < rows.registers() * kLanes; r += kLanes) {
      const F32 before = load(rows.top + r);
      F32 top = before, total = {};
      for (int j = 0; j < count; ++j) {
        const F32 score = load(rows.weights + j * kM + r);
        top = score > top ? score : top;
      }
      const F32 shift = top == -kInfinity ? F32{} : top;
      for (int j = 0; j < count; ++j) total += exp_or_0(load(rows.weights + j * kM + r) - shift);
      store(rows.total + r, load(rows.total + r) * exp_or_0(before - shift) + total);
      store(rows.top + r, top);
    }
  });
  for (int r = 0; r < kM; ++r) {
    rows.shift[r] = rows.top[r] == -kInfinity ? 0.0f : rows.top[r];
    rows.factor[r] = rows.total[r] == 0.0f ? 1.0f : 1.0f / rows.total[r];
  }
}

// Δ of each row, and the gradient of its sink.
template <class T>
void set_delta(const Backward& b, Rows& rows) {
  const AttentionParams& p = b.p.forward;
  const int64_t width = padded_to_registers(p.value_dim);
  for (int r = 0; r < kM; ++r) {
    rows.delta[r] = 0.0f;
    if (r >= rows.count) continue;
    const T* const out =
        static_cast<const T*>(p.out) + p.out_strides.offset(rows.batch, rows.of_head[r], rows.of_query[r]);
    F32 total = {};
    for_registers(p.value_dim,
                  [&](int64_t d, int n) { total += load(rows.dout + r * width + d) * load_at_most(out + d, n); });
    rows.delta[r] = sum(total) - (b.p.dlse ? b.p.dlse[b.row_at(rows, r)] : 0.0f);
    if (!p.sinks) continue;
    const F32 sink = with_type(
        p.sinks_dtype, [&]<class S>() { return load_first(static_cast<const S*>(p.sinks) + rows.of_head[r], 1); });
    const float weight = exp(sink - broadcast(rows.shift[r]))[0] * rows.factor[r];
    b.dsinks()[b.row_at(rows, r)] = -weight * rows.delta[r];
  }
}

// Scores and dP become weights and dS.
void weigh(const Backward& b, Rows& rows, int64_t j0, int count) {
  const AttentionParams& p = b.p.forward;
  for (int r = 0; r < rows.registers() * kLanes; r += kLanes) {
    const F32 shift = load(rows.shift + r), factor = load(rows.factor + r), delta = load(rows.delta + r);
    for (int j = 0; j < count; ++j) {
      float *const s = rows.weights + j * kM + r, *const d = rows.dscores + j * kM + r;
      const F32 weight = exp_or_0(load(s) - shift) * factor;
      store(s, weight);
      store(d, weight * (load(d) - delta));
    }
  }
  for (int r = 0; b.p.dmask && r < rows.count; ++r)
    for (int j = 0; j < count; ++j) b.dmask()[b.row_at(rows, r) * p.keys + j0 + j] = rows.dscores[j * kM + r];
  if (p.softcap <= 0.0f) return;
  for (int i = 0; i < count * kM; i += kLanes) store(rows.dscores + i, load(rows.dscores + i) * load(rows.slopes + i));
}

template <class T>
void task(const Backward& b, Rows& rows, float* dk, float* dv) {
  const AttentionParams& p = b.p.forward;
  start_softmax(b.c, rows);
  load_rows<T>(rows, p.dim, [&](int r) { return query_at<T>(p, rows, r); }, rows.q, rows.q_turned);
  const auto dout = [&](int r) {
    return static_cast<const T*>(b.p.dout) + b.p.dout_strides.offset(rows.batch, rows.of_head[r], rows.of_query[r]);
  };
  load_rows<T>(rows, p.value_dim, dout, rows.dout, rows.dout_turned);
  set_shift<T>(b, rows);
  set_delta<T>(b, rows);
  std::memset(rows.dq, 0, p.dim * kM * sizeof(float));
  const T* const v = static_cast<const T*>(p.v) + p.v_strides.offset(rows.batch, rows.head, 0);
  const int64_t q_width = padded_to_registers(p.dim), v_width = padded_to_registers(p.value_dim);
  for_scores<T>(b, rows, [&](int64_t j, int count, const Numbers& keys) {
    const Numbers values = vectors(v + j * p.v_strides.position, p.v_strides.position, count, p.value_dim, rows.v);
    multiply<false>(count, values, {rows.dout_turned, kM}, rows.registers(), p.value_dim, rows.dscores, kM);
    weigh(b, rows, j, count);
    multiply<true>(count, {rows.weights, kM, 1}, {rows.dout, v_width}, v_width / kLanes, rows.count,
                   dv + j * b.v_stride, b.v_stride);
    multiply<true>(count, {rows.dscores, kM, 1}, {rows.q, q_width}, q_width / kLanes, rows.count, dk + j * b.k_stride,
                   b.k_stride);
    multiply<true>(p.dim, {keys.values, keys.step, keys.stride}, {rows.dscores, kM}, rows.registers(), count, rows.dq,
                   kM);
  });
  for (int r0 = 0; r0 < rows.count; r0 += kLanes)
    for (int64_t d = 0; d < p.dim; d += kLanes) {
      F32 square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = d + i < p.dim ? load(rows.dq + (d + i) * kM + r0) * broadcast(p.sm_scale) : F32{};
      transpose(square);
      for (int r = 0; r < kLanes && r0 + r < rows.count; ++r)
        store_at_most(static_cast<T*>(b.p.dq) + b.row_at(rows, r0 + r) * p.dim + d, square[r], p.dim - d);
    }
}

// Splits [begin, end) of all key heads.
template <class T>
void run_splits(const Backward& b, int64_t begin, int64_t end) {
  Rows rows;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t head = at / b.splits, split = at % b.splits;
    float *const dk = b.split_at(head, split), *const dv = dk + b.p.forward.keys * b.k_stride;
    std::memset(dk, 0, b.p.forward.keys * (b.k_stride + b.v_stride) * sizeof(float));
    for (int64_t i = split * b.c.blocks / b.splits; i < (split + 1) * b.c.blocks / b.splits; ++i) {
      static_cast<Task&>(rows) = b.c.task(head * b.c.blocks + i);
      task<T>(b, rows, dk, dv);
    }
  }
}

// to[key] = factor · Σ_splits, of one key head's dk or dv.
template <class T>
void add_splits(const Backward& b, int64_t head, int64_t offset, int64_t stride, int64_t dim, float factor, void* to) {
  const int64_t keys = b.p.forward.keys;
  for (int64_t key = 0; key < keys; ++key)
    for_registers(dim, [&](int64_t d, int n) {
      F32 total = {};
      for (int64_t s = 0; s < b.splits; ++s) total += load(b.split_at(head, s) + offset + key * stride + d);
      store_at_most(static_cast<T*>(to) + (head * keys + key) * dim + d, total * broadcast(factor), n);
    });
}

// The gradient of a mask: that of the scores, summed over the dimensions that it was broadcast along.
void add_scores(const Backward& b, const Threads& threads) {
  const AttentionParams& p = b.p.forward;
  const auto& size = b.p.mask_sizes;
  threads.parallel_for(size.batch * size.head * size.query, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t batch = row / size.query / size.head, head = row / size.query % size.head, query = row % size.query;
      F32 of_row = {};
      for_registers(p.keys, [&](int64_t j, int n) {
        F32 total = {};
        for (int64_t x = batch; x < (size.batch == 1 ? p.batch : batch + 1); ++x)
          for (int64_t h = head; h < (size.head == 1 ? p.heads : head + 1); ++h) {
            F32 of_head = {};
            for (int64_t t = query; t < (size.query == 1 ? p.queries : query + 1); ++t)
              of_head += load_at_most(b.dmask() + ((x * p.heads + h) * p.queries + t) * p.keys + j, n);
            total += of_head;
          }
        if (size.key == 1) {
          of_row += total;
          return;
        }
        with_type(p.mask_dtype,
                  [&]<class M>() { store_at_most(static_cast<M*>(b.p.dmask) + row * p.keys + j, total, n); });
      });
      if (size.key == 1)
        with_type(p.mask_dtype,
                  [&]<class M>() { store_first(static_cast<M*>(b.p.dmask) + row, broadcast(sum(of_row)), 1); });
    }
  });
}

void add_sinks(const Backward& b) {
  const AttentionParams& p = b.p.forward;
  for (int64_t h = 0; h < p.heads; ++h) {
    float total = 0.0f;
    for (int64_t x = 0; x < p.batch; ++x) {
      F32 of_head = {};
      const float* const rows = b.dsinks() + (x * p.heads + h) * p.queries;
      for_registers(p.queries, [&](int64_t i, int n) { of_head += load_at_most(rows + i, n); });
      total += sum(of_head);
    }
    with_type(p.sinks_dtype, [&]<class S>() { store_first(static_cast<S*>(b.p.dsinks) + h, broadcast(total), 1); });
  }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p, const Threads& threads) {
  const Backward b{p};
  const AttentionParams& f = p.forward;
  if (p.dmask) std::memset(b.dmask(), 0, b.rows * f.keys * sizeof(float));
  with_type(f.dtype, [&]<class T>() {
    threads.parallel_for(f.batch * f.kv_heads * b.splits, 1,
                         [&](int64_t begin, int64_t end) { run_splits<T>(b, begin, end); });
    threads.parallel_for(f.batch * f.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        add_splits<T>(b, head, 0, b.k_stride, f.dim, f.sm_scale, p.dk);
        add_splits<T>(b, head, f.keys * b.k_stride, b.v_stride, f.value_dim, 1.0f, p.dv);
      }
    });
  });
  if (p.dmask) add_scores(b, threads);
  if (p.dsinks) add_sinks(b);
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(attention_backward, AttentionBackwardParams)
