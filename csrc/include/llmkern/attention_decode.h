// attention_decode: causal attention of each sequence's last queries, whose keys and values are in the cache already.
// Query i of sequence b stands at position lengths[b] − queries + i.
#pragma once

#include <cstdint>

#include "llmkern/attention.h"
#include "llmkern/dtype.h"
#include "llmkern/gpu.h"
#include "llmkern/host_device.h"
#include "llmkern/threads.h"

namespace llmkern {

constexpr int64_t kDecodeQueries = 16;  // up to here it is faster than attention

// A cache is contiguous, [batch, kv_heads, slots, dim], or paged, [blocks, kv_heads, slots, dim]: "batch" of its
// strides is then the block, and position t of sequence b is slot t % slots of block block_table[b, t / slots].
struct AttentionDecodeParams {
  const void* q;               // [batch, heads, queries, dim], dtype
  const void* k_cache;         // dtype, or int8 codes where k_scale is given
  const void* v_cache;         // [.., value_dim], as k_cache
  const float* k_scale;        // [batch or blocks, kv_heads, slots]: key = code · scale; null for a cache in dtype
  const float* v_scale;        // as k_scale: both or neither
  const void* lengths;         // [batch], tokens in the cache, the queries' own included; null: every slot is used
  const int32_t* block_table;  // [batch, max_blocks]; null for a contiguous cache
  const void* sinks;           // [heads], sinks_dtype; null for none
  void* out;                   // [batch, heads, queries, value_dim], dtype
  float* lse;                  // [batch, heads, queries], contiguous, sinks included; null where not wanted
  char* workspace;             // attention_decode_workspace_bytes(p) bytes, 64-byte aligned
  HeadStrides q_strides, k_strides, v_strides, out_strides;
  HeadStrides k_scale_strides, v_scale_strides;    // each scale in the place of a vector
  int64_t lengths_stride;                          // elements
  int64_t table_batch_stride, table_block_stride;  // elements
  int64_t batch, heads, kv_heads, queries;
  int64_t dim, value_dim;  // at most kMaxHeadDim
  int64_t slots;  // per sequence; of a block where paged.  Lengths beyond the capacity are taken as the capacity
  int64_t blocks, max_blocks;  // paged only; entries of the table outside 0 … blocks − 1 are clamped to it
  int64_t window_left;         // keys before the query's own position; -1 for no limit
  DType dtype, sinks_dtype;
  bool lengths_are_64;  // int64, else int32
  float sm_scale;
  float softcap;  // 0 for none

  int64_t lse_rows = 0;  // on the CPU: from one head's lse to the next; 0 for queries

  LLMKERN_HOST_DEVICE int64_t lse_at(int64_t b, int64_t h, int64_t query) const {
    return (b * heads + h) * (lse_rows ? lse_rows : queries) + query;
  }

  // Tokens that the cache can hold of a sequence.
  LLMKERN_HOST_DEVICE int64_t capacity() const { return block_table ? max_blocks * slots : slots; }
};

int64_t attention_decode_workspace_bytes(const AttentionDecodeParams& p);

inline int64_t attention_decode_workspace_bytes(const AttentionDecodeParams& p, const Threads&) {
  return attention_decode_workspace_bytes(p);  // for any number of threads
}

void launch_attention_decode(const AttentionDecodeParams& p, const Threads& threads);

// On a GPU: fp16 and bf16, dimensions that are multiples of kGpuDimUnit, vectors of q, of the caches and of out at
// multiples of 16 bytes, and a capacity of at most kGpuMaxLength.
int64_t attention_decode_workspace_bytes(const AttentionDecodeParams& p, const Gpu& gpu);

void launch_attention_decode(const AttentionDecodeParams& p, const Gpu& gpu);

}  // namespace llmkern
