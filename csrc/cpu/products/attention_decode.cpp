// attention_decode on the CPU: the chunks of attention_chunks.h, put together where a sequence has several.
#include "llmkern/attention_decode.h"

#include "../isa.h"
#include "attention_chunks.h"

namespace llmkern::LLMKERN_ISA {
namespace {

template <class T, class C>
void decode(const AttentionDecodeParams& p, const Threads& threads) {
  using namespace decoding;
  const Call c{p};
  const int64_t heads = p.batch * p.kv_heads;
  int64_t chunks = 1;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t n = c.chunks(c.length(b));
    chunks = n > chunks ? n : chunks;
  }
  const int64_t grain = kElementsPerThread / (kChunk * (p.dim + p.value_dim)) + 1;
  threads.parallel_for(heads * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i / chunks;
      run_chunk<T, C>(c, at, i % chunks);
      if (chunks == 1) finish<T>(c, at, c.chunks(c.length(at / p.kv_heads)));
    }
  });
  if (chunks == 1) return;
  const int64_t finish_grain = kElementsPerThread / (chunks * c.rows * c.out_floats) + 1;
  threads.parallel_for(heads, finish_grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) finish<T>(c, at, c.chunks(c.length(at / p.kv_heads)));
  });
}

}  // namespace

void attention_decode(const AttentionDecodeParams& p, const Threads& threads) {
  with_type(p.dtype, [&]<class T>() { p.k_scale ? decode<T, int8_t>(p, threads) : decode<T, T>(p, threads); });
}

}  // namespace llmkern::LLMKERN_ISA

#ifdef LLMKERN_PORTABLE
int64_t llmkern::attention_decode_workspace_bytes(const AttentionDecodeParams& p) {
  using namespace portable::decoding;
  return workspace_bytes(Call{p});
}
#endif

LLMKERN_PRODUCTS_LAUNCHER(attention_decode, AttentionDecodeParams)
