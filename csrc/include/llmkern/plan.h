// Which kernel a CUDA launcher chooses, and with what grid: the heuristics, in one place for launchers, tests and
// `llmkern why`.  Plain C++, so that they are known where there is no GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "llmkern/rows.h"

namespace llmkern {

// For kernels that work row by row (norms, activations, quantization).
struct RowPlan {
  int vector;       // elements per access: 16 bytes of them, or 1 where rows are not aligned
  int held;         // vectors of a row that each thread holds in registers: 1, 4 or 8
  int row_threads;  // 32: a warp per row; more: the block
  int rows_per_block;
  int64_t blocks;
};

constexpr int kMaxRowThreads = 512;

// A warp takes a row of up to four vectors per lane: no barrier, and every lane has several loads in flight.  Longer
// rows take a block, of as many threads as give each four vectors; with fewer rows than SMs, one row should use the
// whole SM, so each thread has one.  512 threads hold up to 8 each: 32,768 halves.
constexpr RowPlan plan_rows(int64_t rows, int64_t hidden, int element_bytes, bool aligned, int sm_count) {
  constexpr int kWarp = 32, kBlock = 128;
  RowPlan plan{};
  plan.vector = aligned && hidden % (16 / element_bytes) == 0 ? 16 / element_bytes : 1;
  const int64_t vectors = hidden / plan.vector;
  auto threads_for = [&](int64_t each) {
    return static_cast<int>(std::min<int64_t>((vectors + each * kWarp - 1) / (each * kWarp) * kWarp, kMaxRowThreads));
  };
  const bool few_rows = rows <= sm_count;
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

// For elementwise kernels: a block takes kElementwiseVectors vectors for each of its threads, all of one row.
constexpr int kElementwiseThreads = 256, kElementwiseVectors = 4;

LLMKERN_HOST_DEVICE constexpr int64_t elementwise_chunks(int64_t hidden, int vector) {
  const int64_t chunk = int64_t{kElementwiseThreads} * kElementwiseVectors * vector;
  return (hidden + chunk - 1) / chunk;
}

constexpr int64_t elementwise_blocks(int64_t rows, int64_t hidden, int vector) {
  return std::min<int64_t>(rows * elementwise_chunks(hidden, vector), 0x7fffffff);
}

enum class Int8MatmulKernel : int8_t { tile_128x128, tile_64x64, decode_8, decode_16 };

struct Int8MatmulPlan {
  Int8MatmulKernel kernel;
  int block_m, block_n;  // of the result
  int64_t blocks;
};

constexpr int kDecodeThreads = 256;

// Up to 16 rows cannot fill a tile: then what counts is to stream the weights.  Otherwise large tiles, which load least
// for each product, unless there are too few of them for the SMs.
constexpr Int8MatmulPlan plan_int8_matmul(int64_t m, int64_t n, int sm_count) {
  auto plan = [&](Int8MatmulKernel kernel, int block_m, int block_n) {
    return Int8MatmulPlan{kernel, block_m, block_n, (m + block_m - 1) / block_m * ((n + block_n - 1) / block_n)};
  };
  if (m <= 8) return plan(Int8MatmulKernel::decode_8, 8, 16);
  if (m <= 16) return plan(Int8MatmulKernel::decode_16, 16, 16);
  const Int8MatmulPlan large = plan(Int8MatmulKernel::tile_128x128, 128, 128);
  return large.blocks >= sm_count ? large : plan(Int8MatmulKernel::tile_64x64, 64, 64);
}

}  // namespace llmkern
