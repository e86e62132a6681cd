// attention: out = softmax(mask(softcap · tanh(q·kᵀ · sm_scale / softcap)) + bias) · v, softmax and sums in fp32.
// Query i stands at key position i + keys − queries; query head h reads key head h / (heads / kv_heads).
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/gpu.h"
#include "llmkern/heads.h"
#include "llmkern/host_device.h"
#include "llmkern/threads.h"

namespace llmkern {

constexpr int64_t kMaxHeadDim = 256;

// Strides of a tensor that broadcasts to [batch, heads, queries, keys]; 0 in broadcast dimensions.
struct ScoreStrides {
  int64_t batch, head, query, key;  // elements
};

struct AttentionParams {
  const void* q;            // [batch, heads, queries, dim], dtype
  const void* k;            // [batch, kv_heads, keys, dim], dtype
  const void* v;            // [batch, kv_heads, keys, value_dim], dtype
  void* out;                // [batch, heads, queries, value_dim], dtype
  float* lse;               // [batch, heads, queries], contiguous, sinks included; null where not wanted
  const void* mask;         // [batch, heads, queries, keys] by mask_strides; null for none
  const bool* key_padding;  // [batch, keys], true for a real key; null for none
  const void* sinks;        // [heads], sinks_dtype; null for none
  char* workspace;          // attention_workspace_bytes(p) bytes, 64-byte aligned
  HeadStrides q_strides, k_strides, v_strides, out_strides;
  ScoreStrides mask_strides;
  struct {
    int64_t batch, key;  // elements
  } padding_strides;
  int64_t batch, heads, kv_heads, queries, keys;  // keys below 2³¹
  int64_t dim, value_dim;                         // at most kMaxHeadDim
  int64_t window_left, window_right;              // keys around the query's own position; -1 for no limit
  DType dtype, mask_dtype, sinks_dtype;
  bool mask_is_bool;  // true: attend; mask_dtype has no meaning then.  false: added to the scaled and capped scores
  bool causal;        // besides window_right: a query sees keys up to its own position
  float sm_scale;
  float softcap;  // 0 for none

  // On the CPU only.
  const void* bias = nullptr;    // [batch, heads, queries, keys] by bias_strides, added to the scores besides the mask
  const void* slopes = nullptr;  // [heads]: a head's times (key + 1 - keys) is added (ALiBi, arXiv:2108.12409)
  ScoreStrides bias_strides = {};
  DType bias_dtype = DType::f32, slopes_dtype = DType::f32;
  // A paged cache, where batch is 1: k and v are [blocks, kv_heads, block_size, dim], "batch" of their strides is the
  // block, and key t is slot t % block_size of block block_table[t / block_size · table_stride], clamped to 0 … blocks
  // − 1.
  const int32_t* block_table = nullptr;
  int64_t table_stride = 1, block_size = 0, blocks = 0;
  int64_t lse_rows = 0;  // from one head's lse to the next; 0 for queries

  LLMKERN_HOST_DEVICE int64_t lse_at(int64_t b, int64_t h, int64_t query) const {
    return (b * heads + h) * (lse_rows ? lse_rows : queries) + query;
  }
};

int64_t attention_workspace_bytes(const AttentionParams& p);

void launch_attention(const AttentionParams& p, const Threads& threads);

// On a GPU q, k and v are bf16 or fp16; keys, and queries of all heads and batches, are at most kGpuMaxLength; dim,
// value_dim and strides are multiples of kGpuDimUnit, pointers of 16 bytes.  There is no workspace.
constexpr int64_t kGpuMaxLength = 1 << 29, kGpuDimUnit = 8;

void launch_attention(const AttentionParams& p, const Gpu& gpu);

}  // namespace llmkern
