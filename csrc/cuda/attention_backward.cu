// attention_backward: the gradients of attention (llmkern/attention_backward.h), the same bits every time: no atomics
//
// launches  row_sums   where lse was not kept, or is too coarse: each row's maximum and sum of exponentials, once more
//           prepare    Δ of each row, and the shift of its scores
//           sink       one block per head
//           dkv        own rows are keys: K, V are kept, Q, dO of the group's heads walked   dK += dSᵀ·Q, dV += Pᵀ·dO
//           dk, dv     the same apart, for 256 dimensions
//           dq         own rows are queries: Q, dO are kept, K, V walked                     dQ += dS·K
//           dmask      own is a tile of the mask                                             dmask += dS
//           Row sums and the gradients of q, k and v are one kernel, for whose two pairs of operands
//             S = own[0] · walked[0]ᵀ,  dP = own[1] · walked[1]ᵀ
//             sums[0] += dS · walked[0],  sums[1] += P · walked[1]
// tiles     a GradientTile (llmkern/plan.h): own rows x steps of walked rows; mma.m16n8k16, a warp for 16 or 32 of
//           the own rows.  S and dP come out of the tensor cores where the next products want their left operands
// smem      own tiles | 2 stages of walked tiles (common/attention.cuh's Tile) | three numbers of each query that is
//           kept, or of each in both stages
// steps     steps hidden from all own rows are skipped; steps that are fully visible take a path without masks
// needs     sm_80; head dimensions in multiples of 8 up to 256, vectors aligned to 16 bytes
#include "llmkern/attention_backward.h"

#include "common/attention.cuh"
#include "common/reduce.cuh"
#include "llmkern/plan.h"

namespace llmkern {
namespace {

// The workspace: for each row of [batch, heads, queries] what is subtracted from its logits, what its exponentials are
// multiplied by, and Δ.
enum RowNumber { kShift, kFactor, kDelta, kRowNumbers };

__device__ __forceinline__ float* row_number(const AttentionBackwardParams& p, RowNumber which) {
  return p.workspace + which * (p.forward.batch * p.forward.heads * p.forward.queries);
}

// A mask of numbers like -3e38 leaves no digits of the sum of exponentials in a log-sum-exp.
LLMKERN_HOST_DEVICE bool is_additive(const AttentionParams& p) {
  return p.mask && !p.mask_is_bool;
}

// A matrix [batch, heads, length, dim] at one batch and head.
template <class T>
struct Head {
  const T* first;
  int64_t stride;
  int length, dim;

  __device__ __forceinline__ Head(const void* tensor, const HeadStrides& strides, int64_t batch, int64_t head,
                                  int64_t length, int64_t dim)
      : first(static_cast<const T*>(tensor) + strides.offset(batch, head, 0)),
        stride(strides.position),
        length(static_cast<int>(length)),
        dim(static_cast<int>(dim)) {}

  template <int kDim, int kRows, int kThreads>
  __device__ __forceinline__ void copy(uint32_t tile, int from) const {
    copy_tile<kDim, kRows, kThreads>(tile, dim, first + from * stride, stride, length - from);
  }
};

// results[16 * kTiles][8 * kColumns] += left · rightᵀ, tiles of kDim columns each.
template <class T, int kDim, int kTiles, int kColumns>
__device__ __forceinline__ void add_products(float (&results)[kTiles][kColumns][4], uint32_t left, uint32_t right,
                                             int lane) {
  left = Tile<kDim>::rows_first(left, lane);
  auto operand = [&](int i, int k, uint32_t (&a)[4]) { ptx::ldmatrix_x4(a, Tile<kDim>::at(left, 16 * i, 16 * k)); };
  multiply_transposed<T, kDim, kDim / 16>(results, operand, Tile<kDim>::columns_first(right, lane));
}

// sums[16 * kTiles][kDim] += left · right, whose tile has 16 * kSteps rows; `left` as operands of mma.
template <class T, int kDim, int kTiles, int kSteps>
__device__ __forceinline__ void accumulate(float (&sums)[kTiles][kDim / 8][4],
                                           const uint32_t (&left)[kTiles][kSteps][4], uint32_t right, int lane) {
  auto operand = [&](int i, int k, uint32_t (&a)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = left[i][k][e];
  };
  multiply<T, kDim, kDim, kSteps>(sums, operand, Tile<kDim>::rows_first(right, lane));
}

// The logit of a query and a key, minus infinity where it is hidden, and its slope in what scales the product.
template <bool kCapped, bool kHidden>
__device__ __forceinline__ float logit_of(float product, const ScoreScale& scale, const Band& band,
                                          const ScoreMask& mask, int query, int key, float& slope) {
  float logit = kCapped ? scale.logit(product) : product * scale.sm_scale;
  slope = kCapped ? 1.0f - (logit * scale.inverse_cap) * (logit * scale.inverse_cap) : 1.0f;
  if constexpr (kHidden) {
    const bool real = key < band.keys && !(mask.padding && mask.is_padding(key));
    if (!real || key < band.begin(query) || key >= band.end(query)) return minus_infinity();
    if (mask.mask) return mask(logit, query, key);
  }
  return logit;
}

// Writes a warp's 16 * kTiles rows of `dim` columns, times a factor, by way of a tile of its own: 16 bytes per access.
template <class T, int kDim, int kTiles>
__device__ __forceinline__ void store(T* out, int rows, int dim, const float (&sums)[kTiles][kDim / 8][4], float factor,
                                      char* tile, int lane) {
  using Rows = Tile<kDim>;
  __syncwarp();  // all its lanes have read the tile: ldmatrix, as others read it, orders no memory
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        st_shared(reinterpret_cast<uint32_t*>(tile + Rows::offset(16 * i + 8 * h + lane / 4, n)) + lane % 4,
                  pack_pair<T>(sums[i][n][2 * h] * factor, sums[i][n][2 * h + 1] * factor));
  __syncwarp();
#pragma unroll
  for (int at = 0; at < 16 * kTiles * Rows::kChunks; at += 32) {
    const int row = (at + lane) / Rows::kChunks, chunk = (at + lane) % Rows::kChunks;
    const uint4 vector = ld_shared(reinterpret_cast<const uint4*>(tile + Rows::offset(row, chunk)));
    if (row < rows && chunk * 8 < dim)
      st_global(reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * dim + chunk * 8), vector);
  }
}

template <class T, int kDim, GradientPart kPart>
__global__ void __launch_bounds__(gradient_tile(kDim, kPart).threads(), gradient_tile(kDim, kPart).resident)
    attention_gradient_kernel(const AttentionBackwardParams p, const Band band, const ScoreScale scale) {
  constexpr GradientTile kTile = gradient_tile(kDim, kPart);
  constexpr bool kOfKeys = kPart == GradientPart::dkv || kPart == GradientPart::dk || kPart == GradientPart::dv;
  constexpr bool kSumsOnly = kPart == GradientPart::row_sums;
  constexpr bool kFirst = !kSumsOnly && kPart != GradientPart::dv;                   // sums[0], for which dP is needed
  constexpr bool kSecond = kPart == GradientPart::dkv || kPart == GradientPart::dv;  // sums[1]
  constexpr int kTiles = kTile.own / (16 * kTile.warps), kColumns = kTile.step / 8, kThreads = kTile.threads();
  constexpr int kOwnBytes = kTile.own * Tile<kDim>::kRowBytes, kWalkedBytes = kTile.step * Tile<kDim>::kRowBytes;
  constexpr int kStageBytes = (kSumsOnly ? 1 : 2) * kWalkedBytes;

  const AttentionParams& f = p.forward;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = static_cast<int>(f.heads / f.kv_heads);

  // The block's own rows, the longest walks of causal attention first: of the last queries, and of the first keys.
  const int own_length = kOfKeys ? band.keys : band.queries;
  const int blocks = (own_length + kTile.own - 1) / kTile.own, matrix = static_cast<int>(blockIdx.x) / blocks;
  const int own_block = static_cast<int>(blockIdx.x) % blocks;
  const int own_first = (kOfKeys ? own_block : blocks - 1 - own_block) * kTile.own;
  const int own_end = own_first + kTile.own < own_length ? own_first + kTile.own : own_length;
  const int own_heads = static_cast<int>(kOfKeys ? f.kv_heads : f.heads), batch = matrix / own_heads;
  const int own_head = matrix % own_heads;
  const int kv_head = kOfKeys ? own_head : own_head / group, first_head = kOfKeys ? own_head * group : own_head;

  // Rows to walk: `low` to `high` of one head of k and v, or of each of the group's heads of q and dO in turn.
  int low, high;
  if constexpr (kOfKeys)
    low = band.first_query(own_first), high = band.last_query(own_end - 1) + 1;
  else
    low = band.begin(own_first), high = band.end(own_end - 1);
  struct Cursor {
    int member, first;
  };
  auto next = [&](Cursor at) {
    at.first += kTile.step;
    return at.first < high ? at : Cursor{at.member + 1, low};
  };
  const int members = low < high ? (kOfKeys ? group : 1) : 0;

  const Head<T> k(f.k, f.k_strides, batch, kv_head, f.keys, f.dim);
  const Head<T> v(f.v, f.v_strides, batch, kv_head, f.keys, f.value_dim);
  auto q = [&](int member) { return Head<T>(f.q, f.q_strides, batch, first_head + member, f.queries, f.dim); };
  auto dout = [&](int member) {
    return Head<T>(p.dout, p.dout_strides, batch, first_head + member, f.queries, f.value_dim);
  };
  auto rows_of = [&](int member) { return (int64_t{batch} * f.heads + first_head + member) * f.queries; };

  char* shared = dynamic_shared_memory();
  constexpr int kOwnTiles = kSumsOnly || kPart == GradientPart::dv ? 1 : 2;
  char* stages = shared + kOwnTiles * kOwnBytes;
  // The queries' numbers: [kRowNumbers][kTile.own], or [stage][kRowNumbers][kTile.step] where these are walked.
  float* row_numbers = reinterpret_cast<float*>(stages + 2 * kStageBytes);
  const uint32_t own[] = {ptx::cvta_to_shared(shared), ptx::cvta_to_shared(shared) + kOwnBytes};
  auto walked = [&](int stage) { return ptx::cvta_to_shared(stages) + stage * kStageBytes; };

  // All numbers of so many queries, at most one for each thread.
  auto copy_numbers = [&](float* to, int count, Cursor at) {
    const int query = at.first + static_cast<int>(threadIdx.x);
    const bool read = query < band.queries;
    if (static_cast<int>(threadIdx.x) >= count) return;
#pragma unroll
    for (int number = 0; number < kRowNumbers; ++number) {
      const float* from = row_number(p, static_cast<RowNumber>(number)) + rows_of(at.member) + query;
      ptx::cp_async_ca_4(ptx::cvta_to_shared(to + number * count + threadIdx.x), read ? from : nullptr, read ? 4 : 0);
    }
  };
  auto copy_walked = [&](int stage, Cursor at) {
    const uint32_t to = walked(stage);
    if constexpr (kOfKeys) {
      q(at.member).template copy<kDim, kTile.step, kThreads>(to, at.first);
      dout(at.member).template copy<kDim, kTile.step, kThreads>(to + kWalkedBytes, at.first);
      copy_numbers(row_numbers + stage * kRowNumbers * kTile.step, kTile.step, at);
    } else {
      k.template copy<kDim, kTile.step, kThreads>(to, at.first);
      if constexpr (!kSumsOnly) v.template copy<kDim, kTile.step, kThreads>(to + kWalkedBytes, at.first);
    }
  };
  if (members > 0) {
    if constexpr (kOfKeys) {
      k.template copy<kDim, kTile.own, kThreads>(own[0], own_first);
      if constexpr (kOwnTiles == 2) v.template copy<kDim, kTile.own, kThreads>(own[1], own_first);
    } else {
      q(0).template copy<kDim, kTile.own, kThreads>(own[0], own_first);
      if constexpr (kOwnTiles == 2) dout(0).template copy<kDim, kTile.own, kThreads>(own[1], own_first);
      if constexpr (!kSumsOnly) copy_numbers(row_numbers, kTile.own, {0, own_first});
    }
    copy_walked(0, {0, low});
  }
  ptx::cp_async_commit_group();

  // A lane's own rows are own_row(lane, i, h); of each step it has the walked rows column(lane, j, c), as element
  // 2 * h + c.
  const int warp_row = warp * 16 * kTiles;
  auto own_row = [&](int lane, int i, int h) { return own_first + warp_row + 16 * i + 8 * h + lane / 4; };
  auto column = [](int lane, int j, int c) { return 8 * j + lane % 4 * 2 + c; };

  float sums[2][kTiles][kDim / 8][4] = {};  // one of them, or both, are not used and cost nothing
  float maxima[kTiles][2], totals[kTiles][2] = {};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) maxima[i][0] = maxima[i][1] = minus_infinity();

  Cursor at{0, low};
  for (int step = 0; at.member < members; ++step) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // this step's tiles have landed, and nobody reads the stage that is filled next
    if (const Cursor following = next(at); following.member < members) copy_walked((step + 1) % 2, following);
    ptx::cp_async_commit_group();

    const int lane = ptx::laneid();  // what depends on it is not kept in registers from step to step
    const uint32_t tiles = walked(step % 2), own_offset = warp_row * Tile<kDim>::kRowBytes;
    float s[kTiles][kColumns][4] = {};
    add_products<T, kDim>(s, own[0] + own_offset, tiles, lane);

    const ScoreMask mask(f, batch, first_head + at.member);
    const int first_query = kOfKeys ? at.first : own_first,
              last_query = kOfKeys ? at.first + kTile.step - 1 : own_end - 1;
    const int first_key = kOfKeys ? own_first : at.first, end_key = kOfKeys ? own_end : at.first + kTile.step;
    const bool all_visible = !mask.any() && band.begin(last_query) <= first_key && end_key <= band.end(first_query);
    const float* numbers = row_numbers + (kOfKeys ? step % 2 * kRowNumbers * kTile.step : 0);
    auto number = [&](RowNumber which, int i, int h, int j, int c) {
      return kOfKeys ? ld_shared(numbers + which * kTile.step + column(lane, j, c))
                     : ld_shared(numbers + which * kTile.own + warp_row + 16 * i + 8 * h + lane / 4);
    };
    auto each = [&](const auto& f) {  // f(i, h, j) for each pair, c = 0 and 1, of this lane's scores
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) f(i, h, j);
    };

    // P as an operand, and in `s` what of dS's factors does not depend on dP: P times the slope.
    uint32_t operands[kTiles][kColumns / 2][4];
    auto weigh = [&]<bool kCapped, bool kHidden>() {
      each([&](int i, int h, int j) {
        [[maybe_unused]] float weights[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = s[i][j][2 * h + c];
          const int own = own_row(lane, i, h), other = at.first + column(lane, j, c);
          [[maybe_unused]] float slope;
          const float logit =
              logit_of<kCapped, kHidden>(score, scale, band, mask, kOfKeys ? other : own, kOfKeys ? own : other, slope);
          if constexpr (kSumsOnly) {
            const float maximum = fmaxf(maxima[i][h], logit), shift = finite_shift(maximum);
            totals[i][h] = totals[i][h] * exp_approx(maxima[i][h] - shift) + exp_approx(logit - shift);
            maxima[i][h] = maximum;
          } else {
            weights[c] = exp_approx(logit - number(kShift, i, h, j, c));
            if (kHidden) weights[c] *= number(kFactor, i, h, j, c);  // not 1 beside a mask of numbers only
            score = weights[c] * slope;
          }
        }
        if constexpr (kSecond) operands[i][j / 2][j % 2 * 2 + h] = pack_pair<T>(weights[0], weights[1]);
      });
    };
    if (scale.softcap > 0.0f)
      all_visible ? weigh.template operator()<true, false>() : weigh.template operator()<true, true>();
    else
      all_visible ? weigh.template operator()<false, false>() : weigh.template operator()<false, true>();
    if constexpr (kSecond) accumulate<T, kDim>(sums[1], operands, tiles + kWalkedBytes, lane);
    if constexpr (kFirst) {
      float dp[kTiles][kColumns][4] = {};
      add_products<T, kDim>(dp, own[1] + own_offset, tiles + kWalkedBytes, lane);
      each([&](int i, int h, int j) {
        float ds[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) ds[c] = s[i][j][2 * h + c] * (dp[i][j][2 * h + c] - number(kDelta, i, h, j, c));
        operands[i][j / 2][j % 2 * 2 + h] = pack_pair<T>(ds[0], ds[1]);
      });
      accumulate<T, kDim>(sums[0], operands, tiles, lane);
    }
    at = next(at);
  }

  if constexpr (kSumsOnly) {
    const bool additive = is_additive(f);
    float sink[1] = {minus_infinity()};
    if (f.sinks) load_as_float(f.sinks, f.sinks_dtype, own_head, sink);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float maximum = fmaxf(quad_max(maxima[i][h]), sink[0]), shift = finite_shift(maximum);
        const float total = quad_sum(totals[i][h] * exp_approx(maxima[i][h] - shift)) + exp_approx(sink[0] - shift);
        if (lane % 4 != 0 || own_row(lane, i, h) >= band.queries) continue;
        const int64_t row = rows_of(0) + own_row(lane, i, h);
        st_global(row_number(p, kShift) + row, additive || total == 0.0f ? shift : shift + logf(total));
        st_global(row_number(p, kFactor) + row, additive && total != 0.0f ? 1.0f / total : 1.0f);
      }
  } else {
    // Stage the result in the block's own tiles: no copy to them is in flight, and each warp alone read its rows.
    const int64_t first = static_cast<int64_t>(matrix) * own_length + own_first + warp_row;
    const int rows = own_end - own_first - warp_row, offset = warp_row * Tile<kDim>::kRowBytes;
    if constexpr (kFirst) {
      T* out = static_cast<T*>(kOfKeys ? p.dk : p.dq) + first * f.dim;
      store<T, kDim>(out, rows, static_cast<int>(f.dim), sums[0], f.sm_scale, shared + offset, lane);
    }
    if constexpr (kSecond) {
      T* out = static_cast<T*>(p.dv) + first * f.value_dim;
      char* tile = shared + (kOwnTiles - 1) * kOwnBytes + offset;
      store<T, kDim>(out, rows, static_cast<int>(f.value_dim), sums[1], 1.0f, tile, lane);
    }
  }
}

// dmask, of the mask's own shape: a block has a tile of it and walks the matrices, queries and keys over which the mask
// was broadcast.  Other blocks on the SM compute while this one's copies are on their way.
template <class T, int kDim>
__global__ void __launch_bounds__(gradient_tile(kDim, GradientPart::dmask).threads(),
                                  gradient_tile(kDim, GradientPart::dmask).resident)
    attention_dmask_kernel(const AttentionBackwardParams p, const Band band, const ScoreScale scale) {
  constexpr GradientTile kTile = gradient_tile(kDim, GradientPart::dmask);
  constexpr int kRows = kTile.own, kColumns = kTile.step, kThreads = kTile.threads();
  constexpr int kRowBytes = Tile<kDim>::kRowBytes;
  static_assert(kRows == 16 * kTile.warps);
  const AttentionParams& f = p.forward;
  const auto& sizes = p.mask_sizes;
  const bool one_row = sizes.query == 1, one_column = sizes.key == 1;
  const int row_tiles = one_row ? 1 : (band.queries + kRows - 1) / kRows;
  const int column_tiles = one_column ? 1 : (band.keys + kColumns - 1) / kColumns;
  const int tile = static_cast<int>(blockIdx.x) % (row_tiles * column_tiles);
  const int matrix = static_cast<int>(blockIdx.x) / (row_tiles * column_tiles);
  const int first_row = tile / column_tiles * kRows, first_column = tile % column_tiles * kColumns;
  const int end_row = one_row ? band.queries : first_row + 1, end_column = one_column ? band.keys : first_column + 1;
  const int mask_heads = static_cast<int>(sizes.head), group = static_cast<int>(f.heads / f.kv_heads);

  char* shared = dynamic_shared_memory();
  const uint32_t tiles = ptx::cvta_to_shared(shared);
  const uint32_t q_tile = tiles, dout_tile = tiles + kRows * kRowBytes;
  const uint32_t k_tile = tiles + 2 * kRows * kRowBytes, v_tile = k_tile + kColumns * kRowBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  float sums[kColumns / 8][4] = {};
  auto add = [&](int batch, int head, int row, int column) {
    const Head<T> q(f.q, f.q_strides, batch, head, f.queries, f.dim);
    const Head<T> dout(p.dout, p.dout_strides, batch, head, f.queries, f.value_dim);
    const Head<T> k(f.k, f.k_strides, batch, head / group, f.keys, f.dim);
    const Head<T> v(f.v, f.v_strides, batch, head / group, f.keys, f.value_dim);
    __syncthreads();  // nobody reads the tiles any more
    q.template copy<kDim, kRows, kThreads>(q_tile, row);
    dout.template copy<kDim, kRows, kThreads>(dout_tile, row);
    k.template copy<kDim, kColumns, kThreads>(k_tile, column);
    v.template copy<kDim, kColumns, kThreads>(v_tile, column);
    ptx::cp_async_commit_group();
    float numbers[kRowNumbers][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = row + warp * 16 + 8 * h + lane / 4;
      const int64_t at = (int64_t{batch} * f.heads + head) * f.queries + query;
#pragma unroll
      for (int number = 0; number < kRowNumbers; ++number)
        numbers[number][h] =
            query < band.queries ? ld_global(row_number(p, static_cast<RowNumber>(number)) + at) : 0.0f;
    }
    ptx::cp_async_wait_group<0>();
    __syncthreads();

    float s[1][kColumns / 8][4] = {}, dp[1][kColumns / 8][4] = {};
    add_products<T, kDim>(s, q_tile + warp * 16 * kRowBytes, k_tile, lane);
    add_products<T, kDim>(dp, dout_tile + warp * 16 * kRowBytes, v_tile, lane);
    const ScoreMask mask(f, batch, head);
    auto add_scores = [&]<bool kCapped>() {
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int h = e / 2, query = row + warp * 16 + 8 * h + lane / 4, key = column + 8 * j + lane % 4 * 2 + e % 2;
          float slope;
          const float logit = logit_of<kCapped, true>(s[0][j][e], scale, band, mask, query, key, slope);
          const float weight = exp_approx(logit - numbers[kShift][h]) * numbers[kFactor][h];
          sums[j][e] += weight * (dp[0][j][e] - numbers[kDelta][h]);
        }
    };
    scale.softcap > 0.0f ? add_scores.template operator()<true>() : add_scores.template operator()<false>();
  };
  for (int batch = matrix / mask_heads; batch < f.batch; batch += static_cast<int>(sizes.batch))
    for (int head = matrix % mask_heads; head < f.heads; head += mask_heads)
      for (int row = first_row; row < end_row; row += kRows) {
        const int last = row + kRows < band.queries ? row + kRows - 1 : band.queries - 1;
        for (int column = first_column; column < end_column; column += kColumns)
          if (column < band.end(last) && column + kColumns > band.begin(row)) add(batch, head, row, column);
      }

  // The tile in fp32, so that each thread adds up what becomes one number, in the same order every time.
  constexpr int kPitch = kColumns + 1;
  float* scratch = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      st_shared(scratch + (warp * 16 + e / 2 * 8 + lane / 4) * kPitch + 8 * j + lane % 4 * 2 + e % 2, sums[j][e]);
  __syncthreads();
  const int rows = one_row ? 1 : kRows, columns = one_column ? 1 : kColumns;
  for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
    const int row = i / columns, column = i % columns;
    if (first_row + row >= sizes.query || first_column + column >= sizes.key) continue;
    float total[1] = {};
    for (int r = row; r < (one_row ? kRows : row + 1); ++r)
      for (int c = column; c < (one_column ? kColumns : column + 1); ++c)
        total[0] += ld_shared(scratch + r * kPitch + c);
    const int64_t at = (int64_t{matrix} * sizes.query + first_row + row) * sizes.key + first_column + column;
    store_as(p.dmask, f.mask_dtype, at, total);
  }
}

constexpr int kRowThreads = kGradientRows.threads, kLanes = 32;  // of `prepare`: a warp per row

template <class T>
__global__ void __launch_bounds__(kRowThreads, kGradientRows.blocks)
    attention_prepare_kernel(const AttentionBackwardParams p) {
  using Vector = Packed<T, 8>;
  const AttentionParams& f = p.forward;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= f.batch * f.heads * f.queries) return;
  const int64_t query = row % f.queries, head = row / f.queries % f.heads, batch = row / f.queries / f.heads;
  const T* dout = static_cast<const T*>(p.dout) + p.dout_strides.offset(batch, head, query);
  const T* out = static_cast<const T*>(f.out) + f.out_strides.offset(batch, head, query);
  const int lane = threadIdx.x % kLanes;
  float delta = 0.0f;
  if (lane * 8 < f.value_dim) {
    Vector given, result;
    float g[8], r[8];
    given.load(dout + lane * 8), result.load(out + lane * 8);
    given.unpack(g), result.unpack(r);
#pragma unroll
    for (int i = 0; i < 8; ++i) delta += g[i] * r[i];
  }
  delta = warp_reduce(delta, Sum());
  if (lane > 0) return;
  st_global(row_number(p, kDelta) + row, p.dlse ? delta - ld_global(p.dlse + row) : delta);
  if (f.lse && !is_additive(f)) {  // else row_sums has written these
    st_global(row_number(p, kShift) + row, finite_shift(ld_global(f.lse + row)));
    st_global(row_number(p, kFactor) + row, 1.0f);
  }
}

// A sink's value is 0, so that only -P_sink · Δ is left of its gradient.
__global__ void __launch_bounds__(kRowThreads, kGradientRows.blocks)
    attention_sink_kernel(const AttentionBackwardParams p) {
  const AttentionParams& f = p.forward;
  RowReduce reduce(dynamic_shared_memory());
  const int64_t head = blockIdx.x;
  float sink[1], sum = 0.0f;
  load_as_float(f.sinks, f.sinks_dtype, head, sink);
  for (int64_t batch = 0; batch < f.batch; ++batch)
    for (int64_t query = threadIdx.x; query < f.queries; query += kRowThreads) {
      const int64_t row = (batch * f.heads + head) * f.queries + query;
      const float weight =
          expf(sink[0] - ld_global(row_number(p, kShift) + row)) * ld_global(row_number(p, kFactor) + row);
      sum -= weight * ld_global(row_number(p, kDelta) + row);
    }
  const float total[1] = {reduce(sum, Sum())};
  if (threadIdx.x == 0) store_as(p.dsinks, f.sinks_dtype, head, total);
}

template <class T, int kDim>
void launch_parts(const AttentionBackwardParams& p, const AttentionBackwardPlan& plan, const Gpu& gpu) {
  const AttentionParams& f = p.forward;
  const Band band(f.queries, f.keys, f.window_left, f.window_right, f.causal);
  const ScoreScale scale(f.sm_scale, f.softcap, true);  // weights come from logits
  auto start = [&]<GradientPart kPart>(const char* name, auto* kernel, int64_t blocks) {
    constexpr GradientTile kTile = gradient_tile(kDim, kPart);
    const LaunchConfig config = {static_cast<unsigned>(blocks), kTile.threads(), kTile.shared_bytes};
    if (blocks > 0) launch(name, kernel, config, gpu, p, band, scale);  // an empty grid is a launch error
  };
  auto start_part = [&]<GradientPart kPart>(const char* name, int64_t blocks) {
    start.template operator()<kPart>(name, attention_gradient_kernel<T, kDim, kPart>, blocks);
  };
  if (!f.lse || is_additive(f))
    start_part.template operator()<GradientPart::row_sums>("attention_row_sums", plan.query_blocks);
  constexpr int kRows = kRowThreads / kLanes;
  if (const int64_t rows = f.batch * f.heads * f.queries; rows > 0)
    launch("attention_prepare", attention_prepare_kernel<T>,
           {static_cast<unsigned>((rows + kRows - 1) / kRows), kRowThreads}, gpu, p);
  if (p.dsinks)
    launch("attention_sink", attention_sink_kernel, {static_cast<unsigned>(f.heads), kRowThreads, kRowSharedBytes}, gpu,
           p);
  if constexpr (kDim == 256) {
    start_part.template operator()<GradientPart::dk>("attention_dk", plan.key_blocks);
    start_part.template operator()<GradientPart::dv>("attention_dv", plan.key_blocks);
  } else {
    start_part.template operator()<GradientPart::dkv>("attention_dkv", plan.key_blocks);
  }
  start_part.template operator()<GradientPart::dq>("attention_dq", plan.query_blocks);
  if (const auto& sizes = p.mask_sizes; p.dmask) {
    constexpr GradientTile kTile = gradient_tile(kDim, GradientPart::dmask);
    auto tiles = [](int64_t size, int tile) { return size == 1 ? 1 : (size + tile - 1) / tile; };
    const int64_t blocks = sizes.batch * sizes.head * tiles(sizes.query, kTile.own) * tiles(sizes.key, kTile.step);
    start.template operator()<GradientPart::dmask>("attention_dmask", attention_dmask_kernel<T, kDim>, blocks);
  }
}

template <class T>
void launch_planned(const AttentionBackwardParams& p, const Gpu& gpu) {
  const AttentionParams& f = p.forward;
  const AttentionBackwardPlan plan = plan_attention_backward(f.batch, f.heads, f.kv_heads, f.queries, f.keys,
                                                             f.dim > f.value_dim ? f.dim : f.value_dim);
  if (plan.dim == 64) return launch_parts<T, 64>(p, plan, gpu);
  if (plan.dim == 128) return launch_parts<T, 128>(p, plan, gpu);
  return launch_parts<T, 256>(p, plan, gpu);
}

}  // namespace

void launch_attention_backward(const AttentionBackwardParams& p, const Gpu& gpu) {
  p.forward.dtype == DType::bf16 ? launch_planned<BFloat16>(p, gpu) : launch_planned<Float16>(p, gpu);
}

}  // namespace llmkern
