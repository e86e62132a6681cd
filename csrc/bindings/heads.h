// Shared parts of attention's bindings: tensors [batch, heads, length, dim], and the results.
#pragma once

#include "common.h"
#include "llmkern/attention.h"

namespace llmkern {
namespace {  // as in device.h

inline HeadStrides head_strides(const Tensor& t) {
  const auto strides = t.strides();
  return {strides[0], strides[1], strides[2]};
}

// Every vector is contiguous.
inline bool plain_vectors(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1;
}

// Return true if kernels of this device take vectors of this length.
inline bool served_dim(const Tensor& t) {
  const int64_t dim = t.size(t.dim() - 1);
#ifdef LLMKERN_GPU
  return dim > 0 && dim <= kMaxHeadDim && dim % kGpuDimUnit == 0;
#else
  return dim <= kMaxHeadDim;
#endif
}

// Return true if the kernels can read vectors with these strides; on a GPU they read 16 bytes at once.
inline bool served_vectors(const Tensor& t) {
  if (!plain_vectors(t)) return false;
#ifdef LLMKERN_GPU
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) return false;
  for (int64_t d = 0; d + 1 < t.dim(); ++d)
    if (t.size(d) > 1 && t.stride(d) * static_cast<int64_t>(t.element_size()) % 16 != 0) return false;
#endif
  return true;
}

// t, or a copy where kernels cannot read its vectors as they lie.  The dispatcher refuses strides that need one, but a
// storage that begins anywhere cannot be told from a call's form: `explain` names it.
inline Tensor readable(const Tensor& t) {
  if (served_vectors(t)) return t;
  Tensor copy = new_tensor(t, t.sizes(), t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// Return true if attention's kernels of this device take such queries.
inline bool served_dtype(const Tensor& q) {
#ifdef LLMKERN_GPU
  return dtype_of(q) == DType::bf16 || dtype_of(q) == DType::f16;
#else
  return dtype_of(q).has_value();
#endif
}

// An uninitialised [batch, heads, queries, dim] like q in the memory order [batch, queries, heads, dim].
inline Tensor out_like(const Tensor& q, int64_t dim) {
  const int64_t heads = q.size(1), queries = q.size(2);
  const int64_t sizes[] = {q.size(0), heads, queries, dim};
  const int64_t strides[] = {queries * heads * dim, dim, heads * dim, 1};
  return new_strided(q, sizes, strides);
}

// Allocates the log-sum-exp for q; it has 0 elements if none is wanted.
inline Tensor lse_like(const Tensor& q, bool wanted) {
  if (!wanted) return new_tensor(q, {0}, ScalarType::Float);
  return new_tensor(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
}

inline void check_device(const char* op, const char* name, const Tensor& q, const Tensor& t) {
  STD_TORCH_CHECK(on_device(q, t), op, ": ", name, " must be on q's device");
}

// Shapes that a kernel relies on, of q [B, Hq, Sq, D] and of keys and values or their caches.
inline void check_heads(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op, ": q, k and v must have 4 dimensions");
  check_device(op, "k", q, k);
  check_device(op, "v", q, v);
  STD_TORCH_CHECK(k.size(3) == q.size(3), op, ": k has head dimension ", k.size(3), ", q has ", q.size(3));
  STD_TORCH_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2), op,
                  ": k and v differ before the last dimension");
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, op, ": q has ", q.size(1),
                  " heads, which is no multiple of k's ", k.size(1));
}

inline const void* sinks_of(const char* op, const Tensor& q, const std::optional<Tensor>& sinks) {
  if (!sinks) return nullptr;
  check_device(op, "sinks", q, *sinks);
  STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == q.size(1) && sinks->is_contiguous(), op,
                  ": sinks must be contiguous with ", q.size(1), " elements, one per head");
  return sinks->const_data_ptr();
}

}  // namespace
}  // namespace llmkern
