// add on the CPU: a thread per block of elements.
#include "llmkern/add.h"

#include "isa.h"
#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // below this, waking a thread costs more than it saves

}  // namespace

void add(const AddParams& p, const Threads& threads) {
  with_type(p.dtype, [&]<class T>() {
    const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
    T* out = static_cast<T*>(p.out);
    const F32 multiplier = broadcast(p.multiplier), constant = broadcast(p.constant);
    const F32 low = broadcast(p.low), high = broadcast(p.high);
    threads.parallel_for(p.count, kElementsPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kLanes) {
        F32 y = load_at_most(a + i, end - i) * multiplier + constant;
        if (b) y += load_at_most(b + i, end - i);
        y = y < low ? low : y;
        store_at_most(out + i, y > high ? high : y, end - i);
      }
    });
  });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(add, AddParams)
