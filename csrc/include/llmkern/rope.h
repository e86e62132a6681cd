// rope: the rotary embedding of queries and keys in one launch.  For a pair of dimensions (a, b) below rotary_dim
//   out[a] = x[a]·cos[a] − x[b]·sin[a],  out[b] = x[b]·cos[b] + x[a]·sin[b]
// with pairs (i, i + rotary_dim/2), or (2i, 2i + 1) interleaved; the other dimensions are copied.
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/gpu.h"
#include "llmkern/heads.h"
#include "llmkern/threads.h"

namespace llmkern {

constexpr int64_t kRopeMostDims = 1024;

// One of the tensors [batch, heads, length, dim] to rotate.  out may be x itself (with the same strides), or lie in a
// cache of keys.
struct RopeHeads {
  const void* x;
  void* out;
  int64_t heads;  // 0: there is nothing to rotate
  HeadStrides x_strides, out_strides;
};

// cos or sin: [batch, length, width], each position contiguous; batch stride 0 where all batches have the same.
struct RopeAngles {
  const void* values;
  int64_t batch_stride, position_stride;  // elements
};

struct RopeParams {
  RopeHeads q, k;
  RopeAngles cos, sin;
  int64_t batch, length, dim;
  int64_t rotary_dim;  // even, at most dim and kRopeMostDims
  int64_t width;       // of cos and sin: rotary_dim, or rotary_dim / 2 with one value for each pair
  DType dtype, angles_dtype;
  bool interleaved;
};

void launch_rope(const RopeParams& p, const Threads& threads);
void launch_rope(const RopeParams& p, const Gpu& gpu);

}  // namespace llmkern
