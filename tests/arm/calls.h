// What host.cpp asks guest.cpp for: a launcher, or a question, and its params struct as it lies in memory.  Both see
// the tensors at the same addresses, in memory that they share, so that the pointers in the struct hold for both.
#pragma once

#include <cstdint>

#include "llmkern/activate.h"
#include "llmkern/add.h"
#include "llmkern/attention.h"
#include "llmkern/attention_decode.h"
#include "llmkern/attention_varlen.h"
#include "llmkern/cross_entropy.h"
#include "llmkern/experts.h"
#include "llmkern/kv_cache.h"
#include "llmkern/linear.h"
#include "llmkern/norm.h"
#include "llmkern/quantize_int8.h"
#include "llmkern/rope.h"
#include "llmkern/turned_linear.h"

// Every launch_<op>(const Params&, const Threads&).
#define LLMKERN_LAUNCHERS(X)                 \
  X(activate, ActivateParams)                \
  X(add, AddParams)                          \
  X(attention, AttentionParams)              \
  X(attention_decode, AttentionDecodeParams) \
  X(attention_varlen, AttentionVarlenParams) \
  X(combine, CombineParams)                  \
  X(cross_entropy, CrossEntropyParams)       \
  X(kv_append, KvCacheParams)                \
  X(kv_read, KvCacheParams)                  \
  X(linear, LinearParams)                    \
  X(norm, NormParams)                        \
  X(quantize_int8, QuantizeInt8Params)       \
  X(rope, RopeParams)                        \
  X(route, RouteParams)                      \
  X(turned_linear, TurnedLinearParams)

namespace llmkern {

enum class Function : int32_t {
#define LLMKERN_NAME(op, Params) op,
  LLMKERN_LAUNCHERS(LLMKERN_NAME)
#undef LLMKERN_NAME
      attention_workspace_bytes,
  attention_decode_workspace_bytes,
  attention_varlen_workspace_bytes,
  linear_takes_many_rows,
  linear_keeps_rows_alone,
  set_isa,  // to the set of this name; 0: done
  get_isa,  // as text
};

struct Request {
  Function function;
  alignas(8) char params[1024];
};

struct Answer {
  int64_t value;
  char text[24];
};

// Where the shared memory lies: no process puts anything there of its own accord.
inline constexpr uintptr_t kSharedAt = uintptr_t{1} << 45;

}  // namespace llmkern
