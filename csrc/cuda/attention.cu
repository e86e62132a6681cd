// attention: out = softmax(mask(softcap · tanh(q·kᵀ · sm_scale / softcap))) · v, after FlashAttention-2 (Dao 2023,
// arXiv:2307.08691): softmax online, scores never in memory.
//
// tiles    a block takes block_m queries of a head, 16 or 32 for each warp, against block_n keys at a time, by
//          mma.m16n8k16; a warp has whole rows of scores, which as weights are the next product's operand, in registers
// smem     block_m x dim queries; then stages of block_n x dim keys and as many values (llmkern/plan.h), swizzled
//          (common/attention.cuh).  At the end a warp's queries give way to its results, for stores of 16 bytes
// copies   cp.async, a software pipeline over keys, values, keys, values, ...: wait for a tile, then start the copy
//          that overwrites the tile just consumed; 1 or 3 copies stay in flight
// bands    blocks of keys hidden from the whole tile are skipped; blocks visible to the whole tile run a loop without
//          masks, all others (the band's edges, or every block under a mask) a loop with them
// regs     query operands as far as they fit, the accumulated output, and the scores of one block of keys; what a block
//          of keys needs once is read from shared memory
// padding  head dimensions are padded with zeros to 64, 128 or 256; the last quarter is skipped where it is all padding
// numbers  scores, maxima and sums in fp32, exponentials in base 2, weights rounded to T for the product with v
// threads  lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next, of each 16x8
// needs    sm_80; bf16 or fp16; dims that are multiples of 8, at most 256; rows aligned to 16 bytes
#include "llmkern/attention.h"

#include "common/attention.cuh"
#include "llmkern/plan.h"

namespace llmkern {
namespace {

// One warp's queries: their softmax so far.
template <class T, int kDim, int kTilesM, int kTilesN, int kHeld>
struct WarpRows {
  using Rows = Tile<kDim>;
  uint32_t queries;                              // in shared memory: this lane's row of the first matrices
  uint32_t held[kTilesM][kHeld ? kHeld : 1][4];  // the first steps' queries as operands
  float out[kTilesM][kDim / 8][4] = {};
  float maximum[kTilesM][2], sum[kTilesM][2] = {};  // of scores; of exponentials, this lane's columns only

  __device__ __forceinline__ WarpRows(uint32_t tile, int lane) : queries(Rows::rows_first(tile, lane)) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) maximum[i][0] = maximum[i][1] = minus_infinity();
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int k = 0; k < kHeld; ++k) ptx::ldmatrix_x4(held[i][k], Rows::at(queries, i * 16, k * 16));
  }

  // s = q · kᵀ in kSteps of 16 dimensions; keys: this lane's row of the first matrices.
  template <int kSteps>
  __device__ __forceinline__ void products(uint32_t keys, float (&s)[kTilesM][kTilesN][4]) const {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][j][e] = 0.0f;
    auto query = [&](int i, int k, uint32_t (&q)[4]) {
      if (k < kHeld) {
#pragma unroll
        for (int e = 0; e < 4; ++e) q[e] = held[i][k % (kHeld ? kHeld : 1)][e];
      } else {
        ptx::ldmatrix_x4(q, Rows::at(queries, i * 16, k * 16));
      }
    };
    multiply_transposed<T, kDim, kSteps>(s, query, keys);
  }

  // Scores to weights, not yet divided by their sum; what was summed before is brought to the new maximum.
  template <bool kMasked>
  __device__ __forceinline__ void weigh(float (&s)[kTilesM][kTilesN][4], float log2_unit) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = maximum[i][half];
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) top = fmaxf(top, fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
        top = quad_max(top);
        const float shift = finite_shift(top), scaled_shift = shift * log2_unit;
        const float factor = ptx::ex2_approx_ftz((maximum[i][half] - shift) * log2_unit);
        float total = 0.0f;
#pragma unroll
        for (int j = 0; j < kTilesN; ++j)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            // A logit of -3e38 from an additive mask times log2(e) would overflow.
            const float exponent = kMasked ? (s[i][j][e] - shift) * log2_unit : s[i][j][e] * log2_unit - scaled_shift;
            s[i][j][e] = ptx::ex2_approx_ftz(exponent);
            total += s[i][j][e];
          }
        maximum[i][half] = top;
        sum[i][half] = sum[i][half] * factor + total;
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) out[i][d][2 * half] *= factor, out[i][d][2 * half + 1] *= factor;
      }
  }

  // out += weights · v, in its first kDims dimensions; values: this lane's row of the first matrices.
  template <int kDims>
  __device__ __forceinline__ void add_values(uint32_t values, const float (&s)[kTilesM][kTilesN][4]) {
    auto weights = [&](int i, int k, uint32_t (&a)[4]) { as_operand<T>(s[i][2 * k], s[i][2 * k + 1], a); };
    multiply<T, kDim, kDims, kTilesN / 2>(out, weights, values);
  }
};

// Work of a block.  It is kept in shared memory: registers are needed for sums.
struct alignas(16) Place {
  int batch, head, first_query;
  int inner, outer;   // blocks of keys from inner to outer - 1 are seen by all queries
  const void *k, *v;  // of its key head
};
static_assert(sizeof(Place) == kAttentionPlaceBytes);

// Heads in sections of heads_at_once; within one the last queries' blocks of all its heads come first.
template <class T>
__device__ __forceinline__ Place place_of(const AttentionParams& p, const AttentionPlan& plan, const Band& band) {
  const int heads = static_cast<int>(p.heads), block = static_cast<int>(blockIdx.x);
  const int section_blocks = plan.heads_at_once * plan.query_blocks, within = block % section_blocks;
  const int first_head = block / section_blocks * plan.heads_at_once;
  const int section = min(static_cast<int>(p.batch) * heads - first_head, plan.heads_at_once);
  Place here;
  here.batch = (first_head + within % section) / heads, here.head = (first_head + within % section) % heads;
  here.first_query = (plan.query_blocks - 1 - within / section) * plan.tile.block_m;
  const int last_query = min(here.first_query + plan.tile.block_m, band.queries) - 1;
  here.inner = (band.begin(last_query) + plan.tile.block_n - 1) / plan.tile.block_n;
  here.outer = p.mask || p.key_padding ? 0 : band.end(here.first_query) / plan.tile.block_n;
  const int kv_head = here.head / (heads / static_cast<int>(p.kv_heads));
  here.k = static_cast<const T*>(p.k) + p.k_strides.offset(here.batch, kv_head, 0);
  here.v = static_cast<const T*>(p.v) + p.v_strides.offset(here.batch, kv_head, 0);
  return here;
}

// Hides what the band, key padding and the mask hide.  query: of s[0][0][0]; key: the block's first.
template <bool kMasks, int kTilesM, int kTilesN>
__device__ __forceinline__ void hide_scores(float (&s)[kTilesM][kTilesN][4], const AttentionParams& p, const Band& band,
                                            const Place* kept, int query, int key) {
  const ScoreMask mask(p, ld_shared(&kept->batch), ld_shared(&kept->head));
  const int lane = threadIdx.x % 32, column = key + lane % 4 * 2;
  auto each_row = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = query + 16 * i + 8 * half, begin = band.begin(row), end = band.end(row);
#pragma unroll
        for (int j = 0; j < kTilesN; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            f(s[i][j][2 * half + e], row, column + 8 * j + e, column + 8 * j + e >= begin && column + 8 * j + e < end);
      }
  };
  if (kMasks && mask.mask)
    each_row([&](float& score, int row, int column, bool seen) {
      score = seen ? mask(score, row, column) : minus_infinity();
    });
  else
    each_row([](float& score, int, int, bool seen) { score = seen ? score : minus_infinity(); });
  if (mask.padding) {
#pragma unroll
    for (int j = 0; j < kTilesN; j += 4) {  // 32 keys: one for each lane to look at
      const int own = key + 8 * j + lane;
      const unsigned hidden = __ballot_sync(0xffffffffu, own < band.keys && mask.is_padding(own)) >> lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int i = 0; i < kTilesM; ++i)
            if (hidden >> (8 * n + e % 2) & 1) s[i][j + n][e] = minus_infinity();
    }
  }
}

template <class T, int kDim, bool kLarge, bool kCompact>
__global__ void __launch_bounds__(attention_tile(kDim, kLarge, kCompact).threads(),
                                  attention_tile(kDim, kLarge, kCompact).resident)
    attention_kernel(const AttentionParams p, const AttentionPlan plan, const Band band, const ScoreScale scale) {
  constexpr AttentionTile kTile = attention_tile(kDim, kLarge, kCompact);
  constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kThreads = kTile.threads(), kStages = kTile.stages;
  constexpr int kTilesM = kBlockM / kTile.warps / 16, kTilesN = kBlockN / 8;
  constexpr int kAhead = 2 * kStages - 1;  // copies on their way
  constexpr int kNarrow = kDim * 3 / 4;    // dimensions: up to so many have loops of their own
  using Rows = Tile<kDim>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const Place here = place_of<T>(p, plan, band);
  const T* q = static_cast<const T*>(p.q) + p.q_strides.offset(here.batch, here.head, here.first_query);
  Place* kept = reinterpret_cast<Place*>(dynamic_shared_memory() + kTile.shared_bytes() - kAttentionPlaceBytes);
  if (threadIdx.x == 0) {
    st_shared(&kept->batch, here.batch), st_shared(&kept->head, here.head);
    st_shared(&kept->first_query, here.first_query);
    st_shared(&kept->inner, here.inner), st_shared(&kept->outer, here.outer);
    st_shared(&kept->k, here.k), st_shared(&kept->v, here.v);
  }

  // Blocks of keys that some query sees.
  const int last_query = min(here.first_query + kBlockM, band.queries) - 1;
  const int low = band.begin(here.first_query) / kBlockN, high = (band.end(last_query) + kBlockN - 1) / kBlockN;

  const uint32_t shared = ptx::cvta_to_shared(dynamic_shared_memory());
  auto stage = [&](int block, bool of_values) {
    return shared + Rows::bytes(kBlockM) + (2 * (block % kStages) + of_values) * Rows::bytes(kBlockN);
  };
  auto copy = [&](int block, bool of_values, const void* from) {
    if (block < high) {
      const int64_t stride = of_values ? p.v_strides.position : p.k_strides.position;
      copy_tile<kDim, kBlockN, kThreads>(stage(block, of_values), static_cast<int>(of_values ? p.value_dim : p.dim),
                                         static_cast<const T*>(from) + block * kBlockN * stride, stride,
                                         band.keys - block * kBlockN);
    }
    ptx::cp_async_commit_group();  // an empty group too, so that the count of groups is that of copies
  };

  copy_tile<kDim, kBlockM, kThreads>(shared, static_cast<int>(p.dim), q, p.q_strides.position,
                                     band.queries - here.first_query);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) copy(low + i / 2, i % 2, i % 2 ? here.v : here.k);
  ptx::cp_async_wait_group<kAhead - 1>();
  __syncthreads();
  const uint32_t own_queries = shared + Rows::bytes(warp * kTilesM * 16);
  WarpRows<T, kDim, kTilesM, kTilesN, kTile.held> rows(own_queries, lane);

  auto visit = [&]<bool kMasked>(int block) {
    float s[kTilesM][kTilesN][4];
    ptx::cp_async_wait_group<kAhead - 1>();
    __syncthreads();  // the keys have landed, and nobody reads the values that are overwritten next
    copy(block + kStages - 1, true, ld_shared(&kept->v));
    const uint32_t keys = Rows::columns_first(stage(block, false), lane);
    if (p.dim <= kNarrow)
      rows.template products<kNarrow / 16>(keys, s);
    else
      rows.template products<kDim / 16>(keys, s);
    if (!scale.raw) {
#pragma unroll
      for (int i = 0; i < kTilesM * kTilesN * 4; ++i) {
        float& score = s[i / 4 / kTilesN][i / 4 % kTilesN][i % 4];
        score = scale.logit(score);
      }
    }
    if constexpr (kMasked) {
      const int query = ld_shared(&kept->first_query) + warp * kTilesM * 16 + lane / 4;
      hide_scores<kTile.masks>(s, p, band, kept, query, block * kBlockN);
    }
    rows.template weigh<kMasked>(s, scale.log2_unit);
    ptx::cp_async_wait_group<kAhead - 1>();
    __syncthreads();  // the same for values and keys
    copy(block + kStages, false, ld_shared(&kept->k));
    const uint32_t values = Rows::rows_first(stage(block, true), lane);
    if (p.value_dim <= kNarrow)
      rows.template add_values<kNarrow>(values, s);
    else
      rows.template add_values<kDim>(values, s);
  };
  for (int block = low; block < high;) {
    const int inner = ld_shared(&kept->inner), outer = ld_shared(&kept->outer);
    if (inner <= block && block < outer) {
      for (; block < outer; ++block) visit.template operator()<false>(block);
    } else {
      for (const int end = block < inner && inner < outer ? inner : high; block < end; ++block)
        visit.template operator()<true>(block);
    }
  }

  const int64_t batch = ld_shared(&kept->batch), head = ld_shared(&kept->head);
  const int first_row = ld_shared(&kept->first_query) + warp * kTilesM * 16;
  char* results = dynamic_shared_memory() + Rows::bytes(warp * kTilesM * 16);
  float sink[1] = {minus_infinity()};
  if (p.sinks) load_as_float(p.sinks, p.sinks_dtype, head, sink);
  __syncwarp();  // all its lanes have read the queries that results take the place of
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float logit = rows.maximum[i][half] * scale.unit, shift = finite_shift(fmaxf(logit, sink[0]));
      const float factor = exp_approx(logit - shift);
      const float sum = quad_sum(rows.sum[i][half]) * factor + exp_approx(sink[0] - shift);
      const float inverse = sum == 0.0f ? 0.0f : factor * ptx::rcp_approx_ftz(sum);
      const int row = i * 16 + half * 8 + lane / 4;
      if (p.lse && lane % 4 == 0 && first_row + row < band.queries)
        st_global(p.lse + (batch * p.heads + head) * p.queries + first_row + row,
                  sum == 0.0f ? minus_infinity() : shift + logf(sum));
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        st_shared(reinterpret_cast<uint32_t*>(results + Rows::offset(row, d) + lane % 4 * 4),
                  pack_pair<T>(rows.out[i][d][2 * half] * inverse, rows.out[i][d][2 * half + 1] * inverse));
    }
  __syncwarp();
  T* out = static_cast<T*>(p.out) + p.out_strides.offset(batch, head, first_row);
  const int chunk = lane % Rows::kChunks;
#pragma unroll
  for (int row = lane / Rows::kChunks; row < kTilesM * 16; row += 32 / Rows::kChunks)
    if (first_row + row < band.queries && chunk * 8 < p.value_dim)
      st_global(reinterpret_cast<uint4*>(out + row * p.out_strides.position) + chunk,
                ld_shared(reinterpret_cast<const uint4*>(results + Rows::offset(row, chunk))));
}

template <class T, int kDim, bool kLarge, bool kCompact = false>
void launch_tile(const AttentionParams& p, const AttentionPlan& plan, const Gpu& gpu) {
  const LaunchConfig config = {static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.tile.threads()),
                               plan.tile.shared_bytes()};
  const Band band(p.queries, p.keys, p.window_left, p.window_right, p.causal);
  const ScoreScale scale(p.sm_scale, p.softcap, p.mask && !p.mask_is_bool);
  launch("attention", attention_kernel<T, kDim, kLarge, kCompact>, config, gpu, p, plan, band, scale);
}

template <class T>
void launch_planned(const AttentionParams& p, const AttentionPlan& plan, const Gpu& gpu) {
  if (plan.tile.dim == 64)
    plan.large ? launch_tile<T, 64, true>(p, plan, gpu) : launch_tile<T, 64, false>(p, plan, gpu);
  else if (plan.compact)
    plan.large ? launch_tile<T, 128, true, true>(p, plan, gpu) : launch_tile<T, 128, false, true>(p, plan, gpu);
  else if (plan.tile.dim == 128)
    plan.large ? launch_tile<T, 128, true>(p, plan, gpu) : launch_tile<T, 128, false>(p, plan, gpu);
  else
    launch_tile<T, 256, true>(p, plan, gpu);
}

}  // namespace

void launch_attention(const AttentionParams& p, const Gpu& gpu) {
  const AttentionPlan plan =
      plan_attention(p.batch, p.heads, p.kv_heads, p.queries, p.keys, p.dim, p.value_dim, p.mask != nullptr, gpu);
  if (plan.blocks == 0) return;  // an empty grid is a launch error
  if (p.dtype == DType::bf16)
    launch_planned<BFloat16>(p, plan, gpu);
  else
    launch_planned<Float16>(p, plan, gpu);
}

}  // namespace llmkern
