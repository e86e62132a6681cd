// attention_decode: attention of each sequence's last queries against its cache (llmkern/attention_decode.h)
//
// rows     The queries of all heads that share a key head (GQA group): row r is query r % queries of head
//          kv_head · group + r / queries.  Every warp holds 16 rows as the m16 operand of mma.m16n8k16, in registers,
//          or in shared memory at 256 dimensions.
// block    One key head, one tile of rows, and one of `splits` equal parts of the visible keys (split-K, as in
//          Flash-Decoding); empty parts are skipped.  Partial results go to the workspace, and combine_kernel merges
//          them in order; with one split a block writes the result itself.
// teams    Warps form teams (plan.h).  Up to 16 rows: each warp is a team, streams its own keys and synchronises with
//          nobody.  More rows: the block is one team, 16 rows per warp.  Teams take steps in turn, keep an online
//          softmax each, and merge through shared memory at the end.
// smem     Per team a ring of tiles of 16 · warps keys or values (common/attention.cuh's Tile): one is consumed while
//          all others are in flight.  Each lane holds the address of one key (lanes 16-31: of its value), so that the
//          block table is read once per key, one step before the copy starts.
// int8     Codes stay codes in shared memory; a 32-bit register of ldmatrix has four, and becomes the elements 0, 2 and
//          1, 3 of the operands.  For keys that permutes the dimensions of each 16, which q does too; for values
//          the columns of the result.  Scales multiply scores and weights.
// needs    sm_80; dimensions that are multiples of 8, to 256; rows of q and of the caches at multiples of 16 bytes
#include "llmkern/attention_decode.h"

#include "common/attention.cuh"
#include "common/reduce.cuh"
#include "common/row.cuh"
#include "llmkern/plan.h"

namespace llmkern {
namespace {

// The keys that a sequence's queries see, and how they are parted.
struct Keys {
  Band band;
  int first, end;  // of all queries
  int each;        // keys of a part but the last
  int parts;       // that have keys

  __device__ Keys(const AttentionDecodeParams& p, const AttentionDecodePlan& plan, int64_t batch)
      : band(p.queries, length(p, batch), p.window_left, -1, true), first(band.begin(0)), end(band.keys) {
    const int even = (end - first + plan.splits - 1) / plan.splits;
    const int step = plan.tile.keys();
    each = (max(even, kDecodeLeastKeys) + step - 1) / step * step;
    parts = end > first ? (end - first + each - 1) / each : 0;
  }

 private:
  __device__ static int64_t length(const AttentionDecodeParams& p, int64_t batch) {
    const int64_t capacity = p.capacity(), at = batch * p.lengths_stride;
    if (!p.lengths) return capacity;
    const int64_t n = p.lengths_are_64 ? ld_global(static_cast<const int64_t*>(p.lengths) + at)
                                       : ld_global(static_cast<const int32_t*>(p.lengths) + at);
    return n < 0 ? 0 : n > capacity ? capacity : n;
  }
};

// Softmax state of a row in a part or a team: the largest logit, and the sum of exp(logit - largest).
struct RowStats {
  float top, total;
};

__device__ __forceinline__ float sink_of(const AttentionDecodeParams& p, int64_t head) {
  if (!p.sinks) return minus_infinity();
  float sink[1];
  load_as_float(p.sinks, p.sinks_dtype, head, sink);
  return sink[0];
}

// A row's result from the sum of weighted values, kN of them from column `column` on, and its statistics without sink.
template <class T, int kN>
__device__ __forceinline__ void store_result(const AttentionDecodeParams& p, int64_t batch, int64_t head, int64_t query,
                                             int column, const float (&values)[kN], RowStats stats) {
  const float sink = sink_of(p, head), top = fmaxf(stats.top, sink), shift = finite_shift(top);
  const float total = stats.total * exp_approx(stats.top - shift) + exp_approx(sink - shift);
  const float factor = total == 0.0f ? 0.0f : exp_approx(stats.top - shift) / total;
  float y[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) y[i] = values[i] * factor;
  Packed<T, kN> packed;
  packed.pack(y);
  packed.store(static_cast<T*>(p.out) + p.out_strides.offset(batch, head, query) + column);
  if (p.lse && column == 0)
    st_global(p.lse + (batch * p.heads + head) * p.queries + query,
              total == 0.0f ? minus_infinity() : shift + logf(total));
}

// The workspace: for each row of the result and each split the sums of weighted values, then their statistics.
struct Parts {
  float* values;
  float2* stats;

  __device__ Parts(const AttentionDecodeParams& p, int64_t splits, int64_t row, int64_t split)
      : values(reinterpret_cast<float*>(p.workspace) + (row * splits + split) * p.value_dim),
        stats(reinterpret_cast<float2*>(reinterpret_cast<float*>(p.workspace) +
                                        p.batch * p.heads * p.queries * splits * p.value_dim) +
              row * splits + split) {}
};

// Codes 0, 2 (odd: 1, 3) of a register as two elements.  A half's low byte counts ones from 1024 on, and flipping a
// code's sign adds 128; a bfloat16's low seven bits count ones from 128 on, and the eighth makes that 256.
template <class T>
__device__ __forceinline__ uint32_t widen(uint32_t codes, bool odd) {
  const uint32_t x = odd ? codes >> 8 : codes;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t low = (x & 0x007f007fu) | 0x43004300u, minus_high = (x & 0x00800080u) | 0xc300c300u;
    return bits_as<uint32_t>(__hadd2(bits_as<__nv_bfloat162>(low), bits_as<__nv_bfloat162>(minus_high)));
  } else {
    constexpr uint32_t k1152 = 0x64806480u;
    const uint32_t biased = (x & 0x00ff00ffu) ^ k1152;
    return bits_as<uint32_t>(__hsub2(bits_as<__half2>(biased), bits_as<__half2>(k1152)));
  }
}

// One warp's rows, and its share of a team's work.  C: what the caches hold, T or int8_t.
template <class T, class C, int kDim, bool kOneTeam>
class Decode {
 public:
  static constexpr AttentionDecodeTile kTile{kDim, sizeof(C), kOneTeam};
  static constexpr bool kCodes = sizeof(C) == 1;
  static constexpr int kTeams = kTile.teams(), kTeamWarps = kTile.warps() / kTeams;
  static constexpr int kRows = kTile.rows(), kKeys = kTile.keys() / kTeams;
  static constexpr int kAhead = kTile.stages() / 2;  // steps whose keys are in the ring or on their way
  using Cells = Tile<kDim * sizeof(C) / 2>;          // of 16 bits
  static constexpr int kTileBytes = Cells::bytes(kKeys);
  static_assert(kTile.ring_bytes() == 2 * kAhead * kTeams * kTileBytes);
  static_assert(kTile.scales_bytes() == (kCodes ? 2 * kAhead * kTeams * kKeys * 4 : 0));
  // Weights of codes are halves: small scales must not make them subnormal, nor those of the largest halves infinite.
  static constexpr float kRaised = kCodes && std::is_same_v<T, Float16> ? 64.0f : 1.0f;
  // Else each lane keeps its operands in shared memory.
  static constexpr bool kQueriesInRegisters = kTile.queries_bytes() == 0;

  __device__ Decode(const AttentionDecodeParams& p, const AttentionDecodePlan& plan, char* shared)
      : p_(p),
        shared_(shared),
        lane_(threadIdx.x % 32),
        team_warp_(threadIdx.x / 32 % kTeamWarps),
        team_(threadIdx.x / 32 / kTeamWarps),
        first_row_(static_cast<int>(blockIdx.x % plan.row_tiles) * kRows),
        queries_(static_cast<int>(p.queries)),
        rows_(static_cast<int>(p.heads / p.kv_heads) * queries_),
        scale_(p.sm_scale, p.softcap, false) {
    int64_t task = blockIdx.x / plan.row_tiles;
    split_ = static_cast<int>(task % plan.splits), task /= plan.splits;
    kv_head_ = task % p.kv_heads, batch_ = task / p.kv_heads;
  }

  __device__ void run(const AttentionDecodePlan& plan) {
    const Keys keys(p_, plan, batch_);
    if (plan.splits > 1 && split_ >= keys.parts) return;
    begin_ = keys.first + split_ * keys.each;
    end_ = min(begin_ + keys.each, keys.end);
    const int mine = end_ - begin_ - team_ * kKeys;  // steps of kKeys; the next is kTeams * kKeys further on
    steps_ = mine > 0 ? (mine + kTeams * kKeys - 1) / (kTeams * kKeys) : 0;
    // Steps beyond these bounds hide something from some row.
    all_from_ = keys.band.begin(queries_ - 1), all_to_ = keys.band.end(0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row_ + team_warp_ * 16 + lane_ / 4 + 8 * i;
      row_begin_[i] = keys.band.begin(row % queries_);
      row_end_[i] = row < rows_ ? keys.band.end(row % queries_) : 0;
    }
    stream();
    merge(plan);
  }

 private:
  __device__ __forceinline__ int64_t head_of(int row) const { return kv_head_ * (rows_ / queries_) + row / queries_; }

  // -- copies

  __device__ __forceinline__ int first_key(int step) const { return begin_ + (step * kTeams + team_) * kKeys; }
  __device__ __forceinline__ int own_key(int step) const { return first_key(step) + team_warp_ * 16 + lane_ % 16; }

  // Position of this lane's key in a step: its block, or its sequence, and the slot therein.
  struct Cell {
    int64_t block, slot;
  };

  __device__ __forceinline__ Cell cell(int step) const {
    const int key = own_key(step);
    if (!p_.block_table || key >= end_) return {batch_, key};
    const unsigned slots = static_cast<unsigned>(p_.slots), at = static_cast<unsigned>(key) / slots;
    const int64_t entry = ld_global(p_.block_table + batch_ * p_.table_batch_stride + at * p_.table_block_stride);
    return {entry < 0 ? 0 : entry >= p_.blocks ? p_.blocks - 1 : entry, key - at * slots};
  }

  // The same from the beginnings: in bytes of the keys (lanes 16-31: of the values), and in elements of their scales; 0
  // for no key.
  struct Place {
    int64_t vector, scale;
  };

  __device__ __forceinline__ Place place(int step, const Cell& cell) const {
    if (own_key(step) >= end_) return {0, 0};
    const bool value = lane_ >= 16;
    const HeadStrides& scales = value ? p_.v_scale_strides : p_.k_scale_strides;
    return {(value ? p_.v_strides : p_.k_strides).offset(cell.block, kv_head_, cell.slot) * int64_t{sizeof(C)},
            kCodes ? scales.offset(cell.block, kv_head_, cell.slot) : 0};
  }

  __device__ __forceinline__ uint32_t tile(int step, bool values) const {
    return ptx::cvta_to_shared(shared_) + ((team_ * kAhead + step % kAhead) * 2 + values) * kTileBytes;
  }

  // [2][kKeys] for each team and step of the ring: of keys, then of values.
  __device__ __forceinline__ float* scales(int step) const {
    return reinterpret_cast<float*>(shared_ + kTile.ring_bytes()) + (team_ * kAhead + step % kAhead) * 2 * kKeys;
  }

  // Starts this warp's 16 vectors of a step's tile, as one group of copies: zeros for keys, and steps, that do not
  // exist.
  __device__ __forceinline__ void copy(int step, bool values, const Place& place) const {
    constexpr int kPerCopy = 32 / Cells::kChunks;
    const int exist = end_ - first_key(step) - team_warp_ * 16;
    const int chunk = lane_ % Cells::kChunks, first = lane_ / Cells::kChunks;
    const int left = static_cast<int>(values ? p_.value_dim : p_.dim) * static_cast<int>(sizeof(C)) - chunk * 16;
    const int bytes = max(0, min(left, 16));
    const char* from = static_cast<const char*>(values ? p_.v_cache : p_.k_cache) + (bytes > 0 ? chunk * 16 : 0);
    const uint32_t to = tile(step, values);
#pragma unroll
    for (int row = first; row < first + 16; row += kPerCopy) {
      const int64_t vector = __shfl_sync(0xffffffffu, place.vector, row + 16 * values);
      ptx::cp_async_cg_16(to + Cells::offset(team_warp_ * 16 + row, chunk), from + vector, row < exist ? bytes : 0);
    }
    if constexpr (kCodes) {
      if (!values) {
        const float* scale = lane_ < 16 ? p_.k_scale : p_.v_scale;
        float* scale_to = scales(step) + lane_ / 16 * kKeys + team_warp_ * 16 + lane_ % 16;
        ptx::cp_async_ca_4(ptx::cvta_to_shared(scale_to), scale + place.scale, lane_ % 16 < exist ? 4 : 0);
      }
    }
    ptx::cp_async_commit_group();
  }

  // The next tile has landed for all of the team, and the team has read the one before it.
  __device__ __forceinline__ static void wait() {
    ptx::cp_async_wait_group<2 * kAhead - 2>();
    if constexpr (kTeamWarps == 1)
      __syncwarp();
    else
      __syncthreads();
  }

  __device__ __forceinline__ void stream() {
    const bool active = first_row_ + team_warp_ * 16 < rows_;
    load_queries();
    Place place_of_values{};
#pragma unroll 1
    for (int step = 0; step < kAhead; ++step) {
      const Place here = place(step, cell(step));
      copy(step, false, here);
      if (step < kAhead - 1)
        copy(step, true, here);
      else
        place_of_values = here;
    }
    Cell next_cell = cell(kAhead);
    for (int step = 0; step < steps_; ++step) {
      wait();
      copy(step + kAhead - 1, true, place_of_values);
      uint32_t weights[kKeys / 16][4];
      if (active) attend(step, weights);
      place_of_values = place(step + kAhead, next_cell);
      next_cell = cell(step + kAhead + 1);
      wait();
      copy(step + kAhead, false, place_of_values);
      if (active) add_values(tile(step, true), weights);
    }
  }

  // -- products

  // The operands of columns 16k to 16k + 15.  Where the keys are codes, column 4t + c of these is element 2t + c / 2 of
  // the first eight (even c) or of the last (odd c).
  __device__ __forceinline__ void load_queries() {
    const T* rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row_ + team_warp_ * 16 + lane_ / 4 + 8 * i;
      const T* q = static_cast<const T*>(p_.q) + p_.q_strides.offset(batch_, head_of(row), row % queries_);
      rows[i] = row < rows_ ? q : nullptr;
    }
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t q[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        auto load = [&]<class V>(int column, V zero) {
          return rows[i] && column < p_.dim ? ld_global(reinterpret_cast<const V*>(rows[i] + column)) : zero;
        };
        if constexpr (kCodes) {
          const uint2 four = load(16 * k + lane_ % 4 * 4, uint2{});
          q[i] = (four.x & 0xffffu) | four.y << 16, q[2 + i] = four.x >> 16 | (four.y & 0xffff0000u);
        } else {
          q[i] = load(16 * k + lane_ % 4 * 2, 0u), q[2 + i] = load(16 * k + lane_ % 4 * 2 + 8, 0u);
        }
      }
      if constexpr (kQueriesInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) q_[k][i] = q[i];
      } else {
        st_shared(queries(k), uint4{q[0], q[1], q[2], q[3]});
      }
    }
  }

  // Offset of this lane's operands of 16 columns; no other lane reads them.
  __device__ __forceinline__ uint4* queries(int k) const {
    return reinterpret_cast<uint4*>(shared_ + kTile.ring_bytes() + kTile.scales_bytes()) +
           (threadIdx.x / 32 * (kDim / 16) + k) * 32 + lane_;
  }

  __device__ __forceinline__ void operands_of_queries(int k, uint32_t (&q)[4]) const {
    if constexpr (kQueriesInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = q_[k][i];
    } else {
      const uint4 four = ld_shared(queries(k));
      q[0] = four.x, q[1] = four.y, q[2] = four.z, q[3] = four.w;
    }
  }

  // Products of the queries and a tile's keys.
  __device__ __forceinline__ void multiply(uint32_t keys, float (&scores)[kKeys / 8][4]) const {
    const uint32_t at = Cells::columns_first(keys, lane_);
    constexpr int kOperands = kCodes ? 2 : 1;  // that one ldmatrix has for each eight keys
#pragma unroll
    for (int k = 0; k < kDim / 16; k += kOperands) {
      uint32_t q[kOperands][4];
#pragma unroll
      for (int i = 0; i < kOperands; ++i) operands_of_queries(k + i, q[i]);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, Cells::at(at, j * 16, k / kOperands * 16));
#pragma unroll
        for (int high = 0; high < 2; ++high)
          if constexpr (kCodes) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
              mma<T>(scores[2 * j + high], q[i], {widen<T>(b[2 * high + i], false), widen<T>(b[2 * high + i], true)});
          } else {
            mma<T>(scores[2 * j + high], q[0], {b[2 * high], b[2 * high + 1]});
          }
      }
    }
  }

  // A step's scores into the softmax; leaves its weights as operands.
  __device__ __forceinline__ void attend(int step, uint32_t (&weights)[kKeys / 16][4]) {
    const int first = first_key(step);
    float scores[kKeys / 8][4] = {};
    multiply(tile(step, false), scores);
    // f(score, the row's index, key of the step) for all of them.
    auto each = [&](const auto& f) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) f(scores[j][i], i / 2, j * 8 + lane_ % 4 * 2 + i % 2);
    };
    if constexpr (kCodes) each([&](float& score, int, int key) { score *= ld_shared(scales(step) + key); });
    if (!scale_.raw) each([&](float& score, int, int) { score = scale_.logit(score); });
    if (first < all_from_ || first + kKeys > all_to_)
      each([&](float& score, int row, int key) {
        if (first + key < row_begin_[row] || first + key >= row_end_[row]) score = minus_infinity();
      });
    float top[2] = {top_[0], top_[1]};
    each([&](float& score, int row, int) { top[row] = fmaxf(top[row], score); });
    float shift[2], keep[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = quad_max(top[i]);
      shift[i] = finite_shift(top[i]) * scale_.log2_unit;
      // Scale the difference: scaled apart and contracted to an fma, equal maxima would not give exactly 0.
      keep[i] = ptx::ex2_approx_ftz((top_[i] - finite_shift(top[i])) * scale_.log2_unit);
      top_[i] = top[i];
      total_[i] *= keep[i];
    }
    each([&](float& score, int row, int key) {
      score = ptx::ex2_approx_ftz(score * scale_.log2_unit - shift[row]);
      total_[row] += score;
      if constexpr (kCodes) score *= ld_shared(scales(step) + kKeys + key) * kRaised;
    });
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) as_operand<T>(scores[2 * j], scores[2 * j + 1], weights[j]);
    if (__any_sync(0xffffffffu, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[j][i] *= keep[i / 2];
    }
  }

  __device__ __forceinline__ void add_values(uint32_t values, const uint32_t (&weights)[kKeys / 16][4]) {
    const uint32_t at = Cells::rows_first(values, lane_);
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j)
#pragma unroll
      for (int n = 0; n < kDim * static_cast<int>(sizeof(C)) / 32; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, Cells::at(at, j * 16, n * 16));
        if constexpr (kCodes) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd)
              mma<T>(out_[4 * n + 2 * half + odd], weights[j],
                     {widen<T>(b[2 * half], odd == 1), widen<T>(b[2 * half + 1], odd == 1)});
        } else {
          mma<T>(out_[2 * n], weights[j], {b[0], b[1]});
          mma<T>(out_[2 * n + 1], weights[j], {b[2], b[3]});
        }
      }
  }

  // Return the column of the result that out_[j][i] holds.
  __device__ __forceinline__ int column_of(int j, int i) const {
    if constexpr (kCodes) return j / 2 * 16 + lane_ % 4 * 4 + i % 2 * 2 + j % 2;
    return j * 8 + lane_ % 4 * 2 + i % 2;
  }

  // -- results

  // Puts the teams together, in the ring's place.
  __device__ __forceinline__ void merge(const AttentionDecodePlan& plan) {
    constexpr int kStride = kDim + 8;  // floats: eight rows of a team are in different banks
    float* values = reinterpret_cast<float*>(shared_);
    float2* stats = reinterpret_cast<float2*>(values + kTeams * kRows * kStride);
    ptx::cp_async_wait_group<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = team_ * kRows + team_warp_ * 16 + lane_ / 4 + 8 * i;
      const float total = quad_sum(total_[i]);
      if (lane_ % 4 == 0) st_shared(stats + row, float2{top_[i] * scale_.unit, total});
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          st_shared(values + row * kStride + column_of(j, half), out_[j][2 * i + half]);
    }
    __syncthreads();
    const int vectors = static_cast<int>(p_.value_dim) / 8;
    const int rows = min(kRows, rows_ - first_row_);
    for (int at = threadIdx.x; at < rows * vectors; at += kTile.threads()) {
      const int row = at / vectors, column = at % vectors * 8;
      RowStats all{minus_infinity(), 0.0f};
#pragma unroll
      for (int team = 0; team < kTeams; ++team) all.top = fmaxf(all.top, ld_shared(stats + team * kRows + row).x);
      float sums[8] = {};
#pragma unroll
      for (int team = 0; team < kTeams; ++team) {
        const float2 own = ld_shared(stats + team * kRows + row);
        const float factor = exp_approx(own.x - finite_shift(all.top));
        all.total += own.y * factor;
        const float lowered = factor / kRaised;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          const float4 four =
              ld_shared(reinterpret_cast<const float4*>(values + (team * kRows + row) * kStride + column + i));
          sums[i] += four.x * lowered, sums[i + 1] += four.y * lowered;
          sums[i + 2] += four.z * lowered, sums[i + 3] += four.w * lowered;
        }
      }
      const int64_t head = head_of(first_row_ + row), query = (first_row_ + row) % queries_;
      if (plan.splits == 1) {
        store_result<T>(p_, batch_, head, query, column, sums, all);
        continue;
      }
      const Parts part(p_, plan.splits, (batch_ * p_.heads + head) * p_.queries + query, split_);
      Packed<float, 8> packed;
      packed.pack(sums);
      packed.store(part.values + column);
      if (column == 0) st_global(part.stats, float2{all.top, all.total});
    }
  }

  const AttentionDecodeParams& p_;
  char* shared_;
  int lane_, team_warp_, team_, first_row_, queries_, rows_, split_;  // rows_: of the key head
  int64_t kv_head_, batch_;
  ScoreScale scale_;
  int begin_, end_, steps_, all_from_, all_to_;
  int row_begin_[2], row_end_[2];
  uint32_t q_[kQueriesInRegisters ? kDim / 16 : 1][4];
  float out_[kDim / 8][4] = {};
  float top_[2] = {minus_infinity(), minus_infinity()}, total_[2] = {};  // total: of this lane's columns
};

// nvcc takes no structs as template arguments of kernels.
LLMKERN_HOST_DEVICE constexpr Residency residency(int dim, bool one_team) {
  return AttentionDecodeTile{dim, 2, one_team}.residency();
}

template <class T, class C, int kDim, bool kOneTeam>
__global__ void __launch_bounds__(residency(kDim, kOneTeam).threads, residency(kDim, kOneTeam).blocks)
    attention_decode_kernel(const AttentionDecodeParams p, const AttentionDecodePlan plan) {
  Decode<T, C, kDim, kOneTeam>(p, plan, dynamic_shared_memory()).run(plan);
}

// One row of the result for each block; vectors of 4 columns, and what threads are left of these take further parts.
template <class T>
__global__ void __launch_bounds__(kCombine.threads, kCombine.blocks)
    combine_kernel(const AttentionDecodeParams p, const AttentionDecodePlan plan) {
  const int64_t row = blockIdx.x, query = row % p.queries, head = row / p.queries % p.heads;
  const int64_t batch = row / p.queries / p.heads;
  const Keys keys(p, plan, batch);
  const int lane = threadIdx.x % 32, vectors = static_cast<int>(p.value_dim) / 4;
  const int takers = kCombine.threads / vectors, taker = threadIdx.x / vectors, column = threadIdx.x % vectors * 4;
  const Parts parts(p, plan.splits, row, 0);

  RowStats all{minus_infinity(), 0.0f};
  for (int part = lane; part < keys.parts; part += 32) all.top = fmaxf(all.top, ld_global(parts.stats + part).x);
  all.top = warp_reduce(all.top, [](float a, float b) { return fmaxf(a, b); });
  const float shift = finite_shift(all.top);
  for (int part = lane; part < keys.parts; part += 32) {
    const float2 own = ld_global(parts.stats + part);
    all.total += own.y * exp_approx(own.x - shift);
  }
  all.total = warp_reduce(all.total, Sum());

  float sums[4] = {};
  if (taker < takers) {
#pragma unroll 4
    for (int part = taker; part < keys.parts; part += takers) {
      const float factor = exp_approx(ld_global(parts.stats + part).x - shift);
      const float4 four = ld_global(reinterpret_cast<const float4*>(parts.values + part * p.value_dim + column));
      sums[0] += four.x * factor, sums[1] += four.y * factor, sums[2] += four.z * factor, sums[3] += four.w * factor;
    }
  }
  float4* shared = reinterpret_cast<float4*>(dynamic_shared_memory());
  st_shared(shared + threadIdx.x, float4{sums[0], sums[1], sums[2], sums[3]});
  __syncthreads();
  if (taker > 0) return;
  for (int other = 1; other < takers; ++other) {
    const float4 four = ld_shared(shared + threadIdx.x + other * vectors);
    sums[0] += four.x, sums[1] += four.y, sums[2] += four.z, sums[3] += four.w;
  }
  store_result<T>(p, batch, head, query, column, sums, all);
}

AttentionDecodePlan plan_for(const AttentionDecodeParams& p, const Gpu& gpu) {
  const int64_t capacity = p.capacity();
  const int64_t window = p.window_left < 0 || p.window_left > capacity ? capacity : p.window_left + p.queries;
  return plan_attention_decode(p.batch, p.kv_heads, p.heads / p.kv_heads * p.queries, std::min(window, capacity),
                               std::max(p.dim, p.value_dim), p.k_scale ? 1 : 2, gpu);
}

template <class T, class C>
void launch_planned(const AttentionDecodeParams& p, const AttentionDecodePlan& plan, const Gpu& gpu) {
  const AttentionDecodeTile& tile = plan.tile;
  const LaunchConfig config = {static_cast<unsigned>(plan.blocks), static_cast<unsigned>(tile.threads()),
                               tile.shared_bytes()};
  auto start = [&](auto kernel) { launch("attention_decode", kernel, config, gpu, p, plan); };
  switch (tile.dim) {
    case 64:
      return start(tile.one_team ? attention_decode_kernel<T, C, 64, true> : attention_decode_kernel<T, C, 64, false>);
    case 128:
      return start(tile.one_team ? attention_decode_kernel<T, C, 128, true>
                                 : attention_decode_kernel<T, C, 128, false>);
    default:
      return start(tile.one_team ? attention_decode_kernel<T, C, 256, true>
                                 : attention_decode_kernel<T, C, 256, false>);
  }
}

}  // namespace

int64_t attention_decode_workspace_bytes(const AttentionDecodeParams& p, const Gpu& gpu) {
  const int64_t splits = plan_for(p, gpu).splits;
  return splits == 1 ? 0 : p.batch * p.heads * p.queries * splits * (p.value_dim + 2) * 4;
}

void launch_attention_decode(const AttentionDecodeParams& p, const Gpu& gpu) {
  const int64_t rows = p.batch * p.heads * p.queries;
  if (rows == 0) return;  // an empty grid is a launch error
  const AttentionDecodePlan plan = plan_for(p, gpu);
  const LaunchConfig combine = {static_cast<unsigned>(rows), kCombine.threads, kCombineSharedBytes};
  auto start = [&]<class T>() {
    p.k_scale ? launch_planned<T, int8_t>(p, plan, gpu) : launch_planned<T, T>(p, plan, gpu);
    if (plan.splits > 1) launch("attention_decode_combine", combine_kernel<T>, combine, gpu, p, plan);
  };
  p.dtype == DType::bf16 ? start.template operator()<BFloat16>() : start.template operator()<Float16>();
}

}  // namespace llmkern
