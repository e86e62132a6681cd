// Shared parts of the attention kernels (forward, decode, backward).  T is BFloat16 or Float16; sums are in fp32.
//   tiles     of shared memory, rows of kDim elements: where they lie, their copies, fragments for tensor cores
//   products  mma<T>, numbers packed as its operands, loops of it over tiles
//   scores    their scale and cap, what hides them from the softmax, exponentials
#pragma once

#include <type_traits>

#include "llmkern/attention.h"
#include "ptx.cuh"
#include "vec.cuh"

namespace llmkern {

// ---- tiles

// Rows of kDim 16-bit elements, in chunks of 16 bytes, of which a group's places are permuted by the row: the same
// chunk of eight neighbouring rows is in eight different places modulo 128 bytes, so that ldmatrix, and copies by rows,
// meet no bank twice.  A tile begins at a multiple of 128 bytes.
template <int kDim>
struct Tile {
  static constexpr int kRowBytes = 2 * kDim, kChunks = kDim / 8;
  static constexpr int kGroup = kChunks % 8 == 0 ? 8 : 4;
  static_assert(kDim % 32 == 0);

  LLMKERN_HOST_DEVICE static constexpr int bytes(int rows) { return rows * kRowBytes; }

  // Offset of a chunk from the tile's beginning.
  __device__ static __forceinline__ int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (kGroup == 8 ? row % 8 : row / 2 % 4)) * 16;
  }

  // Offset of this lane's row in the four 8x8 matrices that ldmatrix_x4 reads from the tile's upper left 16x16:
  //                   matrices (row, column)            without transposition     transposed (.trans)
  //   rows_first      (0, 0) (8, 0) (0, 8) (8, 8)       a[m][k]                   b[k][n], of n and n + 8
  //   columns_first   (0, 0) (0, 8) (8, 0) (8, 8)       b[n][k], of n and n + 8   a[k][m]
  // a: an operand of mma with 16 rows; b: two operands with 8 columns each, in registers 0, 1 and 2, 3.
  __device__ static __forceinline__ uint32_t rows_first(uint32_t tile, int lane) {
    return tile + offset(lane % 16, lane / 16);
  }
  __device__ static __forceinline__ uint32_t columns_first(uint32_t tile, int lane) {
    return tile + offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }

  // The same for the 16x16 at (row, column), multiples of 8 and of 16: one exclusive or, or none, if they are
  // constants.
  __device__ static __forceinline__ uint32_t at(uint32_t lane_address, int row, int column) {
    const int chunk = column / 8;
    return (lane_address ^ (chunk % kGroup * 16)) + chunk / kGroup * kGroup * 16 + row * kRowBytes;
  }
};

// Starts copies of kRows rows to a tile: rows that are `stride` elements apart, 16-byte aligned, of which there are
// `rows`, perhaps fewer than kRows; zeros for the others, and from column `dim`, a multiple of 8, on.  All of the
// block's kThreads threads take part; who calls it commits the group.
template <int kDim, int kRows, int kThreads, class T>
__device__ __forceinline__ void copy_tile(uint32_t tile, int dim, const T* from, int64_t stride, int rows) {
  constexpr int kChunks = Tile<kDim>::kChunks, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0);
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  from += first * stride + chunk * 8;
  if (chunk * 8 >= dim) rows = 0;
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    ptx::cp_async_cg_16(tile + Tile<kDim>::offset(first + r, chunk), from, first + r < rows ? 16 : 0);
    from += kStep * stride;
  }
}

// ---- products

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, BFloat16>)
    ptx::mma_m16n8k16_bf16(d, a, b);
  else
    ptx::mma_m16n8k16_f16(d, a, b);
}

// Convert both by one instruction; calling from_float twice would take two.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
  else
    return bits_as<uint32_t>(__floats2half2_rn(low, high));
}

// Two neighbouring results [16][8] (columns 0-7 and 8-15) as the operand a[16][16] of the next product.
template <class T>
__device__ __forceinline__ void as_operand(const float (&left)[4], const float (&right)[4], uint32_t (&a)[4]) {
  a[0] = pack_pair<T>(left[0], left[1]), a[1] = pack_pair<T>(left[2], left[3]);
  a[2] = pack_pair<T>(right[0], right[1]), a[3] = pack_pair<T>(right[2], right[3]);
}

// results[16 * kTiles][8 * kColumns] += left · rightᵀ over 16 * kSteps columns of a tile with kDim.  operand(i, k, a)
// is to make `a` that of left's rows from 16i and columns from 16k; right: this lane's row of columns_first.
template <class T, int kDim, int kSteps, int kTiles, int kColumns, class Operand>
__device__ __forceinline__ void multiply_transposed(float (&results)[kTiles][kColumns][4], const Operand& operand,
                                                    uint32_t right) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) operand(i, k, a[i]);
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, Tile<kDim>::at(right, j * 8, k * 16));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        mma<T>(results[i][j], a[i], {b[0], b[1]});
        mma<T>(results[i][j + 1], a[i], {b[2], b[3]});
      }
    }
  }
}

// results[16 * kTiles][kUsed] += left · right over 16 * kSteps rows of a tile with kDim columns, of which the first
// kUsed are wanted; operand as above; right: this lane's row of rows_first.
template <class T, int kDim, int kUsed, int kSteps, int kTiles, class Operand>
__device__ __forceinline__ void multiply(float (&results)[kTiles][kDim / 8][4], const Operand& operand,
                                         uint32_t right) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) operand(i, k, a[i]);
#pragma unroll
    for (int j = 0; j < kUsed / 8; j += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, Tile<kDim>::at(right, k * 16, j * 8));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        mma<T>(results[i][j], a[i], {b[0], b[1]});
        mma<T>(results[i][j + 1], a[i], {b[2], b[3]});
      }
    }
  }
}

// Over the four lanes that hold a row of a result.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// ---- scores

constexpr float kLog2e = 1.44269504f;

__device__ __forceinline__ float minus_infinity() {
  return __uint_as_float(0xff800000u);
}

// A row's maximum as what is subtracted from its scores: 0 for rows that see nothing, whose scores stay -infinity.
__device__ __forceinline__ float finite_shift(float maximum) {
  return maximum == minus_infinity() ? 0.0f : maximum;
}

__device__ __forceinline__ float exp_approx(float x) {
  return ptx::ex2_approx_ftz(x * kLog2e);
}

// Within 2e-7: tanh.approx.f32 is a thousand times less precise, and a cap of 50 would magnify that.
__device__ __forceinline__ float tanh_by_exp(float x) {
  return 1.0f - 2.0f * ptx::rcp_approx_ftz(1.0f + exp_approx(2.0f * x));
}

// Turn products q·k into logits.  If a positive factor is all they need, they stay as they are ("raw"), and the factor
// is part of the exponential's; else scores are logits, scaled and capped.  Either way exp(logit - other logit) is
// ex2((score - other score) · log2_unit).
struct ScoreScale {
  float sm_scale, softcap, inverse_cap;
  bool raw;
  float unit, log2_unit;  // logit = score · unit

  // additive: numbers are added to logits.
  LLMKERN_HOST_DEVICE ScoreScale(float sm_scale, float softcap, bool additive)
      : sm_scale(sm_scale),
        softcap(softcap),
        inverse_cap(softcap > 0.0f ? 1.0f / softcap : 0.0f),
        raw(sm_scale > 0.0f && softcap == 0.0f && !additive) {
    unit = raw ? sm_scale : 1.0f;
    log2_unit = unit * kLog2e;
  }

  __device__ __forceinline__ float logit(float product) const {
    const float scaled = product * sm_scale;
    return softcap > 0.0f ? softcap * tanh_by_exp(scaled * inverse_cap) : scaled;
  }
  __device__ __forceinline__ float score(float product) const { return raw ? product : logit(product); }
};

// Range of keys that a query sees by its position alone: query i stands at i + keys - queries and sees `left` keys back
// and `right` on.  All numbers are at most kGpuMaxLength, so that no sum of them overflows.
struct Band {
  int queries, keys, left, right;

  // The op's window, -1 for no limit; causality is a window that ends at the query's own key.
  LLMKERN_HOST_DEVICE Band(int64_t queries, int64_t keys, int64_t window_left, int64_t window_right, bool causal)
      : queries(static_cast<int>(queries)),
        keys(static_cast<int>(keys)),
        left(limit(window_left)),
        right(causal ? 0 : limit(window_right)) {}

  // Query i sees keys begin(i) to end(i) - 1; none where end <= begin, as for queries that do not exist.
  __device__ __forceinline__ int begin(int query) const {
    const int first = query + keys - queries - left;
    return first > 0 ? first : 0;
  }
  __device__ __forceinline__ int end(int query) const {
    const int last = query + keys - queries + right;
    return query >= queries ? 0 : last < keys ? last + 1 : keys;
  }

  // The other way round: key j is seen by queries first_query(j) to last_query(j).
  __device__ __forceinline__ int first_query(int key) const {
    const int first = key - right - (keys - queries);
    return first > 0 ? first : 0;
  }
  __device__ __forceinline__ int last_query(int key) const {
    const int last = key + left - (keys - queries);
    return last < queries ? last : queries - 1;
  }

 private:
  LLMKERN_HOST_DEVICE static int limit(int64_t window) {
    return static_cast<int>(window < 0 || window > kGpuMaxLength ? kGpuMaxLength : window);
  }
};

// Masks of one batch and head that hide keys or are added to logits: attn_mask by its strides, and key padding.
struct ScoreMask {
  const char* mask;  // null for none
  const bool* padding;
  int64_t query_stride, key_stride, padding_stride;  // elements
  DType dtype;
  bool is_bool;

  // Take the params of attention, or of its backward.
  template <class Params>
  __device__ __forceinline__ ScoreMask(const Params& p, int64_t batch, int64_t head)
      : mask(static_cast<const char*>(p.mask)),
        padding(p.key_padding),
        query_stride(p.mask_strides.query),
        key_stride(p.mask_strides.key),
        padding_stride(p.padding_strides.key),
        dtype(p.mask_dtype),
        is_bool(p.mask_is_bool) {
    const int64_t bytes = is_bool ? 1 : size_of(dtype);
    if (mask) mask += (batch * p.mask_strides.batch + head * p.mask_strides.head) * bytes;
    if (padding) padding += batch * p.padding_strides.batch;
  }

  __device__ __forceinline__ bool any() const { return mask || padding; }

  // Return true if key padding hides a key from all queries.
  __device__ __forceinline__ bool is_padding(int key) const {
    return !ld_global(reinterpret_cast<const uint8_t*>(padding) + key * padding_stride);
  }

  // Apply the mask to the score of a query and a key in range; an additive mask takes and returns logits.
  __device__ __forceinline__ float operator()(float score, int query, int key) const {
    const int64_t at = query * query_stride + key * key_stride;
    if (is_bool) return ld_global(reinterpret_cast<const uint8_t*>(mask) + at) ? score : minus_infinity();
    if (dtype == DType::f32) return score + ld_global(reinterpret_cast<const float*>(mask) + at);
    const uint16_t bits = ld_global(reinterpret_cast<const uint16_t*>(mask) + at);
    return score + (dtype == DType::bf16 ? to_float(BFloat16{bits}) : to_float(Float16{bits}));
  }
};

}  // namespace llmkern
