// The choice of instruction set, and the two functions by which Python reads and sets it (ctypes; llmkern/_native.py).
#include "isa.h"

#ifdef LLMKERN_PORTABLE

#include <atomic>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace llmkern {
namespace {

constexpr const char* kNames[] = {"portable",    "avx2", "avx2_vnni",    "avx512",   "avx512_vnni",
                                  "avx512_bf16", "amx",  "neon_dotprod", "neon_i8mm"};
constexpr int kSets = 9;

#ifdef __x86_64__
// Linux hands out the tiles' registers, 8 KiB of state to save, to processes that ask.
bool tiles_granted() {
#ifdef __linux__
  constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}
#endif

bool runs(Isa isa) {
  if (isa == Isa::portable) return true;
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  switch (isa) {
    case Isa::avx2:
      return avx2;
    case Isa::avx2_vnni:
      return avx2 && __builtin_cpu_supports("avxvnni");
    case Isa::avx512:
      return avx512;
    case Isa::avx512_vnni:
      return vnni;
    case Isa::avx512_bf16:
      return bf16;
    case Isa::amx:
      return bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
             __builtin_cpu_supports("amx-bf16") && tiles_granted();
    default:
      return false;
  }
#elif defined(__aarch64__) && defined(__linux__)
  const bool dotprod = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
  constexpr unsigned long kMatrices = HWCAP2_I8MM | HWCAP2_BF16;
  if (isa == Isa::neon_dotprod) return dotprod;
  if (isa == Isa::neon_i8mm) return dotprod && (getauxval(AT_HWCAP2) & kMatrices) == kMatrices;
#endif
  return false;
}

Isa best() {
  int i = kSets - 1;
  while (!runs(static_cast<Isa>(i))) --i;
  return static_cast<Isa>(i);
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
  for (int i = 0; i < llmkern::kSets; ++i) {
    const auto isa = static_cast<llmkern::Isa>(i);
    if (std::strcmp(name, llmkern::kNames[i]) != 0 || !llmkern::runs(isa)) continue;
    llmkern::in_use = isa;
    return 0;
  }
  return 1;
}

#endif
