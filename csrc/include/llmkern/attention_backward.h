// attention_backward: the gradients of attention (llmkern/attention.h).  With P the weights, dP = dO·Vᵀ,
// Δ = rowsum(dO∘O) − dlse, and slope the derivative of softcap's tanh (1 without):
//   dS = P ∘ (dP − Δ),  dV = Pᵀ·dO,  dQ = sm_scale · (dS∘slope)·K,  dK = sm_scale · (dS∘slope)ᵀ·Q,  dsink = −Σ P_sink·Δ
// k and v of a group of heads sum over it, and a mask that was added has dS, summed over what it was broadcast over.  P
// is computed again from the log-sum-exp of each row.
#pragma once

#include <cstdint>

#include "llmkern/attention.h"
#include "llmkern/gpu.h"

namespace llmkern {

struct AttentionBackwardParams {
  AttentionParams forward;  // as it was called; out and lse (null where it was not kept) are what it returned
  const void* dout;         // [batch, heads, queries, value_dim], dtype
  const float* dlse;        // [batch, heads, queries], contiguous; null for 0
  void* dq;                 // [batch, heads, queries, dim], dtype, contiguous, as the next two
  void* dk;                 // [batch, kv_heads, keys, dim]
  void* dv;                 // [batch, kv_heads, keys, value_dim]
  void* dmask;              // mask_sizes, mask_dtype, contiguous; null where it is not wanted
  void* dsinks;             // [heads], sinks_dtype; null for no sinks
  float* workspace;         // attention_backward_workspace_floats(forward)
  HeadStrides dout_strides;
  struct {
    int64_t batch, head, query, key;  // 1 where the mask is broadcast, else those of the scores
  } mask_sizes;
};

// For each row: the shift of its scores, a factor of its weights, and Δ.
constexpr int64_t attention_backward_workspace_floats(const AttentionParams& p) {
  return 3 * p.batch * p.heads * p.queries;
}

void launch_attention_backward(const AttentionBackwardParams& p, const Gpu& gpu);

}  // namespace llmkern
