// attention_varlen: attention of sequences that lie packed behind each other, each against its own keys: packed too, or
// in a cache, contiguous or paged.  Query i of a sequence stands at key position i + its keys − its queries.
#pragma once

#include <cstdint>

#include "llmkern/attention.h"
#include "llmkern/dtype.h"
#include "llmkern/threads.h"

namespace llmkern {

struct AttentionVarlenParams {
  const void* q;                // [rows, heads, dim], dtype
  const void* k;                // [all keys, kv_heads, dim], [batch, slots, ..] or [blocks, slots, ..], dtype
  const void* v;                // [.., value_dim], as k
  const int32_t* cu_seqlens_q;  // [batch + 1]: sequence b's queries are rows [b] to [b + 1] − 1
  const int32_t* cu_seqlens_k;  // [batch + 1]: k and v are packed likewise; null for a cache
  const int32_t* seqused_k;     // [batch]: keys of each sequence in the cache; null where packed
  const int32_t* block_table;   // [batch, max_blocks]: key t is in slot t % slots of block [t / slots]; null for none
  const void* sinks;            // [heads], sinks_dtype; null for none
  void* out;                    // [rows, heads, value_dim], dtype
  float* lse;                   // [heads, rows], contiguous, sinks included; null where not wanted
  char* workspace;              // attention_varlen_workspace_bytes(p) bytes, 64-byte aligned
  // "batch" is 0 for what is packed; of a cache the sequence, or the block.
  HeadStrides q_strides, k_strides, v_strides, out_strides;
  int64_t table_batch_stride, table_block_stride;  // elements
  int64_t batch, heads, kv_heads, rows;
  int64_t keys;                // in all, where packed
  int64_t slots;               // of a sequence in the cache; of a block where paged
  int64_t blocks, max_blocks;  // paged only; entries of the table outside 0 … blocks − 1 are clamped to it
  int64_t dim, value_dim;      // at most kMaxHeadDim
  int64_t window_left, window_right;
  DType dtype, sinks_dtype;
  bool causal;
  float sm_scale;
  float softcap;  // 0 for none

  struct Sequence {
    int64_t first_row, queries, first_key, keys;  // first_key: 0 in a cache
  };

  // Lengths that lead outside the tensors are cut off.
  LLMKERN_HOST_DEVICE Sequence sequence(int64_t b) const {
    const auto within = [](int64_t n, int64_t low, int64_t high) { return n < low ? low : n > high ? high : n; };
    Sequence s;
    s.first_row = within(cu_seqlens_q[b], 0, rows);
    s.queries = within(cu_seqlens_q[b + 1], s.first_row, rows) - s.first_row;
    s.first_key = cu_seqlens_k ? within(cu_seqlens_k[b], 0, keys) : 0;
    s.keys = cu_seqlens_k ? within(cu_seqlens_k[b + 1], s.first_key, keys) - s.first_key
                          : within(seqused_k[b], 0, block_table ? max_blocks * slots : slots);
    return s;
  }
};

// Reads the sequences' lengths.
int64_t attention_varlen_workspace_bytes(const AttentionVarlenParams& p);

void launch_attention_varlen(const AttentionVarlenParams& p, const Threads& threads);

}  // namespace llmkern
