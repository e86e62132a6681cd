// Choice of a CUDA launcher's kernel and grid: the heuristics, in one place for launchers, tests and
// `llmkern why`.  Plain C++, so that they are known where there is no GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "llmkern/gpu.h"
#include "llmkern/rows.h"

namespace llmkern {

// Occupancy of a kernel: __launch_bounds__(threads, blocks) has the compiler give a thread no more registers than
// let so many blocks of so many threads onto it, and tests/backends/test_compiled.py reads from the objects that it
// did, and that no more of them would fit.
struct Residency {
  int threads, blocks;

  constexpr int registers() const { return std::min(65536 / (threads * blocks) / 8 * 8, 255); }
};

// Blocks on an SM at a time: of 64 Ki registers warps get theirs by 256, and of shared memory every block takes 1 KiB
// more than it asks for.
constexpr int resident_blocks(const Residency& residency, int threads, int shared_bytes, const Sm& sm) {
  const int warps = (threads + 31) / 32;
  const int block_registers = warps * ((residency.registers() * 32 + 255) / 256 * 256);
  return std::min({sm.warps / warps, sm.blocks, 65536 / block_registers,
                   sm.shared_kib * 1024 / ((shared_bytes + 1023) / 1024 * 1024 + 1024)});
}

// For kernels that work row by row (norms, activations, quantization).
struct RowPlan {
  int vector;       // elements per access: 16 bytes of them, or 1 where rows are not aligned
  int held;         // vectors of a row that each thread holds in registers: 1, 4 or 8
  int row_threads;  // 32: a warp per row; more: the block
  int rows_per_block;
  int64_t blocks;
};

constexpr int kMaxRowThreads = 512;
constexpr int kRowSharedBytes = 256;  // for reductions over a block's warps: two buffers of 32 words

// Residency of norms, quantized activations and quantize_int8, by the vectors that a thread holds.
LLMKERN_HOST_DEVICE constexpr Residency norm_residency(int held) {
  return {kMaxRowThreads, held == 8 ? 1 : 2};
}

LLMKERN_HOST_DEVICE constexpr Residency codes_residency(int held) {
  return {kMaxRowThreads, held == 1 ? 2 : 1};
}

LLMKERN_HOST_DEVICE constexpr Residency quantize_residency(int held) {
  return {kMaxRowThreads, held == 8 ? 2 : 3};
}

// A warp takes a row of up to four vectors per lane: no barrier, and every lane has several loads in flight.  Longer
// rows take a block, of as many threads as give each four vectors; with fewer rows than SMs, one row should use the
// whole SM, so each thread has one.  512 threads hold up to 8 each: 32,768 halves.
constexpr RowPlan plan_rows(int64_t rows, int64_t hidden, int element_bytes, bool aligned, const Gpu& gpu) {
  constexpr int kWarp = 32, kBlock = 128;
  RowPlan plan{};
  plan.vector = aligned && hidden % (16 / element_bytes) == 0 ? 16 / element_bytes : 1;
  const int64_t vectors = hidden / plan.vector;
  auto threads_for = [&](int64_t each) {
    return static_cast<int>(std::min<int64_t>((vectors + each * kWarp - 1) / (each * kWarp) * kWarp, kMaxRowThreads));
  };
  const bool few_rows = rows <= gpu.sm_count;
  if (vectors <= kWarp) {
    plan.held = 1, plan.row_threads = kWarp;
  } else if (few_rows && vectors <= kMaxRowThreads) {
    plan.held = 1, plan.row_threads = threads_for(1);
  } else if (vectors <= 4 * kWarp) {
    plan.held = 4, plan.row_threads = kWarp;
  } else if (vectors <= 4 * kMaxRowThreads) {
    plan.held = 4, plan.row_threads = threads_for(4);
  } else {
    plan.held = 8, plan.row_threads = threads_for(8);
  }
  plan.rows_per_block = plan.row_threads == kWarp ? kBlock / kWarp : 1;
  plan.blocks = std::min<int64_t>((rows + plan.rows_per_block - 1) / plan.rows_per_block, 0x7fffffff);
  return plan;
}

// For the backward of norms: as many blocks as the SMs hold at a time, each of which takes every so-manieth row and
// keeps its own sums for the parameters' gradients.  In rows of more than a vector for each of 256 threads, a thread of
// 512 has up to four vectors of floats or two of halves: of x, of dy and, in fp32, of both sums; with four of halves it
// would need 170 registers, and half as many warps would fit.
constexpr Residency kNormBackward{256, 2}, kNormBackwardLong{512, 1};

constexpr int64_t plan_norm_backward_blocks(int64_t rows, const Residency& residency, const Gpu& gpu) {
  return std::min<int64_t>(rows, int64_t{residency.blocks} * gpu.sm_count);
}

// The blocks' sums are added up by blocks of 32 columns x 8 parts of them.
constexpr Residency kSumBlocks{256, 8};
constexpr int kSumBlocksSharedBytes = 2 * 4 * kSumBlocks.threads;

// For elementwise kernels: a block takes kElementwiseVectors vectors for each of its threads, all of one row.
constexpr int kElementwiseThreads = 256, kElementwiseVectors = 4;
constexpr Residency kElementwise{kElementwiseThreads, 2};

LLMKERN_HOST_DEVICE constexpr int64_t elementwise_chunks(int64_t hidden, int vector) {
  const int64_t chunk = int64_t{kElementwiseThreads} * kElementwiseVectors * vector;
  return (hidden + chunk - 1) / chunk;
}

constexpr int64_t elementwise_blocks(int64_t rows, int64_t hidden, int vector) {
  return std::min<int64_t>(rows * elementwise_chunks(hidden, vector), 0x7fffffff);
}

// For rope: a block per batch and position, a thread per vector of first and of second dimensions of pairs (or of
// dimensions that are only copied) of one head.
struct RopePlan {
  int threads;
  int64_t blocks;
};

constexpr int kMaxRopeThreads = 256;
constexpr Residency kRope{kMaxRopeThreads, 2};

constexpr RopePlan plan_rope(int64_t positions, int64_t heads, int64_t dim, int64_t rotary_dim, int vector) {
  const int64_t units = (rotary_dim / 2 + dim - rotary_dim) / vector * heads;
  const int64_t rounds = std::max<int64_t>((units + kMaxRopeThreads - 1) / kMaxRopeThreads, 1);
  const int64_t each = std::max<int64_t>((units + rounds - 1) / rounds, 1);  // no round is left with few units
  return {static_cast<int>((each + 31) / 32 * 32), std::min<int64_t>(positions, 0x7fffffff)};
}

// A block's share of a product: block_m x block_n of the result by warps_m x warps_n warps, in steps of 64 of K, of
// which `stages` are in shared memory or on their way; `resident` such blocks share an SM.  Elements of a have
// element_bytes: codes 1, halves 2; those of the weight are codes.
struct ProductTile {
  int block_m, block_n, warps_m, warps_n, stages, resident, element_bytes;

  LLMKERN_HOST_DEVICE constexpr int threads() const { return 32 * warps_m * warps_n; }
  LLMKERN_HOST_DEVICE constexpr int stage_bytes() const { return (block_m * element_bytes + block_n) * 64; }
  LLMKERN_HOST_DEVICE constexpr int shared_bytes() const { return stages * stage_bytes(); }
  LLMKERN_HOST_DEVICE constexpr Residency residency() const { return {threads(), resident}; }
};

// Every tile fits into the 99 KiB of GeForce and RTX cards.
enum class Int8MatmulKernel : int8_t { wide_tile, large_tile, small_tile, decode_8, decode_16 };
constexpr Int8MatmulKernel kProductTiles[] = {Int8MatmulKernel::wide_tile, Int8MatmulKernel::large_tile,
                                              Int8MatmulKernel::small_tile};

// Halves have no wide tile: their sums are floats, as many registers as codes', but their operands take more.
LLMKERN_HOST_DEVICE constexpr bool has_product_tile(Int8MatmulKernel kernel, bool halves) {
  return kernel != Int8MatmulKernel::wide_tile || !halves;
}

// halves: a's elements.
LLMKERN_HOST_DEVICE constexpr ProductTile product_tile(Int8MatmulKernel kernel, bool halves) {
  if (kernel == Int8MatmulKernel::small_tile)
    return halves ? ProductTile{64, 64, 2, 2, 3, 4, 2} : ProductTile{64, 64, 2, 2, 4, 4, 1};
  if (kernel == Int8MatmulKernel::large_tile)
    return halves ? ProductTile{128, 128, 2, 4, 4, 1, 2} : ProductTile{128, 128, 2, 2, 3, 2, 1};
  return {128, 256, 2, 4, 4, 1, 1};
}

// Clocks of an SM for a step of one block: the longest of tensor cores, which multiply 16x8x32 codes or 16x8x16 halves
// in two (by mma.sync on Hopper and its like in 1.6), of shared memory, 128 bytes in one, and of L2, of which an SM
// gets some 32 bytes in one.
constexpr int64_t step_clocks(const ProductTile& tile, const Gpu& gpu) {
  const int64_t products = int64_t{tile.block_m / 16} * (tile.block_n / 8) * 2 * tile.element_bytes;
  const int64_t tensor = gpu.capability >= 90 && gpu.capability < 120 ? products * 8 / 5 : products * 2;
  const int64_t read =
      (tile.block_m * tile.warps_n * int64_t{tile.element_bytes} + int64_t{tile.block_n} * tile.warps_m) * 64;
  return std::max({tensor, (read + tile.stage_bytes()) / 128, int64_t{tile.stage_bytes()} / 32});
}

constexpr int64_t kLaunchClocks = 1000;  // until a block's first step has landed, and until another kernel begins

// Clocks of the blocks that an SM gets, as many of them at a time as it holds; a step that nothing hides takes 300, and
// a block's results leave by eight elements in one.
constexpr int64_t product_clocks(const ProductTile& tile, int64_t blocks, int64_t steps, const Gpu& gpu) {
  const int64_t resident = resident_blocks(tile.residency(), tile.threads(), tile.shared_bytes(), gpu.sm());
  const int64_t each = (blocks + gpu.sm_count - 1) / gpu.sm_count, clocks = step_clocks(tile, gpu);
  auto together = [&](int64_t count) {
    return steps * std::max<int64_t>(count * clocks, 300) + kLaunchClocks + count * tile.block_m * tile.block_n / 8;
  };
  return each / resident * together(resident) + (each % resident > 0 ? together(each % resident) : 0);
}

struct Int8MatmulPlan {
  Int8MatmulKernel kernel;
  int block_m, block_n, threads, stages, shared_bytes;
  int64_t blocks;  // for each part
  Residency residency;
  int parts;     // of K, each with sums of its own, which another kernel adds up
  int64_t part;  // so many of K each, whole steps
};

constexpr int kMostStreamedRows = 16, kDecodeRows = 16;  // of a; of the weight, at a time in a block
constexpr Residency kDecode{256, 2};
constexpr int64_t kProductStep = 64, kMostParts = 16;

// Split-K into `parts`, or fewer where whole steps make fewer; their sums go through memory, and a second launch adds
// them up.
constexpr Int8MatmulPlan in_parts(Int8MatmulPlan plan, int64_t k, int64_t parts) {
  const int64_t steps = std::max<int64_t>((k + kProductStep - 1) / kProductStep, 1);
  plan.part = (steps + parts - 1) / parts * kProductStep;
  plan.parts = static_cast<int>((steps * kProductStep + plan.part - 1) / plan.part);
  return plan;
}

constexpr Residency kSumParts{256, 4};

// Up to 16 rows cannot fill a tile: then what counts is to stream the weights.  As many blocks as the SMs hold take
// turns at kDecodeRows rows of them, and have enough on the way for their share of the memory's speed, so that only few
// rows of a long K are worth parts.
constexpr Int8MatmulPlan plan_decode(int64_t m, int64_t n, int64_t k, const Gpu& gpu) {
  constexpr int64_t kLeast = 4096;
  const Int8MatmulKernel kernel = m <= 8 ? Int8MatmulKernel::decode_8 : Int8MatmulKernel::decode_16;
  const int rows = m <= 8 ? 8 : 16;
  const int64_t tiles = (n + kDecodeRows - 1) / kDecodeRows;
  const Int8MatmulPlan plan{kernel,
                            rows,
                            kDecodeRows,
                            kDecode.threads,
                            1,
                            kDecode.threads / 32 * rows * kDecodeRows * 4,  // each warp's sums of its share of K
                            std::min<int64_t>(tiles, int64_t{kDecode.blocks} * gpu.sm_count),
                            kDecode,
                            1,
                            0};
  const int64_t room = tiles > 0 ? gpu.sm_count / tiles : 1;
  return in_parts(plan, k, std::clamp<int64_t>(std::min(room, k / kLeast), 1, kMostParts));
}

// Else tiles: those, with K in so many parts of at least kLeast, that take the fewest clocks.  Parts cost another
// kernel, and their sums on the way through L2.  halves: a's elements, instead of codes.
constexpr Int8MatmulPlan plan_int8_matmul(int64_t m, int64_t n, int64_t k, bool halves, const Gpu& gpu) {
  constexpr int64_t kLeast = 1024;
  constexpr auto quotient = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  if (m <= kMostStreamedRows) return plan_decode(m, n, k, gpu);
  const int64_t steps = std::max<int64_t>(quotient(k, kProductStep), 1);
  Int8MatmulPlan best{};
  int64_t fewest = 0;
  for (const Int8MatmulKernel kernel : kProductTiles) {
    if (!has_product_tile(kernel, halves)) continue;
    const ProductTile tile = product_tile(kernel, halves);
    const int64_t blocks = quotient(m, tile.block_m) * quotient(n, tile.block_n);
    const int64_t room = blocks > 0 ? int64_t{tile.resident} * gpu.sm_count / blocks : 1;
    const int64_t most = std::clamp<int64_t>(std::min(room, k / kLeast), 1, kMostParts);
    for (int64_t parts = 1; parts <= most; ++parts) {
      int64_t clocks = product_clocks(tile, blocks * parts, quotient(steps, parts), gpu);
      if (parts > 1) clocks += kLaunchClocks + 8 * parts * m * n / (32 * gpu.sm_count);
      if (fewest > 0 && clocks >= fewest) continue;
      fewest = clocks;
      const Int8MatmulPlan plan{kernel,
                                tile.block_m,
                                tile.block_n,
                                tile.threads(),
                                tile.stages,
                                tile.shared_bytes(),
                                blocks,
                                tile.residency(),
                                1,
                                0};
      best = in_parts(plan, k, parts);
    }
  }
  return best;
}

// The instantiated head dimensions, to which others are padded with zeros.
constexpr int padded_head_dim(int64_t dim) {
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

// For attention_decode: a block has packed queries of one key head (those of all its query heads), 16 for each warp,
// and takes 16 keys for each warp in a step.  With up to 16 queries each warp is a team of its own, which has these
// queries and 16 of the keys; with more, all warps are one team.
struct AttentionDecodeTile {
  int dim, element_bytes;  // of the tiles of keys and values, which are padded with zeros up to dim; of an element
  bool one_team;

  // Two warps with 256 dimensions have as many registers as four with 128.
  LLMKERN_HOST_DEVICE constexpr int warps() const { return dim > 128 ? 2 : 4; }
  LLMKERN_HOST_DEVICE constexpr int threads() const { return 32 * warps(); }
  LLMKERN_HOST_DEVICE constexpr int teams() const { return one_team ? 1 : warps(); }
  LLMKERN_HOST_DEVICE constexpr int rows() const { return 16 * warps() / teams(); }
  LLMKERN_HOST_DEVICE constexpr int keys() const { return 16 * warps(); }
  // Tiles of keys and of values in shared memory or on their way: as many bytes, whatever an element has.
  LLMKERN_HOST_DEVICE constexpr int stages() const { return 8 / element_bytes; }
  LLMKERN_HOST_DEVICE constexpr int ring_bytes() const { return stages() * keys() * dim * element_bytes; }
  LLMKERN_HOST_DEVICE constexpr int scales_bytes() const { return element_bytes == 1 ? stages() * keys() * 4 : 0; }
  // Shared memory for each warp's operands, where registers cannot hold them.
  LLMKERN_HOST_DEVICE constexpr int queries_bytes() const { return dim > 128 ? 16 * warps() * dim * 2 : 0; }
  LLMKERN_HOST_DEVICE constexpr int shared_bytes() const { return ring_bytes() + scales_bytes() + queries_bytes(); }
  LLMKERN_HOST_DEVICE constexpr Residency residency() const {
    return {threads(), dim > 128 ? 4 : dim > 64 ? (one_team ? 2 : 3) : (one_team ? 3 : 4)};
  }
};

struct AttentionDecodePlan {
  AttentionDecodeTile tile;
  int row_tiles, splits;
  int64_t blocks;
};

constexpr int kDecodeLeastKeys = 128;  // of a split that is not the last
constexpr int kMaxDecodeSplits = 128;
constexpr Residency kCombine{128, 8};
constexpr int kCombineSharedBytes = 16 * kCombine.threads;

// rows: packed queries of a key head.  keys: the most that the queries of a sequence see; nobody on the host knows how
// long sequences are.  dim: the larger of keys' and values'.
//
// The number of splits is the one that takes the least time, counted in steps of a block: waves of blocks, each with a
// step's time to start, and one more where splits must be put together.  For each number of waves only the fewest
// splits that have as few steps as any come into question.
constexpr AttentionDecodePlan plan_attention_decode(int64_t batch, int64_t kv_heads, int64_t rows, int64_t keys,
                                                    int64_t dim, int element_bytes, const Gpu& gpu) {
  constexpr auto quotient = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  AttentionDecodePlan plan{};
  plan.tile = {padded_head_dim(dim), element_bytes, rows > 16};
  const AttentionDecodeTile& tile = plan.tile;
  plan.row_tiles = static_cast<int>(quotient(rows, tile.rows()));
  const int64_t tasks = std::max<int64_t>(batch * kv_heads * plan.row_tiles, 1);
  const int64_t at_a_time =
      int64_t{gpu.sm_count} * resident_blocks(tile.residency(), tile.threads(), tile.shared_bytes(), gpu.sm());
  const int64_t most = std::clamp<int64_t>(keys / kDecodeLeastKeys, 1, kMaxDecodeSplits);
  const int64_t all_steps = std::max<int64_t>(quotient(keys, tile.keys()), 1), least_waves = quotient(tasks, at_a_time);
  plan.splits = 1;
  int64_t least_time = least_waves * (all_steps + 1);
  for (int64_t waves = least_waves; waves < least_waves + 3; ++waves) {
    const int64_t steps = quotient(all_steps, std::clamp<int64_t>(waves * at_a_time / tasks, 1, most));
    const int64_t time = waves * (steps + 1) + 1;
    if (time < least_time) least_time = time, plan.splits = static_cast<int>(quotient(all_steps, steps));
  }
  plan.blocks = tasks * plan.splits;
  return plan;
}

constexpr int kAttentionPlaceBytes = 48;  // of shared memory, for a block's current task

// For attention: a block takes block_m queries of a head, and walks the keys that one of them sees by block_n.
struct AttentionTile {
  int dim;  // of queries, keys and values, which are padded with zeros up to it
  int block_m, block_n, warps;
  int stages;    // pairs of blocks of keys and of values in shared memory or on their way
  int held;      // steps of 16 dimensions whose queries stay in registers
  bool masks;    // there are registers for attn_mask
  int resident;  // such blocks share an SM

  LLMKERN_HOST_DEVICE constexpr int threads() const { return 32 * warps; }
  LLMKERN_HOST_DEVICE constexpr int shared_bytes() const {
    return (block_m + 2 * stages * block_n) * 2 * dim + kAttentionPlaceBytes;
  }
  LLMKERN_HOST_DEVICE constexpr Residency residency() const { return {threads(), resident}; }
};

// 32 queries for each warp halve what it reads of keys and values in shared memory; with 128 dimensions their sums then
// leave no registers for the queries too, nor for masks.  compact: half as many keys, for SMs of 100 KiB, which would
// hold one block with 128 dimensions where others hold two.
LLMKERN_HOST_DEVICE constexpr AttentionTile attention_tile(int dim, bool large, bool compact = false) {
  if (dim <= 64)
    return large ? AttentionTile{64, 128, 64, 4, 2, 4, true, 2} : AttentionTile{64, 64, 64, 4, 2, 4, true, 3};
  const int keys = compact ? 32 : 64;
  if (dim <= 128)
    return large ? AttentionTile{128, 128, keys, 4, 1, 0, false, 2} : AttentionTile{128, 64, keys, 4, 2, 8, true, 2};
  return {256, 64, 32, 4, 1, 12, true, 2};
}

struct AttentionPlan {
  AttentionTile tile;
  bool large, compact;
  int query_blocks;
  int64_t blocks;
  int heads_at_once;  // of all batches: blocks of so many heads run side by side, those of the last queries first
};

constexpr int64_t kAttentionCacheBytes = 16 << 20;  // of keys and values, to be read by blocks that run at a time

// Large tiles, unless there are too few of them for the SMs or queries for half a tile.  masked: by attn_mask.  The
// last queries see most keys under causality, so that they begin; across as many heads as have their keys and values in
// L2 together.
constexpr AttentionPlan plan_attention(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys,
                                       int64_t dim, int64_t value_dim, bool masked, const Gpu& gpu) {
  AttentionPlan plan{};
  const int widest = static_cast<int>(std::max(dim, value_dim));
  auto take = [&](bool large) {
    plan.tile = attention_tile(widest, large);
    const int resident =
        resident_blocks(plan.tile.residency(), plan.tile.threads(), plan.tile.shared_bytes(), gpu.sm());
    plan.compact = plan.tile.dim == 128 && resident < 2;
    if (plan.compact) plan.tile = attention_tile(widest, large, true);
    plan.large = large;
    plan.query_blocks = static_cast<int>((queries + plan.tile.block_m - 1) / plan.tile.block_m);
    plan.blocks = plan.query_blocks * heads * batch;
  };
  take(true);
  if (plan.blocks < gpu.sm_count || queries <= attention_tile(widest, false).block_m || (masked && !plan.tile.masks))
    take(false);
  const int64_t group = heads / kv_heads, head_bytes = 2 * std::max<int64_t>(keys, 1) * (dim + value_dim);
  plan.heads_at_once =
      static_cast<int>(std::min(std::max<int64_t>(kAttentionCacheBytes / head_bytes, 1) * group, batch * heads));
  return plan;
}

// attention_backward's kernels: a block keeps `own` rows of queries (row_sums, dq) or of keys (dkv, dk, dv) and walks
// the others in steps, of which two are in shared memory; or a tile of the mask (dmask).
enum class GradientPart : int8_t { row_sums, dq, dkv, dk, dv, dmask };

struct GradientTile {
  int own, step, warps, resident, shared_bytes;

  LLMKERN_HOST_DEVICE constexpr int threads() const { return 32 * warps; }
  LLMKERN_HOST_DEVICE constexpr Residency residency() const { return {threads(), resident}; }
};

// Every tile fits into the 99 KiB of GeForce and RTX cards.  A warp takes 32 rows where its sums, in fp32 registers,
// are small enough, since then each operand that it reads from shared memory serves two products; else 16.  For 256
// dimensions the sums for k and for v are beyond the registers together, so that each has a kernel.
LLMKERN_HOST_DEVICE constexpr GradientTile gradient_tile(int dim, GradientPart part) {
  const bool row_sums = part == GradientPart::row_sums, dq = part == GradientPart::dq;
  GradientTile tile{
      .own = dim == 256 ? 64 : 128, .step = 32, .warps = dim == 128 ? 8 : 4, .resident = 1, .shared_bytes = 0};
  if (dim == 64 && part == GradientPart::dkv) tile.step = 16;  // 32 would spill registers
  if (dim == 256 && (dq || part == GradientPart::dk)) tile.step = 16;
  if (part == GradientPart::dmask) {  // of 64 queries and 32 keys, which both change with each step
    tile = {.own = 64, .step = 32, .warps = 4, .resident = dim == 256 ? 1 : 3, .shared_bytes = 0};
    tile.shared_bytes = 2 * dim * 2 * (tile.own + tile.step);
    return tile;
  }
  if (dim == 64) tile.resident = row_sums ? 5 : 2;
  if (dim > 64 && row_sums) tile.resident = dim == 128 ? 3 : 2;
  const int kept = row_sums || part == GradientPart::dv ? 1 : 2, walked = row_sums ? 1 : 2;
  tile.shared_bytes = 2 * dim * (kept * tile.own + 2 * walked * tile.step);
  if (!row_sums) tile.shared_bytes += 3 * 4 * (dq ? tile.own : 2 * tile.step);  // three numbers of each query
  return tile;
}

constexpr Residency kGradientRows{256, 8};  // of the kernel that runs once for each query

struct AttentionBackwardPlan {
  int dim;                           // of the kernels
  int64_t query_blocks, key_blocks;  // of the kernels that own queries, and of those that own keys
};

constexpr AttentionBackwardPlan plan_attention_backward(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries,
                                                        int64_t keys, int64_t head_dim) {
  const int dim = padded_head_dim(head_dim);
  const int own = gradient_tile(dim, GradientPart::dq).own;
  return {dim, (queries + own - 1) / own * batch * heads, (keys + own - 1) / own * batch * kv_heads};
}

}  // namespace llmkern
