#include "llmkern/attention_decode.h"

#include <vector>

#include "heads.h"

namespace llmkern {
namespace {

constexpr const char* kOp = "attention_decode";

// [batch or blocks, kv_heads, slots] in fp32.
const float* scales_of(const char* name, const Tensor& cache, const Tensor& scale) {
  check_device(kOp, name, cache, scale);
  STD_TORCH_CHECK(scale.dim() == 3 && scale.size(0) == cache.size(0) && scale.size(1) == cache.size(1) &&
                      scale.size(2) == cache.size(2),
                  kOp, ": ", name, " must have the cache's shape but for the last dimension");
  return static_cast<const float*>(scale.const_data_ptr());
}

std::tuple<Tensor, Tensor> attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                            const Tensor& seq_lens, const std::optional<Tensor>& block_table,
                                            const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                                            const std::optional<Tensor>& sinks, double sm_scale,
                                            std::vector<int64_t> window, double softcap, bool return_lse) {
  STD_TORCH_CHECK(k_scale.has_value() == v_scale.has_value(), kOp, ": k_scale and v_scale are given both or neither");
  check_heads(kOp, q, k_cache, v_cache);
  const auto stored = [&](const Tensor& cache, const std::optional<Tensor>& scale) {
    if (!served_dim(cache)) return false;
    if (!scale) return cache.scalar_type() == q.scalar_type();
    return cache.scalar_type() == ScalarType::Char && scale->scalar_type() == ScalarType::Float;
  };
  if (!kernel_types(q, sinks) || !served_dtype(q) || !served_dim(q) || !stored(k_cache, k_scale) ||
      !stored(v_cache, v_scale) || k_cache.size(2) * (block_table ? block_table->size(1) : 1) > kGpuMaxLength)
    return call_reference<std::tuple<Tensor, Tensor>>(kOp, q, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale,
                                                      sinks, sm_scale, window, softcap, return_lse);
  const int64_t batch = q.size(0);
  check_device(kOp, "seq_lens", q, seq_lens);
  const bool lengths_are_64 = seq_lens.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(lengths_are_64 || seq_lens.scalar_type() == ScalarType::Int, kOp,
                  ": seq_lens must be int32 or int64");
  STD_TORCH_CHECK(seq_lens.dim() == 1 && seq_lens.size(0) == batch, kOp, ": seq_lens must have shape [", batch, "]");
  STD_TORCH_CHECK(window.size() == 2, kOp, ": window must have two elements");
  if (block_table) {
    check_device(kOp, "block_table", q, *block_table);
    STD_TORCH_CHECK(block_table->scalar_type() == ScalarType::Int && block_table->dim() == 2 &&
                        block_table->size(0) == batch && (k_cache.size(0) > 0 || block_table->numel() == 0),
                    kOp, ": block_table must be int32 of shape [", batch, ", max_blocks], and the cache have blocks");
  } else {
    STD_TORCH_CHECK(k_cache.size(0) == batch, kOp, ": k_cache has batch size ", k_cache.size(0), ", q has ", batch);
  }
  const Tensor q_ = readable(q), keys = readable(k_cache), values = readable(v_cache);
  Tensor out = out_like(q, v_cache.size(3));
  Tensor lse = lse_like(q, return_lse);
  AttentionDecodeParams p{
      .q = q_.const_data_ptr(),
      .k_cache = keys.const_data_ptr(),
      .v_cache = values.const_data_ptr(),
      .k_scale = k_scale ? scales_of("k_scale", k_cache, *k_scale) : nullptr,
      .v_scale = v_scale ? scales_of("v_scale", v_cache, *v_scale) : nullptr,
      .lengths = seq_lens.const_data_ptr(),
      .block_table = block_table ? static_cast<const int32_t*>(block_table->const_data_ptr()) : nullptr,
      .sinks = sinks_of(kOp, q, sinks),
      .out = out.mutable_data_ptr(),
      .lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr,
      .workspace = nullptr,
      .q_strides = head_strides(q_),
      .k_strides = head_strides(keys),
      .v_strides = head_strides(values),
      .out_strides = head_strides(out),
      .k_scale_strides = k_scale ? head_strides(*k_scale) : HeadStrides{},
      .v_scale_strides = v_scale ? head_strides(*v_scale) : HeadStrides{},
      .lengths_stride = seq_lens.stride(0),
      .table_batch_stride = block_table ? block_table->stride(0) : 0,
      .table_block_stride = block_table ? block_table->stride(1) : 0,
      .batch = batch,
      .heads = q.size(1),
      .kv_heads = k_cache.size(1),
      .queries = q.size(2),
      .dim = q.size(3),
      .value_dim = v_cache.size(3),
      .slots = k_cache.size(2),
      .blocks = k_cache.size(0),
      .max_blocks = block_table ? block_table->size(1) : 0,
      .window_left = window[0],
      .dtype = *dtype_of(q),
      .sinks_dtype = dtype_or_f32(sinks),
      .lengths_are_64 = lengths_are_64,
      .sm_scale = static_cast<float>(sm_scale),
      .softcap = static_cast<float>(softcap),
  };
  const Place place(q);
  Tensor workspace = new_tensor(q, {attention_decode_workspace_bytes(p, place)}, ScalarType::Byte);
  p.workspace = static_cast<char*>(workspace.mutable_data_ptr());
  launch_attention_decode(p, place);
  return {out, lse};
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("attention_decode", TORCH_BOX(&llmkern::attention_decode));
}
