// kv_cache: new keys or values into a cache of tokens, and out of it where a kernel wants them in another type.
//   kv_append   cache[b, h, t] = x[b, h, t], or its codes and their scale = quantize_int8(x[b, h, t])
//   kv_read     x[b, h, t] = cache[b, h, t] · scale[b, h, t]
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/heads.h"
#include "llmkern/threads.h"

namespace llmkern {

struct KvCacheParams {
  void* x;       // [batch, heads, length, dim], dtype; kv_append reads it, kv_read writes it
  void* cache;   // [batch, heads, length, dim] at the place of the tokens in question; dtype, or codes with a scale
  float* scale;  // [batch, heads, length]; null for a cache in dtype
  HeadStrides x_strides, cache_strides;
  HeadStrides scale_strides;  // each scale in the place of a vector
  int64_t batch, heads, length, dim;
  DType dtype;
};

void launch_kv_append(const KvCacheParams& p, const Threads& threads);
void launch_kv_read(const KvCacheParams& p, const Threads& threads);

}  // namespace llmkern
