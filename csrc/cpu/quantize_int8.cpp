// quantize_int8 on the CPU: a thread per block of rows; each row is read twice, the second time from the cache.
#include "llmkern/quantize_int8.h"

#include "int8.h"
#include "isa.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // below this, waking a thread costs more than it saves

}  // namespace

void quantize_int8(const QuantizeInt8Params& p, const Threads& threads) {
  with_type(p.dtype, [&]<class T>() {
    const auto rows = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* x = static_cast<const T*>(p.x) + p.rows.offset(r);
        p.scale[r] = quantize_row(x, p.hidden, p.codes + r * p.hidden);
      }
    };
    threads.parallel_for(p.rows.count, kElementsPerThread / (p.hidden + 1) + 1, rows);
  });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(quantize_int8, QuantizeInt8Params)
