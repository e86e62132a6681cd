#include "llmkern/attention_varlen.h"

#include <vector>

#include "../heads.h"
#include "threads.h"

namespace llmkern {
namespace {

constexpr const char* kOp = "attention_varlen";

// Strides of [tokens, heads, dim], or of a cache [sequences or blocks, slots, heads, dim].
HeadStrides token_strides(const Tensor& t) {
  const auto strides = t.strides();
  return t.dim() == 3 ? HeadStrides{0, strides[1], strides[0]} : HeadStrides{strides[0], strides[2], strides[1]};
}

// The lengths, contiguous int32 [count]; null where not given.
const int32_t* lengths_of(const char* name, const Tensor& q, const std::optional<Tensor>& lengths, int64_t count) {
  if (!lengths) return nullptr;
  check_device(kOp, name, q, *lengths);
  STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Int && lengths->dim() == 1 && lengths->size(0) == count &&
                      lengths->is_contiguous(),
                  kOp, ": ", name, " must be contiguous int32 of shape [", count, "]");
  return static_cast<const int32_t*>(lengths->const_data_ptr());
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                                            const std::optional<Tensor>& seqused_k,
                                            const std::optional<Tensor>& block_table,
                                            const std::optional<Tensor>& sinks, bool causal, double sm_scale,
                                            std::vector<int64_t> window, double softcap, bool return_lse) {
  STD_TORCH_CHECK(q.dim() == 3 && cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) > 0, kOp,
                  ": q must have 3 dimensions, cu_seqlens_q 1 with at least one element");
  STD_TORCH_CHECK(cu_seqlens_k.has_value() != seqused_k.has_value() && !(cu_seqlens_k && block_table), kOp,
                  ": either cu_seqlens_k or seqused_k is given, and a block_table beside seqused_k only");
  const int64_t dims = cu_seqlens_k ? 3 : 4, batch = cu_seqlens_q.size(0) - 1;
  STD_TORCH_CHECK(k.dim() == dims && v.dim() == dims, kOp, ": k and v must have ", dims, " dimensions");
  check_device(kOp, "k", q, k);
  check_device(kOp, "v", q, v);
  for (int64_t d = 0; d < dims - 1; ++d)
    STD_TORCH_CHECK(k.size(d) == v.size(d), kOp, ": k and v differ before the last dimension");
  STD_TORCH_CHECK(k.size(dims - 1) == q.size(2), kOp, ": k has head dimension ", k.size(dims - 1), ", q has ",
                  q.size(2));
  const int64_t kv_heads = k.size(dims - 2), slots = cu_seqlens_k ? 0 : k.size(1);
  STD_TORCH_CHECK(kv_heads > 0 && q.size(1) % kv_heads == 0, kOp, ": q has ", q.size(1),
                  " heads, which is no multiple of k's ", kv_heads);
  const bool same = k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type();
  if (!kernel_types(q, sinks) || !same || !served_dim(q) || !served_dim(v))
    return call_reference<std::tuple<Tensor, Tensor>>(kOp, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
                                                      sinks, causal, sm_scale, window, softcap, return_lse);
  STD_TORCH_CHECK(window.size() == 2, kOp, ": window must have two elements");
  if (block_table) {
    check_device(kOp, "block_table", q, *block_table);
    STD_TORCH_CHECK(block_table->scalar_type() == ScalarType::Int && block_table->dim() == 2 &&
                        block_table->size(0) == batch && slots > 0 && (k.size(0) > 0 || block_table->numel() == 0),
                    kOp, ": block_table must be int32 of shape [", batch, ", max_blocks], and k have blocks");
  } else if (!cu_seqlens_k) {
    STD_TORCH_CHECK(k.size(0) == batch, kOp, ": k has batch size ", k.size(0), ", cu_seqlens_q ", batch);
  }
  const Tensor q_ = readable(q), keys = readable(k), values = readable(v);
  const int64_t rows = q.size(0), heads = q.size(1), value_dim = v.size(dims - 1);
  Tensor out = new_tensor(q, {rows, heads, value_dim}, q.scalar_type());
  Tensor lse = return_lse ? new_tensor(q, {heads, rows}, ScalarType::Float) : new_tensor(q, {0}, ScalarType::Float);
  AttentionVarlenParams p{
      .q = q_.const_data_ptr(),
      .k = keys.const_data_ptr(),
      .v = values.const_data_ptr(),
      .cu_seqlens_q = lengths_of("cu_seqlens_q", q, cu_seqlens_q, batch + 1),
      .cu_seqlens_k = lengths_of("cu_seqlens_k", q, cu_seqlens_k, batch + 1),
      .seqused_k = lengths_of("seqused_k", q, seqused_k, batch),
      .block_table = block_table ? static_cast<const int32_t*>(block_table->const_data_ptr()) : nullptr,
      .sinks = sinks_of(kOp, q, sinks),
      .out = out.mutable_data_ptr(),
      .lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr,
      .workspace = nullptr,
      .q_strides = token_strides(q_),
      .k_strides = token_strides(keys),
      .v_strides = token_strides(values),
      .out_strides = token_strides(out),
      .table_batch_stride = block_table ? block_table->stride(0) : 0,
      .table_block_stride = block_table ? block_table->stride(1) : 0,
      .batch = batch,
      .heads = heads,
      .kv_heads = kv_heads,
      .rows = rows,
      .keys = k.size(0),
      .slots = slots,
      .blocks = k.size(0),
      .max_blocks = block_table ? block_table->size(1) : 0,
      .dim = q.size(2),
      .value_dim = value_dim,
      .window_left = window[0],
      .window_right = window[1],
      .dtype = *dtype_of(q),
      .sinks_dtype = dtype_or_f32(sinks),
      .causal = causal,
      .sm_scale = static_cast<float>(sm_scale),
      .softcap = static_cast<float>(softcap),
  };
  Tensor workspace = new_tensor(q, {attention_varlen_workspace_bytes(p)}, ScalarType::Byte);
  p.workspace = static_cast<char*>(workspace.mutable_data_ptr());
  launch_attention_varlen(p, kTorchThreads);
  return {out, lse};
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("attention_varlen", TORCH_BOX(&llmkern::attention_varlen));
}
