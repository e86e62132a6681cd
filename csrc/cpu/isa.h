// One source, several instruction sets.  setup.py compiles every csrc/cpu/*.cpp once per set, with
//   LLMKERN_ISA        the namespace that its code lives in: portable, avx2, avx512
//   LLMKERN_ISA_LEVEL  0, 1, 2
// and LLMKERN_CPU_LAUNCHER ties the copies together: launch_<op> calls the best one that this CPU runs.
//
// An object compiled for AVX-512 must not export an inline function or template instantiation under a name that
// the others share: the linker would keep one copy, perhaps that one, for all.  So everything in a kernel file is
// inside LLMKERN_ISA and, but for the entry point, in an unnamed namespace; tests/backends/test_native.py checks the
// objects.
#pragma once

namespace llmkern {

// portable: the compiler's baseline (SSE2 on x86-64).  avx2: with FMA, F16C, BMI (x86-64-v3).
// avx512: F, BW, CD, DQ, VL (x86-64-v4) and VNNI.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// The set in use: the best one that this CPU and this build have, or the one that was asked for.
Isa isa();

}  // namespace llmkern

#if LLMKERN_ISA_LEVEL > 0
#define LLMKERN_CPU_LAUNCHER(op, Params)
#elif defined(__x86_64__)
#define LLMKERN_CPU_LAUNCHER(op, Params)                      \
  namespace llmkern {                                         \
  namespace avx2 {                                            \
  void op(const Params& p, const Threads& threads);           \
  }                                                           \
  namespace avx512 {                                          \
  void op(const Params& p, const Threads& threads);           \
  }                                                           \
  void launch_##op(const Params& p, const Threads& threads) { \
    if (isa() == Isa::avx512) return avx512::op(p, threads);  \
    if (isa() == Isa::avx2) return avx2::op(p, threads);      \
    portable::op(p, threads);                                 \
  }                                                           \
  }
#else
#define LLMKERN_CPU_LAUNCHER(op, Params)                      \
  namespace llmkern {                                         \
  void launch_##op(const Params& p, const Threads& threads) { \
    portable::op(p, threads);                                 \
  }                                                           \
  }
#endif
