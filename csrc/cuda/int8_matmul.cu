// int8_matmul: out[M, N] = act((a[M, K] · w[N, K]ᵀ) · a_scale[m] · w_scale[n] + bias[n]) + residual[m, n]
//
// Tiles, for M > 16 (int8_matmul_kernel)
//   block    a ProductTile (llmkern/plan.h) of the result, in steps of 64 bytes of K; mma.m16n8k32
//   smem     stages of (block_m + block_n) x 64 bytes; 16-byte chunk c of row r is stored at
//            c ^ (r / 2 % 4), so that the eight rows that ldmatrix reads together, and those written together, are
//            in different banks
//   threads  copy: t moves chunk t % 4 of rows t / 4, t / 4 + threads / 4, ...
//            mma: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next, of each 16x8
// Streams of weights, for M <= 16 (int8_decode_kernel)
//   block    16 rows of w, which are the m16 operand, against 8 or 16 rows of a; its warps share out K
//   loads    16 bytes of each of two rows of w per lane and 64 of K, straight into fragments: K may be permuted
//            as long as both operands have it permuted alike, and here lane t's 16 bytes serve two instructions
// needs      sm_80; any M, N, K; rows that are not aligned to 16 bytes are copied byte by byte
#include "llmkern/int8_matmul.h"

#include "common/activation.cuh"
#include "common/ptx.cuh"
#include "common/row.cuh"

namespace llmkern {
namespace {

constexpr int kStepBytes = 64, kChunk = 16, kChunks = kStepBytes / kChunk;

// The byte offset of a chunk in a tile of rows of 64 bytes.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return row * kStepBytes + (chunk ^ (row / 2 % 4)) * kChunk;
}

// The first `valid` of 16 bytes; the rest is zero.
template <bool kAligned>
__device__ __forceinline__ uint4 load_codes(const int8_t* p, int64_t valid) {
  if (kAligned && valid >= kChunk) return ld_global(reinterpret_cast<const uint4*>(p));
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if (i < valid) words[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(ld_global(p + i))) << (i % 4 * 8);
  return {words[0], words[1], words[2], words[3]};
}

// What becomes of the sums of `kN` neighbours of a row, from column n on.
template <int kN>
__device__ __forceinline__ void store_result(const Int8MatmulParams& p, int64_t m, int64_t n,
                                             const int32_t (&sums)[kN]) {
  const int64_t at = m * p.n + n;
  if (p.sums) {
    Packed<float, kN> packed;
    packed = bits_as<Packed<float, kN>>(sums);
    packed.store(static_cast<float*>(p.out) + at);
    return;
  }
  float y[kN], values[kN];
  const float a_scale = p.a_scale ? ld_global(p.a_scale + m) : 1.0f;
#pragma unroll
  for (int i = 0; i < kN; ++i) y[i] = static_cast<float>(sums[i]) * a_scale;
  if (p.w_scale) {
    load_as_float(p.w_scale, DType::f32, n, values);
#pragma unroll
    for (int i = 0; i < kN; ++i) y[i] *= values[i];
  }
  if (p.bias) {
    load_as_float(p.bias, p.bias_dtype, n, values);
#pragma unroll
    for (int i = 0; i < kN; ++i) y[i] += values[i];
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) y[i] = activate(p.activation, y[i]);
  if (p.residual) {
    load_as_float(p.residual, p.residual_dtype, p.residual_rows.offset(m) + n, values);
#pragma unroll
    for (int i = 0; i < kN; ++i) y[i] += values[i];
  }
  store_as(p.out, p.out_dtype, at, y);
}

// kPairs: columns n and n + 1 can be accessed together, for even n.
template <bool kPairs>
__device__ __forceinline__ void store_pair(const Int8MatmulParams& p, int64_t m, int64_t n, int32_t left,
                                           int32_t right) {
  if (m >= p.a_rows.count) return;
  if constexpr (kPairs) {
    if (n < p.n) store_result<2>(p, m, n, {left, right});
  } else {
    if (n < p.n) store_result<1>(p, m, n, {left});
    if (n + 1 < p.n) store_result<1>(p, m, n + 1, {right});
  }
}

// nvcc takes no structs as template arguments of kernels.
LLMKERN_HOST_DEVICE constexpr ProductTile tile_of(bool large) {
  return large ? kLargeTile : kSmallTile;
}

// A thread's share of the copies of one operand's tile.
template <int kRows, int kThreads, bool kAligned>
class TileCopy {
 public:
  // row(r): where row r of the tile begins, null if there is none.
  template <class F>
  __device__ TileCopy(const F& row) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) rows_[i] = row(row_of(i));
  }

  __device__ __forceinline__ void step(char* tile, int64_t k, int64_t k_end) const {
    const int chunk = threadIdx.x % kChunks;
    const int64_t column = k + chunk * kChunk, left = k_end - column;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      char* to = tile + swizzled(row_of(i), chunk);
      const int64_t valid = rows_[i] ? left : 0;
      if constexpr (kAligned) {
        const int read = static_cast<int>(valid < 0 ? 0 : valid < kChunk ? valid : kChunk);
        ptx::cp_async_cg_16(ptx::cvta_to_shared(to), rows_[i] + column, read);
      } else {
        st_shared(reinterpret_cast<uint4*>(to), load_codes<false>(rows_[i] + column, valid));
      }
    }
  }

 private:
  static constexpr int kEach = kRows * kChunks / kThreads;
  static_assert(kEach * kThreads == kRows * kChunks);

  __device__ static int row_of(int i) { return threadIdx.x / kChunks + i * (kThreads / kChunks); }

  const int8_t* rows_[kEach];
};

template <bool kLarge, bool kAligned, bool kPairs>
__global__ void __launch_bounds__(tile_of(kLarge).threads(), tile_of(kLarge).resident)
    int8_matmul_kernel(const Int8MatmulParams p) {
  constexpr ProductTile kTile = tile_of(kLarge);
  constexpr int kTilesM = kTile.block_m / kTile.warps_m / 16, kTilesN = kTile.block_n / kTile.warps_n / 8;
  static_assert(kTilesN % 2 == 0);
  char* shared = dynamic_shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t blocks_m = (p.a_rows.count + kTile.block_m - 1) / kTile.block_m;
  const int64_t first_m = blockIdx.x % blocks_m * kTile.block_m, first_n = blockIdx.x / blocks_m * kTile.block_n;

  const TileCopy<kTile.block_m, kTile.threads(), kAligned> copy_a([&](int row) -> const int8_t* {
    const int64_t m = first_m + row;
    return m < p.a_rows.count ? p.a + p.a_rows.offset(m) : nullptr;
  });
  const TileCopy<kTile.block_n, kTile.threads(), kAligned> copy_w([&](int row) -> const int8_t* {
    const int64_t n = first_n + row;
    return n < p.n ? p.w + n * p.w_stride : nullptr;
  });
  const int steps = static_cast<int>((p.k + kStepBytes - 1) / kStepBytes);
  auto copy = [&](int step) {
    if (step < steps) {
      char* stage = shared + step % kTile.stages * kTile.stage_bytes();
      copy_a.step(stage, int64_t{step} * kStepBytes, p.k);
      copy_w.step(stage + kTile.block_m * kStepBytes, int64_t{step} * kStepBytes, p.k);
    }
    ptx::cp_async_commit_group();  // an empty group too, so that the count of groups is that of steps
  };

  int32_t sums[kTilesM][kTilesN][4] = {};
  const int warp_m = warp / kTile.warps_n * kTilesM * 16, warp_n = warp % kTile.warps_n * kTilesN * 8;
#pragma unroll
  for (int step = 0; step < kTile.stages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<kTile.stages - 2>();
    __syncthreads();  // this step's tiles have landed, and nobody reads the stage that is filled next
    copy(step + kTile.stages - 1);
    const uint32_t a = ptx::cvta_to_shared(shared + step % kTile.stages * kTile.stage_bytes());
    const uint32_t w = a + kTile.block_m * kStepBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 32 of the 64 bytes of K: two chunks
      uint32_t left[kTilesM][4], right[kTilesN][2];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
        ptx::ldmatrix_x4(left[i], a + swizzled(warp_m + i * 16 + lane % 16, 2 * half + lane / 16));
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) {
        uint32_t two[4];
        ptx::ldmatrix_x4(two, w + swizzled(warp_n + j * 8 + lane / 16 * 8 + lane % 8, 2 * half + lane / 8 % 2));
        right[j][0] = two[0], right[j][1] = two[1], right[j + 1][0] = two[2], right[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) ptx::mma_m16n8k32_s8(sums[i][j], left[i], right[j]);
    }
  }

#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const int64_t m = first_m + warp_m + i * 16 + lane / 4, n = first_n + warp_n + j * 8 + lane % 4 * 2;
      store_pair<kPairs>(p, m, n, sums[i][j][0], sums[i][j][1]);
      store_pair<kPairs>(p, m + 8, n, sums[i][j][2], sums[i][j][3]);
    }
}

template <int kTilesM, bool kAligned>
__global__ void __launch_bounds__(kDecodeThreads, decode_residency(kTilesM).blocks)
    int8_decode_kernel(const Int8MatmulParams p) {
  constexpr int kWarps = kDecodeThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, t = lane % 4;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x) * kDecodeRows;

  const int8_t *w[2], *a[kTilesM];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t n = first_n + group + 8 * i;
    w[i] = n < p.n ? p.w + n * p.w_stride : nullptr;
  }
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
    const int64_t m = group + 8 * i;
    a[i] = m < p.a_rows.count ? p.a + p.a_rows.offset(m) : nullptr;
  }

  int32_t sums[kTilesM][4] = {};
#pragma unroll 4
  for (int64_t k = warp * kStepBytes; k < p.k; k += kWarps * kStepBytes) {
    const int64_t column = k + t * kChunk, left = p.k - column;
    const uint4 low = load_codes<kAligned>(w[0] + column, w[0] ? left : 0);
    const uint4 high = load_codes<kAligned>(w[1] + column, w[1] ? left : 0);
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      const uint4 x = load_codes<kAligned>(a[i] + column, a[i] ? left : 0);
      ptx::mma_m16n8k32_s8(sums[i], {low.x, high.x, low.y, high.y}, {x.x, x.y});
      ptx::mma_m16n8k32_s8(sums[i], {low.z, high.z, low.w, high.w}, {x.z, x.w});
    }
  }

  // The warps' sums, each of one share of K; then one thread for each element: sums[i][j] of a lane is w's row
  // group + 8 * (j / 2) and a's row 8 * i + 2 * t + j % 2.
  int32_t* shared = reinterpret_cast<int32_t*>(dynamic_shared_memory());
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      st_shared(
          shared + warp * (8 * kTilesM * kDecodeRows) + (8 * i + 2 * t + j % 2) * kDecodeRows + group + 8 * (j / 2),
          sums[i][j]);
  __syncthreads();
  for (int element = threadIdx.x; element < 8 * kTilesM * kDecodeRows; element += kDecodeThreads) {
    const int64_t m = element / kDecodeRows, n = first_n + element % kDecodeRows;
    if (m >= p.a_rows.count || n >= p.n) continue;
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += ld_shared(shared + i * (8 * kTilesM * kDecodeRows) + element);
    store_result<1>(p, m, n, {sum});
  }
}

template <bool kAligned, bool kPairs>
void launch_planned(const Int8MatmulParams& p, const Int8MatmulPlan& plan, const Gpu& gpu) {
  const LaunchConfig config = {static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.threads),
                               plan.shared_bytes};
  switch (plan.kernel) {
    case Int8MatmulKernel::large_tile:
      return launch("int8_matmul", int8_matmul_kernel<true, kAligned, kPairs>, config, gpu, p);
    case Int8MatmulKernel::small_tile:
      return launch("int8_matmul", int8_matmul_kernel<false, kAligned, kPairs>, config, gpu, p);
    case Int8MatmulKernel::decode_8:
      return launch("int8_decode", int8_decode_kernel<1, kAligned>, config, gpu, p);
    case Int8MatmulKernel::decode_16:
      return launch("int8_decode", int8_decode_kernel<2, kAligned>, config, gpu, p);
  }
}

}  // namespace

void launch_int8_matmul(const Int8MatmulParams& p, const Gpu& gpu) {
  if (p.a_rows.count == 0 || p.n == 0) return;  // an empty grid is a launch error
  const Int8MatmulPlan plan = plan_int8_matmul(p.a_rows.count, p.n, gpu.sm_count);
  const bool vectors =
      aligned(p.a, 1, kChunk) && aligned(p.a_rows, kChunk) && aligned(p.w, 1, kChunk) && p.w_stride % kChunk == 0;
  const int64_t out_bytes = p.sums ? 4 : size_of(p.out_dtype);
  const bool pairs = p.n % 2 == 0 && aligned(p.out, out_bytes, 2) && aligned(p.w_scale, 4, 2) &&
                     aligned(p.bias, size_of(p.bias_dtype), 2) && aligned(p.residual, size_of(p.residual_dtype), 2) &&
                     aligned(p.residual_rows, 2);
  if (vectors)
    pairs ? launch_planned<true, true>(p, plan, gpu) : launch_planned<true, false>(p, plan, gpu);
  else
    pairs ? launch_planned<false, true>(p, plan, gpu) : launch_planned<false, false>(p, plan, gpu);
}

}  // namespace llmkern
