// Shared by the bindings of attention and of its backward: the call's arguments as params.
#pragma once

#include <vector>

#include "heads.h"

namespace llmkern {
namespace {  // as in device.h

// Keys, and on a GPU queries of all heads and batches, are at most so many.
#ifdef LLMKERN_GPU
constexpr int64_t kMaxLength = kGpuMaxLength;
#else
constexpr int64_t kMaxLength = INT32_MAX;
#endif

struct AttentionCall {
  const Tensor &q, &k, &v;
  const std::optional<Tensor>&attn_mask, &key_padding_mask, &sinks;
  bool causal;
  double sm_scale;
  const std::vector<int64_t>& window;
  double softcap;

  bool mask_is_bool() const { return attn_mask && attn_mask->scalar_type() == ScalarType::Bool; }

  // Return true if kernels of this device take the element types.
  bool has_served_types() const {
    return served_dtype(q) && kernel_types(q, sinks) && (!attn_mask || mask_is_bool() || dtype_of(*attn_mask)) &&
           k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type();
  }
};

// Fills the params without the results; raises if a kernel could not rely on shapes or devices.
inline AttentionParams attention_params(const char* op, const AttentionCall& call) {
  const auto& [q, k, v, attn_mask, key_padding_mask, sinks, causal, sm_scale, window, softcap] = call;
  check_heads(op, q, k, v);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  STD_TORCH_CHECK(k.size(0) == batch, op, ": k has batch size ", k.size(0), ", q has ", batch);
  STD_TORCH_CHECK(window.size() == 2, op, ": window must have two elements");
  const bool is_bool = call.mask_is_bool();
  AttentionParams p{
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .out = nullptr,
      .lse = nullptr,
      .mask = nullptr,
      .key_padding = nullptr,
      .sinks = sinks_of(op, q, sinks),
      .workspace = nullptr,
      .q_strides = head_strides(q),
      .k_strides = head_strides(k),
      .v_strides = head_strides(v),
      .out_strides = {},
      .mask_strides = {},
      .padding_strides = {},
      .batch = batch,
      .heads = heads,
      .kv_heads = k.size(1),
      .queries = queries,
      .keys = keys,
      .dim = q.size(3),
      .value_dim = v.size(3),
      .window_left = window[0],
      .window_right = window[1],
      .dtype = *dtype_of(q),
      .mask_dtype = is_bool ? DType::f32 : dtype_or_f32(attn_mask),
      .sinks_dtype = dtype_or_f32(sinks),
      .mask_is_bool = is_bool,
      .causal = causal,
      .sm_scale = static_cast<float>(sm_scale),
      .softcap = static_cast<float>(softcap),
  };
  if (attn_mask) {
    const int64_t full[] = {batch, heads, queries, keys};
    check_device(op, "attn_mask", q, *attn_mask);
    STD_TORCH_CHECK(attn_mask->dim() == 4, op, ": attn_mask must have 4 dimensions");
    int64_t strides[4];
    for (int d = 0; d < 4; ++d) {
      const int64_t size = attn_mask->size(d);
      STD_TORCH_CHECK(size == full[d] || size == 1, op, ": attn_mask has size ", size, " in dimension ", d,
                      ", expected 1 or ", full[d]);
      strides[d] = size == 1 ? 0 : attn_mask->stride(d);
    }
    p.mask = attn_mask->const_data_ptr();
    p.mask_strides = {strides[0], strides[1], strides[2], strides[3]};
  }
  if (key_padding_mask) {
    check_device(op, "key_padding_mask", q, *key_padding_mask);
    STD_TORCH_CHECK(key_padding_mask->scalar_type() == ScalarType::Bool && key_padding_mask->dim() == 2 &&
                        key_padding_mask->size(0) == batch && key_padding_mask->size(1) == keys,
                    op, ": key_padding_mask must be bool of shape [", batch, ", ", keys, "]");
    p.key_padding = static_cast<const bool*>(key_padding_mask->const_data_ptr());
    p.padding_strides = {key_padding_mask->stride(0), key_padding_mask->stride(1)};
  }
  return p;
}

}  // namespace
}  // namespace llmkern
