// int8_matmul: out[M, N] = act((a[M, K] · w[N, K]ᵀ) · a_scale[m] · w_scale[n] + bias[n]) + residual[m, n]
//
// Tiles, for M > 16 (int8_matmul_kernel): a is codes or, weight-only, bf16 or fp16
//   block    a ProductTile (llmkern/plan.h) of the result, in steps of 64 of K; of the blocks, sixteen rows of them at
//   a
//            time run along N, so that those at work together read the same rows and columns from L2
//   smem     stages of block_m rows of a's step and block_n rows x 64 bytes of w's.  16-byte chunk c of a row r of 64
//            bytes is stored at c ^ (r / 2 % 4), of one of 128 bytes (halves) at c ^ (2 (r % 4)), so that rows that are
//            read together, and those written together, are in different banks
//   codes    mma.m16n8k32, both operands by ldmatrix
//   halves   mma.m16n8k16.  ldmatrix gives lane t of a row four neighbouring codes of K's next 16, which are converted
//            exactly, and serve as k = 2t, 2t + 1, 2t + 8, 2t + 9; a is read in the same order, by 8 bytes
//   threads  copy: t moves chunk t % c of rows t / c, t / c + threads / c, ..., with c chunks in a row
//            mma: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next, of each 16x8
//   out      a warp's sums, 32 rows at a time, pass through shared memory, so that a lane gets neighbours of a row and
//            stores 16 bytes
// Streams of weights, for M <= 16 (int8_decode_kernel): a is codes or, weight-only, bf16 or fp16
//   block    16 rows of w at a time, which are the m16 operand, against 8 or 16 rows of a; its warps share out K
//   loads    16 bytes of each of two rows of w per lane and 64 of K, several such steps ahead, straight into fragments:
//            K may be permuted as long as both operands have it permuted alike, and here lane t's 16 bytes serve two
//            instructions of codes (m16n8k32), or four of floats (m16n8k16), for which codes are converted exactly.
//            A step's registers are loaded anew as soon as it is multiplied, at the end of K from the next rows
//   caches   weights pass by L1, which a stays in for the SM's other blocks
// Parts of K, where the blocks would leave SMs idle: blockIdx.y is one part, whose sums go to the workspace, and
// sum_parts_kernel adds them up: of codes exactly, of floats in the parts' order, so that bits never change
// needs      sm_80; any M, N, K; rows that are not aligned to 16 bytes are copied byte by byte
#include "llmkern/int8_matmul.h"

#include "common/activation.cuh"
#include "common/ptx.cuh"
#include "common/row.cuh"

namespace llmkern {
namespace {

constexpr int kStep = 64, kChunk = 16;  // of K; bytes
static_assert(kStep == kProductStep);

// The byte offset of a chunk in a tile of rows of 64 or 128 bytes.
template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  return row * kRowBytes + (chunk ^ (kRowBytes == 64 ? row / 2 % 4 : row % 4 * 2)) * kChunk;
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

// Per-column factors and bias of the epilogue, for kN columns from n on.
template <int kN>
struct Columns {
  float scale[kN], bias[kN];

  __device__ Columns(const Int8MatmulParams& p, int64_t n) {
#pragma unroll
    for (int i = 0; i < kN; ++i) scale[i] = 1.0f, bias[i] = 0.0f;
    if (p.sums) return;  // of a part of K: another kernel makes the result
    if (p.w_scale) load_as_float(p.w_scale, DType::f32, n, scale);
    if (p.bias) load_as_float(p.bias, p.bias_dtype, n, bias);
  }
};

// Epilogue of `kN` neighbouring sums of a row, from column n on.
template <class Sum, int kN>
__device__ __forceinline__ void store_result(const Int8MatmulParams& p, int64_t m, int64_t n, const Sum (&sums)[kN],
                                             const Columns<kN>& columns) {
  const int64_t at = m * p.n + n;
  if (p.sums) {  // those of a part of K behind those of the parts before
    const int64_t before = blockIdx.y * p.a_rows.count * p.n;
    typename Packed<Sum, kN>::Elements elements;
#pragma unroll
    for (int i = 0; i < kN; ++i) elements.element[i] = sums[i];
    bits_as<Packed<Sum, kN>>(elements).store(static_cast<Sum*>(p.out) + before + at);
    return;
  }
  float y[kN], values[kN];
  const float a_scale = p.a_scale ? ld_global(p.a_scale + m) : 1.0f;
#pragma unroll
  for (int i = 0; i < kN; ++i) y[i] = static_cast<float>(sums[i]) * a_scale;
#pragma unroll
  for (int i = 0; i < kN; ++i) y[i] *= columns.scale[i];
  if (p.bias) {  // a sum of -0 stays what it is
#pragma unroll
    for (int i = 0; i < kN; ++i) y[i] += columns.bias[i];
  }
  activate<Digits::fp32>(p.activation, y);
  if (p.residual) {
    load_as_float(p.residual, p.residual_dtype, p.residual_rows.offset(m) + n, values);
#pragma unroll
    for (int i = 0; i < kN; ++i) y[i] += values[i];
  }
  store_as(p.out, p.out_dtype, at, y);
}

// 32 rows of a warp's sums on their way from fragments to rows.  Rows are apart by 8 more than a multiple of 32, so
// that the four rows and eight columns that half a warp writes together are in different banks.
constexpr int kSlabRows = 32;

template <class Sum, int kColumns>
struct Slab {
  static constexpr int kStride = kColumns + 8, kBytes = kSlabRows * kStride * 4;
  static_assert(sizeof(Sum) == 4 && kColumns % 32 == 0);
  Sum* sums;

  __device__ __forceinline__ void put(int row, int column, Sum first, Sum second) const {
    st_shared(reinterpret_cast<uint2*>(sums + row * kStride + column),
              uint2{bits_as<uint32_t>(first), bits_as<uint32_t>(second)});
  }

  template <int kN>
  __device__ __forceinline__ void get(int row, int column, Sum (&values)[kN]) const {
    const Sum* from = sums + row * kStride + column;
    if constexpr (kN == 1) {
      values[0] = ld_shared(from);
    } else {
#pragma unroll
      for (int i = 0; i < kN; i += 4) {
        const uint4 four = ld_shared(reinterpret_cast<const uint4*>(from + i));
        values[i] = bits_as<Sum>(four.x), values[i + 1] = bits_as<Sum>(four.y);
        values[i + 2] = bits_as<Sum>(four.z), values[i + 3] = bits_as<Sum>(four.w);
      }
    }
  }
};

// The results of a slab whose first element is (m, n): each lane takes kN neighbours of a row at a time.
template <int kN, class Sum, int kColumns>
__device__ __forceinline__ void store_rows(const Int8MatmulParams& p, const Slab<Sum, kColumns>& slab, int64_t m,
                                           int64_t n) {
  constexpr int kLanes = kColumns / kN < 32 ? kColumns / kN : 32, kTogether = 32 / kLanes;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int first = 0; first < kColumns; first += kLanes * kN) {
    const int column = first + lane % kLanes * kN;
    if (n + column >= p.n) return;
    const Columns<kN> columns(p, n + column);
#pragma unroll 1
    for (int row = lane / kLanes; row < kSlabRows; row += kTogether) {
      if (m + row >= p.a_rows.count) break;
      Sum sums[kN];
      slab.get(row, column, sums);
      store_result(p, m + row, n + column, sums, columns);
    }
  }
}

// kWide: eight neighbours from a multiple of eight on can be accessed by 16 bytes.
template <bool kWide, class Sum, int kColumns>
__device__ __forceinline__ void store_slab(const Int8MatmulParams& p, const Slab<Sum, kColumns>& slab, int64_t m,
                                           int64_t n) {
  if constexpr (!kWide)
    store_rows<1>(p, slab, m, n);
  else if (p.sums || p.out_dtype == DType::f32)
    store_rows<4>(p, slab, m, n);
  else
    store_rows<8>(p, slab, m, n);
}

// A thread's share of the copies of one operand's tile, whose rows have kRowBytes in a step.
template <int kRows, int kRowBytes, int kThreads, bool kAligned>
class TileCopy {
 public:
  // row(r): address of row r of the tile, null beyond the matrix.
  template <class F>
  __device__ TileCopy(const F& row) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) rows_[i] = row(row_of(i));
  }

  // A step with all its bytes, of aligned rows.
  __device__ __forceinline__ void whole_step(char* tile, int step) const {
    const int chunk = threadIdx.x % kChunks;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      ptx::cp_async_cg_16(ptx::cvta_to_shared(tile + swizzled<kRowBytes>(row_of(i), chunk)), at(i, step),
                          rows_[i] ? kChunk : 0);
  }

  // A step of which rows have `left` bytes, perhaps more than a step's.
  __device__ __forceinline__ void last_step(char* tile, int step, int left) const {
    const int chunk = threadIdx.x % kChunks;
    left -= chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      char* to = tile + swizzled<kRowBytes>(row_of(i), chunk);
      const int valid = rows_[i] ? left : 0;
      if constexpr (kAligned)
        ptx::cp_async_cg_16(ptx::cvta_to_shared(to), at(i, step), valid < 0 ? 0 : valid < kChunk ? valid : kChunk);
      else
        st_shared(reinterpret_cast<uint4*>(to), load_codes<false>(at(i, step), valid));
    }
  }

 private:
  static constexpr int kChunks = kRowBytes / kChunk, kEach = kRows * kChunks / kThreads;
  static_assert(kEach * kThreads == kRows * kChunks);

  __device__ static int row_of(int i) { return threadIdx.x / kChunks + i * (kThreads / kChunks); }
  __device__ __forceinline__ const int8_t* at(int i, int step) const {
    return rows_[i] + static_cast<int64_t>(step) * kRowBytes + threadIdx.x % kChunks * kChunk;
  }

  const int8_t* rows_[kEach];
};

// Four codes as the two pairs of T that mma takes.  Every code is a number of either type: nothing is rounded.
template <class T>
__device__ __forceinline__ void to_pairs(uint32_t codes, uint32_t& first, uint32_t& second) {
  if constexpr (std::is_same_v<T, Float16>) {    // a half of 1024 to 2047 ends in its value's bits
    const uint32_t from_0 = codes ^ 0x80808080;  // code + 128
    auto less_1152 = [](uint32_t pair) {
      return bits_as<uint32_t>(__hsub2(bits_as<__half2>(pair), bits_as<__half2>(0x64806480u)));
    };
    first = less_1152(__byte_perm(from_0, 0x64646464, 0x4140));
    second = less_1152(__byte_perm(from_0, 0x64646464, 0x4342));
  } else {  // as 128 to 255 does in bf16, and its exponent's last bit, here the code's sign, makes 256 of 128
    auto without_sign = [](uint32_t pair) {
      return bits_as<uint32_t>(
          __hsub2(bits_as<__nv_bfloat162>(pair & 0xff7fff7f), bits_as<__nv_bfloat162>(pair & 0xff80ff80)));
    };
    first = without_sign(__byte_perm(codes, 0x43434343, 0x4140));
    second = without_sign(__byte_perm(codes, 0x43434343, 0x4342));
  }
}

// d += a · b, of halves.
template <class X>
__device__ __forceinline__ void mma_halves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<X, Float16>)
    ptx::mma_m16n8k16_f16(d, a, b);
  else
    ptx::mma_m16n8k16_bf16(d, a, b);
}

// A warp's sums += a · wᵀ over a step of K.  a, w: the step's tiles, and this warp's first row in each.
template <class X, class Sum, int kTilesM, int kTilesN>
__device__ __forceinline__ void multiply_step(Sum (&sums)[kTilesM][kTilesN][4], const char* a, int warp_m,
                                              const char* w, int warp_n) {
  const int lane = threadIdx.x % 32;
  const uint32_t left_tile = ptx::cvta_to_shared(a), right_tile = ptx::cvta_to_shared(w);
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // 32 of K: two chunks of codes
    uint32_t codes[kTilesN][2];
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t two[4];
      const int row = warp_n + j * 8 + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_x4(two, right_tile + swizzled<kStep>(row, 2 * half + lane / 8 % 2));
      codes[j][0] = two[0], codes[j][1] = two[1], codes[j + 1][0] = two[2], codes[j + 1][1] = two[3];
    }
    if constexpr (std::is_same_v<X, int8_t>) {
      uint32_t left[kTilesM][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
        ptx::ldmatrix_x4(left[i], left_tile + swizzled<kStep>(warp_m + i * 16 + lane % 16, 2 * half + lane / 16));
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) ptx::mma_m16n8k32_s8(sums[i][j], left[i], codes[j]);
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t right[kTilesN][2];
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) to_pairs<X>(codes[j][k], right[j][0], right[j][1]);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          auto four = [&](int row) {
            const uint32_t at = swizzled<2 * kStep>(warp_m + i * 16 + row, 4 * half + 2 * k + lane % 4 / 2);
            return ld_shared(reinterpret_cast<const uint2*>(a + at + lane % 2 * 8));
          };
          const uint2 upper = four(lane / 4), lower = four(lane / 4 + 8);
#pragma unroll
          for (int j = 0; j < kTilesN; ++j) mma_halves<X>(sums[i][j], {upper.x, lower.x, upper.y, lower.y}, right[j]);
        }
      }
    }
  }
}

template <class X>
using SumOf = std::conditional_t<std::is_same_v<X, int8_t>, int32_t, float>;

// nvcc takes no structs as template arguments of kernels.
template <class X>
LLMKERN_HOST_DEVICE constexpr ProductTile tile_of(Int8MatmulKernel kernel) {
  return product_tile(kernel, !std::is_same_v<X, int8_t>);
}

template <class X, Int8MatmulKernel kKernel, bool kAligned, bool kWide>
__global__ void __launch_bounds__(tile_of<X>(kKernel).threads(), tile_of<X>(kKernel).resident)
    int8_matmul_kernel(const Int8MatmulParams p, int64_t part) {
  using Sum = SumOf<X>;
  constexpr ProductTile kTile = tile_of<X>(kKernel);
  constexpr int kTilesM = kTile.block_m / kTile.warps_m / 16, kTilesN = kTile.block_n / kTile.warps_n / 8;
  constexpr int kRowBytes = kStep * sizeof(X);
  constexpr int64_t kSection = 16;  // rows of blocks
  static_assert(kTilesM % 2 == 0 && kTilesN % 2 == 0);
  char* shared = dynamic_shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t blocks_m = (p.a_rows.count + kTile.block_m - 1) / kTile.block_m;
  const int64_t section_blocks = kSection * ((p.n + kTile.block_n - 1) / kTile.block_n);
  const int64_t first_row = blockIdx.x / section_blocks * kSection, within = blockIdx.x % section_blocks;
  const int64_t rows = blocks_m - first_row < kSection ? blocks_m - first_row : kSection;
  const int64_t first_m = (first_row + within % rows) * kTile.block_m, first_n = within / rows * kTile.block_n;

  const int64_t first_k = blockIdx.y * part, end_k = first_k + part < p.k ? first_k + part : p.k;
  const TileCopy<kTile.block_m, kRowBytes, kTile.threads(), kAligned> copy_a([&](int row) -> const int8_t* {
    const int64_t m = first_m + row;
    const X* a = static_cast<const X*>(p.x ? p.x : p.a) + first_k;
    return m < p.a_rows.count ? reinterpret_cast<const int8_t*>(a + p.a_rows.offset(m)) : nullptr;
  });
  const TileCopy<kTile.block_n, kStep, kTile.threads(), kAligned> copy_w([&](int row) -> const int8_t* {
    const int64_t n = first_n + row;
    return n < p.n ? p.w + n * p.w_stride + first_k : nullptr;
  });
  const int length = static_cast<int>(end_k - first_k), steps = (length + kStep - 1) / kStep;
  const int whole_steps = kAligned ? length / kStep : 0;
  auto next = [&](int stage) { return stage + 1 == kTile.stages ? 0 : stage + 1; };
  auto copy = [&](int step, int into) {
    char* stage = shared + into * kTile.stage_bytes();
    if (step < whole_steps) {
      copy_a.whole_step(stage, step);
      copy_w.whole_step(stage + kTile.block_m * kRowBytes, step);
    } else if (step < steps) {
      const int left = length - step * kStep;  // of K
      copy_a.last_step(stage, step, left * static_cast<int>(sizeof(X)));
      copy_w.last_step(stage + kTile.block_m * kRowBytes, step, left);
    }
    ptx::cp_async_commit_group();  // an empty group too, so that the count of groups is that of steps
  };

  Sum sums[kTilesM][kTilesN][4] = {};
  const int warp_m = warp / kTile.warps_n * kTilesM * 16, warp_n = warp % kTile.warps_n * kTilesN * 8;
#pragma unroll
  for (int step = 0; step < kTile.stages - 1; ++step) copy(step, step);
  int free = kTile.stages - 1;  // the stage that is filled next
  for (int step = 0, full = 0; step < steps; ++step, full = next(full), free = next(free)) {
    ptx::cp_async_wait_group<kTile.stages - 2>();
    __syncthreads();  // this step's tiles have landed, and nobody reads the stage that is filled next
    copy(step + kTile.stages - 1, free);
    const char* stage = shared + full * kTile.stage_bytes();
    multiply_step<X>(sums, stage, warp_m, stage + kTile.block_m * kRowBytes, warp_n);
  }

  using Columns = Slab<Sum, kTilesN * 8>;
  static_assert(kTile.warps_m * kTile.warps_n * Columns::kBytes <= kTile.shared_bytes());
  __syncthreads();  // the last tiles have been read
  const Columns slab{reinterpret_cast<Sum*>(shared + warp * Columns::kBytes)};
#pragma unroll
  for (int i = 0; i < kTilesM; i += 2) {
#pragma unroll
    for (int tile = 0; tile < 2 * kTilesN; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Sum(&d)[4] = sums[i + tile / kTilesN][tile % kTilesN];
        slab.put(tile / kTilesN * 16 + half * 8 + lane / 4, tile % kTilesN * 8 + lane % 4 * 2, d[2 * half],
                 d[2 * half + 1]);
      }
    __syncwarp();
    store_slab<kWide>(p, slab, first_m + warp_m + i * 16, first_n + warp_n);
    __syncwarp();
  }
}

// Sixteen neighbours of a row of a, and the product with those of two rows of w.
template <class X>
struct Streamed {
  uint4 first, second;

  __device__ __forceinline__ void load(const X* p) {
    first = ld_global(reinterpret_cast<const uint4*>(p)), second = ld_global(reinterpret_cast<const uint4*>(p) + 1);
  }

  __device__ __forceinline__ void load(const X* p, int64_t valid) {
    uint32_t words[8] = {};
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < valid) words[i / 2] |= static_cast<uint32_t>(ld_global(p + i).bits) << (i % 2 * 16);
    first = {words[0], words[1], words[2], words[3]}, second = {words[4], words[5], words[6], words[7]};
  }

  __device__ __forceinline__ void multiply(float (&sums)[4], const uint4& low, const uint4& high) const {
    multiply(sums, low.x, high.x, first.x, first.y);
    multiply(sums, low.y, high.y, first.z, first.w);
    multiply(sums, low.z, high.z, second.x, second.y);
    multiply(sums, low.w, high.w, second.z, second.w);
  }

 private:
  __device__ static __forceinline__ void multiply(float (&sums)[4], uint32_t low, uint32_t high, uint32_t left,
                                                  uint32_t right) {
    uint32_t w[4];
    to_pairs<X>(low, w[0], w[2]), to_pairs<X>(high, w[1], w[3]);
    mma_halves<X>(sums, w, {left, right});
  }
};

template <>
struct Streamed<int8_t> {
  uint4 codes;

  __device__ __forceinline__ void load(const int8_t* p) { codes = ld_global(reinterpret_cast<const uint4*>(p)); }

  __device__ __forceinline__ void load(const int8_t* p, int64_t valid) { codes = load_codes<false>(p, valid); }

  __device__ __forceinline__ void multiply(int32_t (&sums)[4], const uint4& low, const uint4& high) const {
    ptx::mma_m16n8k32_s8(sums, {low.x, high.x, low.y, high.y}, {codes.x, codes.y});
    ptx::mma_m16n8k32_s8(sums, {low.z, high.z, low.w, high.w}, {codes.z, codes.w});
  }
};

template <class X, int kTilesM, bool kAligned>
__global__ void __launch_bounds__(kDecode.threads, kDecode.blocks)
    int8_decode_kernel(const Int8MatmulParams p, int64_t part) {
  using Sum = SumOf<X>;
  constexpr int kWarps = kDecode.threads / 32, kAhead = 4, kElements = 8 * kTilesM * kDecodeRows;
  constexpr int64_t kStride = kWarps * kStep;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, t = lane % 4;
  const int64_t first_k = blockIdx.y * part + warp * kStep;
  const int64_t end_k = (blockIdx.y + 1) * part < p.k ? (blockIdx.y + 1) * part : p.k;
  const int64_t end_n = (p.n + kDecodeRows - 1) / kDecodeRows * kDecodeRows;
  const int64_t stride_n = static_cast<int64_t>(gridDim.x) * kDecodeRows;
  // The warp's steps that lie within K and need no mask: as many for every row.
  const int whole_steps = kAligned && first_k + kStep <= end_k ? (end_k - kStep - first_k) / kStride + 1 : 0;

  // Rows beyond the last are the last once more: nobody stores their sums.
  auto rows_of = [&](int64_t first_n, const int8_t*(&w)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t n = first_n + group + 8 * i;
      w[i] = p.w + (n < p.n ? n : p.n - 1) * p.w_stride + first_k + t * kChunk;
    }
  };
  const X* a[kTilesM];
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
    const int64_t m = group + 8 * i, last = p.a_rows.count - 1;
    a[i] = static_cast<const X*>(p.x ? p.x : p.a) + p.a_rows.offset(m < last ? m : last) + first_k + t * kChunk;
  }

  // kAhead steps of weights are on the way: those from ahead_step on of the rows from ahead_n on are next.
  uint4 codes[kAhead][2] = {};
  const int8_t* ahead[2];
  int64_t ahead_n = blockIdx.x * static_cast<int64_t>(kDecodeRows);
  int ahead_step = 0;
  rows_of(ahead_n, ahead);
  auto fetch = [&](int i) {
    if (ahead_step + i >= whole_steps) return;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      codes[i][j] =
          ptx::ld_global_nc_no_allocate_v4(reinterpret_cast<const uint4*>(ahead[j] + (ahead_step + i) * kStride));
  };
  auto go_on = [&] {
    ahead_step += kAhead;
    if (ahead_step < whole_steps) return;
    ahead_n += stride_n;
    ahead_step = ahead_n < end_n ? 0 : whole_steps;
    rows_of(ahead_n, ahead);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) fetch(i);
  go_on();

  Sum* shared = reinterpret_cast<Sum*>(dynamic_shared_memory());
  for (int64_t first_n = blockIdx.x * static_cast<int64_t>(kDecodeRows); first_n < end_n; first_n += stride_n) {
    Sum sums[kTilesM][4] = {};
    for (int step = 0; step < whole_steps; step += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (step + i < whole_steps) {
#pragma unroll
          for (int j = 0; j < kTilesM; ++j) {
            Streamed<X> x;
            x.load(a[j] + (step + i) * kStride);
            x.multiply(sums[j], codes[i][0], codes[i][1]);
          }
        }
        fetch(i);
      }
      go_on();
    }
    if (const int64_t done = whole_steps * kStride; first_k + done < end_k) {
      const int8_t* w[2];
      rows_of(first_n, w);
#pragma unroll 1
      for (int64_t k = done; first_k + k < end_k; k += kStride) {
        const int64_t left = end_k - first_k - k - t * kChunk;
        const uint4 low = load_codes<kAligned>(w[0] + k, left), high = load_codes<kAligned>(w[1] + k, left);
#pragma unroll
        for (int j = 0; j < kTilesM; ++j) {
          Streamed<X> x;
          if (kAligned && left >= kChunk)
            x.load(a[j] + k);
          else
            x.load(a[j] + k, left);
          x.multiply(sums[j], low, high);
        }
      }
    }

    // The warps' sums, each of one share of K, are added up in their order by one thread for each element: sums[i][j]
    // of a lane is w's row group + 8 * (j / 2) and a's row 8 * i + 2 * t + j % 2.
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        st_shared(shared + warp * kElements + (8 * i + 2 * t + j % 2) * kDecodeRows + group + 8 * (j / 2), sums[i][j]);
    __syncthreads();
    for (int element = threadIdx.x; element < kElements; element += kDecode.threads) {
      const int64_t m = element / kDecodeRows, n = first_n + element % kDecodeRows;
      if (m >= p.a_rows.count || n >= p.n) continue;
      Sum sum[1] = {};
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum[0] += ld_shared(shared + i * kElements + element);
      store_result(p, m, n, sum, Columns<1>(p, n));
    }
    __syncthreads();  // the sums have been read
  }
}

template <class Sum, int kN>
__global__ void __launch_bounds__(kSumParts.threads, kSumParts.blocks)
    sum_parts_kernel(const Int8MatmulParams p, int parts) {
  const int64_t size = p.a_rows.count * p.n;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kSumParts.threads + threadIdx.x) * kN;
  if (at >= size) return;
  Sum sums[kN] = {};
  for (int part = 0; part < parts; ++part) {
    Packed<Sum, kN> packed;
    packed.load(static_cast<const Sum*>(p.workspace) + part * size + at);
    const auto more = bits_as<typename Packed<Sum, kN>::Elements>(packed);
#pragma unroll
    for (int i = 0; i < kN; ++i) sums[i] += more.element[i];
  }
  store_result(p, at / p.n, at % p.n, sums, {p, at % p.n});
}

template <class X, bool kAligned, bool kWide>
void launch_product(const Int8MatmulParams& p, const Int8MatmulPlan& plan, const LaunchConfig& config, const Gpu& gpu) {
  using Kernel = Int8MatmulKernel;
  auto start = [&](const char* name, auto* kernel) { launch(name, kernel, config, gpu, p, plan.part); };
  if (plan.kernel == Kernel::decode_8) return start("int8_decode", int8_decode_kernel<X, 1, kAligned>);
  if (plan.kernel == Kernel::decode_16) return start("int8_decode", int8_decode_kernel<X, 2, kAligned>);
  if constexpr (has_product_tile(Kernel::wide_tile, !std::is_same_v<X, int8_t>))
    if (plan.kernel == Kernel::wide_tile)
      return start("int8_matmul", int8_matmul_kernel<X, Kernel::wide_tile, kAligned, kWide>);
  if (plan.kernel == Kernel::large_tile)
    start("int8_matmul", int8_matmul_kernel<X, Kernel::large_tile, kAligned, kWide>);
  else
    start("int8_matmul", int8_matmul_kernel<X, Kernel::small_tile, kAligned, kWide>);
}

// wide: of the results and what is applied to them.
template <class X>
void launch_planned(const Int8MatmulParams& p, const Int8MatmulPlan& plan, bool wide, const Gpu& gpu) {
  using Sum = SumOf<X>;
  const bool vectors = aligned(p.x ? p.x : p.a, 1, kChunk) && aligned(p.a_rows, kPerVector<X>) &&
                       aligned(p.w, 1, kChunk) && p.w_stride % kChunk == 0;
  const LaunchConfig config = {dim3(static_cast<unsigned>(plan.blocks), plan.parts),
                               static_cast<unsigned>(plan.threads), plan.shared_bytes};
  Int8MatmulParams product = p;
  if (plan.parts > 1) product.out = p.workspace, product.sums = true;
  if (!vectors)
    launch_product<X, false, false>(product, plan, config, gpu);
  else
    wide ? launch_product<X, true, true>(product, plan, config, gpu)
         : launch_product<X, true, false>(product, plan, config, gpu);
  if (plan.parts == 1) return;
  auto add = [&](int each, auto* kernel) {
    const int64_t at_a_time = int64_t{kSumParts.threads} * each;
    const unsigned blocks = static_cast<unsigned>((p.a_rows.count * p.n + at_a_time - 1) / at_a_time);
    launch("sum_parts", kernel, {blocks, kSumParts.threads}, gpu, p, plan.parts);
  };
  wide ? add(4, sum_parts_kernel<Sum, 4>) : add(1, sum_parts_kernel<Sum, 1>);
}

}  // namespace

void launch_int8_matmul(const Int8MatmulParams& p, const Gpu& gpu) {
  if (p.a_rows.count == 0 || p.n == 0) return;  // an empty grid is a launch error
  const Int8MatmulPlan plan = plan_int8_matmul(p.a_rows.count, p.n, p.k, p.x != nullptr, gpu);
  const int64_t out_bytes = p.sums ? 4 : size_of(p.out_dtype);
  const bool wide = p.n % 8 == 0 && aligned(p.out, out_bytes, 8) && aligned(p.w_scale, 4, 8) &&
                    aligned(p.bias, size_of(p.bias_dtype), 8) && aligned(p.residual, size_of(p.residual_dtype), 8) &&
                    aligned(p.residual_rows, 8);
  if (!p.x)
    launch_planned<int8_t>(p, plan, wide, gpu);
  else if (p.x_dtype == DType::bf16)
    launch_planned<BFloat16>(p, plan, wide, gpu);
  else
    launch_planned<Float16>(p, plan, wide, gpu);
}

}  // namespace llmkern
