// attention on the CPU: the blocks of attention_blocks.h, whose tasks need nothing of each other.
#include "llmkern/attention.h"

#include "../isa.h"
#include "attention_blocks.h"

namespace llmkern::LLMKERN_ISA {

void attention(const AttentionParams& p, const Threads& threads) {
  const Call c{p};
  threads.parallel_for(
      p.batch * p.kv_heads * c.blocks, kProductsPerThread / products_of_task(p) + 1,
      [&](int64_t begin, int64_t end) { with_type(p.dtype, [&]<class T>() { tasks_of<T>(c, begin, end); }); });
}

}  // namespace llmkern::LLMKERN_ISA

#ifdef LLMKERN_PORTABLE
int64_t llmkern::attention_workspace_bytes(const AttentionParams&) {
  return 0;
}
#endif

LLMKERN_PRODUCTS_LAUNCHER(attention, AttentionParams)
