// The choice of instruction set, and the two functions by which Python reads and sets it (ctypes; llmkern/_native.py).
#include "isa.h"

#if LLMKERN_ISA_LEVEL == 0  // one copy is enough

#include <atomic>
#include <cstring>

namespace llmkern {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Isa best() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<Isa> in_use{best()};

}  // namespace

Isa isa() {
  return in_use.load(std::memory_order_relaxed);
}

}  // namespace llmkern

#define LLMKERN_EXPORT extern "C" __attribute__((visibility("default")))

LLMKERN_EXPORT const char* llmkern_cpu_isa() {
  return llmkern::kNames[static_cast<int>(llmkern::isa())];
}

// 0: done.  1: this CPU cannot run it, or there is no such set.
LLMKERN_EXPORT int llmkern_set_cpu_isa(const char* name) {
  const int most = static_cast<int>(llmkern::best());
  for (int i = 0; i <= most; ++i) {
    if (std::strcmp(name, llmkern::kNames[i]) != 0) continue;
    llmkern::in_use = static_cast<llmkern::Isa>(i);
    return 0;
  }
  return 1;
}

#endif
