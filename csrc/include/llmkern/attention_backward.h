// attention_backward: the gradients of attention (llmkern/attention.h).  With P the weights, dP = dO·Vᵀ,
// Δ = rowsum(dO∘O) − dlse, and slope the derivative of softcap's tanh (1 without):
//   dS = P ∘ (dP − Δ),  dV = Pᵀ·dO,  dQ = sm_scale · (dS∘slope)·K,  dK = sm_scale · (dS∘slope)ᵀ·Q,  dsink = −Σ P_sink·Δ
// k and v of a group of heads sum over it, and a mask that was added has dS, summed over what it was broadcast over.  P
// is computed again from the log-sum-exp of each row.
#pragma once

#include <cstdint>

#include "llmkern/attention.h"
#include "llmkern/gpu.h"
#include "llmkern/threads.h"

namespace llmkern {

struct AttentionBackwardParams {
  AttentionParams forward;  // the forward's params; out and lse (null if not kept) are its results
  const void* dout;         // [batch, heads, queries, value_dim], dtype
  const float* dlse;        // [batch, heads, queries], contiguous; null for 0
  void* dq;                 // [batch, heads, queries, dim], dtype, contiguous, as the next two
  void* dk;                 // [batch, kv_heads, keys, dim]
  void* dv;                 // [batch, kv_heads, keys, value_dim]
  void* dmask;              // mask_sizes, mask_dtype, contiguous; null where it is not wanted
  void* dsinks;             // [heads], sinks_dtype; null for no sinks
  float* workspace;         // attention_backward_workspace_floats(forward, dmask wanted, where it runs)
  HeadStrides dout_strides;
  struct {
    int64_t batch, head, query, key;  // 1 where the mask is broadcast, else those of the scores
  } mask_sizes;
};

// For each row: the shift of its scores, a factor of its weights, and Δ.
inline int64_t attention_backward_workspace_floats(const AttentionParams& p, bool, const Gpu&) {
  return 3 * p.batch * p.heads * p.queries;
}

// On the CPU dk and dv are sums of splits of the rows, so many for each key head by the sizes alone.
constexpr int64_t attention_backward_splits(const AttentionParams& p) {
  const int64_t heads = p.batch * p.kv_heads, rows = p.heads / p.kv_heads * p.queries;
  const int64_t wanted = heads > 0 ? (16 + heads - 1) / heads : 1, most = rows / 128;
  return wanted <= most ? wanted : most > 1 ? most : 1;
}

// Floats from one key's sums to the next key's.
constexpr int64_t attention_backward_stride(int64_t dim) {
  return (dim + 15) / 16 * 16;
}

// The splits' sums, the gradient of each row's sink, and of each score where a mask has one.
inline int64_t attention_backward_workspace_floats(const AttentionParams& p, bool mask_grad, const Threads&) {
  const int64_t rows = p.batch * p.heads * p.queries;
  const int64_t of_key = attention_backward_stride(p.dim) + attention_backward_stride(p.value_dim);
  return attention_backward_splits(p) * p.batch * p.kv_heads * p.keys * of_key + (p.sinks ? rows : 0) +
         (mask_grad ? rows * p.keys : 0);
}

void launch_attention_backward(const AttentionBackwardParams& p, const Threads& threads);
void launch_attention_backward(const AttentionBackwardParams& p, const Gpu& gpu);

}  // namespace llmkern
