// kv_append and kv_read on the CPU: a thread per block of vectors, one vector for each head of each token.
#include "llmkern/kv_cache.h"

#include "int8.h"
#include "isa.h"
#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // below this, waking a thread costs more than it saves

// f(b, h, t) for every head of every token.
template <class F>
void each_vector(const KvCacheParams& p, const Threads& threads, const F& f) {
  threads.parallel_for(p.batch * p.heads * p.length, kElementsPerThread / (p.dim + 1) + 1,
                       [&](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i)
                           f(i / p.length / p.heads, i / p.length % p.heads, i % p.length);
                       });
}

}  // namespace

void kv_append(const KvCacheParams& p, const Threads& threads) {
  with_type(p.dtype, [&]<class T>() {
    each_vector(p, threads, [&](int64_t b, int64_t h, int64_t t) {
      const T* x = static_cast<const T*>(p.x) + p.x_strides.offset(b, h, t);
      const int64_t at = p.cache_strides.offset(b, h, t);
      if (p.scale == nullptr) {
        std::memcpy(static_cast<T*>(p.cache) + at, x, p.dim * sizeof(T));
      } else {
        p.scale[p.scale_strides.offset(b, h, t)] = quantize_row(x, p.dim, static_cast<int8_t*>(p.cache) + at);
      }
    });
  });
}

void kv_read(const KvCacheParams& p, const Threads& threads) {
  with_type(p.dtype, [&]<class T>() {
    each_vector(p, threads, [&](int64_t b, int64_t h, int64_t t) {
      T* x = static_cast<T*>(p.x) + p.x_strides.offset(b, h, t);
      const int8_t* codes = static_cast<const int8_t*>(p.cache) + p.cache_strides.offset(b, h, t);
      const F32 scale = broadcast(p.scale[p.scale_strides.offset(b, h, t)]);
      for (int64_t i = 0; i < p.dim; i += kLanes) {
        store_at_most(x + i, load_at_most(codes + i, p.dim - i) * scale, p.dim - i);
      }
    });
  });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(kv_append, KvCacheParams)
LLMKERN_CPU_LAUNCHER(kv_read, KvCacheParams)
