// One source, several instruction sets.  setup.py compiles every csrc/cpu/*.cpp for portable, avx2 and avx512, and
// every csrc/cpu/products/*.cpp for all sets below, with
//   LLMKERN_ISA        the namespace that its code lives in
//   LLMKERN_ISA_LEVEL  0, 1, 2: the width of a register is 16 << level bytes
// and LLMKERN_CPU_LAUNCHER, or LLMKERN_PRODUCTS_LAUNCHER, ties the copies together: launch_<op> calls the best one that
// this CPU runs.
//
// An object compiled for AVX-512 must not export an inline function or template instantiation under a name that
// the others share: the linker would keep one copy, perhaps that one, for all.  So everything in a kernel file is
// inside LLMKERN_ISA and, but for the entry point, in an unnamed namespace; tests/backends/test_native.py checks the
// objects.
#pragma once

namespace llmkern {

// portable: the compiler's baseline (SSE2 on x86-64).  avx2: with FMA, F16C, BMI (x86-64-v3).  avx512: F, BW, CD, DQ,
// VL (x86-64-v4).  _vnni: with products of four bytes.  _bf16: with both those and products of two bf16 (AVX512-BF16).
// amx: avx512_bf16 with AMX's tiles of int8 and bf16.
enum class Isa : int { portable, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16, amx };

// The set in use: the best one that this CPU and this build have, or the one that was asked for.
Isa isa();

}  // namespace llmkern

#define LLMKERN_DECLARE(isa, op, Params)            \
  namespace isa {                                   \
  void op(const Params& p, const Threads& threads); \
  }

#if LLMKERN_ISA_LEVEL > 0
#define LLMKERN_CPU_LAUNCHER(op, Params)
#define LLMKERN_PRODUCTS_LAUNCHER(op, Params)
#elif defined(__x86_64__)
#define LLMKERN_CPU_LAUNCHER(op, Params)                      \
  namespace llmkern {                                         \
  LLMKERN_DECLARE(avx2, op, Params)                           \
  LLMKERN_DECLARE(avx512, op, Params)                         \
  void launch_##op(const Params& p, const Threads& threads) { \
    if (isa() >= Isa::avx512) return avx512::op(p, threads);  \
    if (isa() >= Isa::avx2) return avx2::op(p, threads);      \
    portable::op(p, threads);                                 \
  }                                                           \
  }
#define LLMKERN_PRODUCTS_LAUNCHER(op, Params)                 \
  namespace llmkern {                                         \
  LLMKERN_DECLARE(avx2, op, Params)                           \
  LLMKERN_DECLARE(avx2_vnni, op, Params)                      \
  LLMKERN_DECLARE(avx512, op, Params)                         \
  LLMKERN_DECLARE(avx512_vnni, op, Params)                    \
  LLMKERN_DECLARE(avx512_bf16, op, Params)                    \
  LLMKERN_DECLARE(amx, op, Params)                            \
  void launch_##op(const Params& p, const Threads& threads) { \
    switch (isa()) {                                          \
      case Isa::portable:                                     \
        return portable::op(p, threads);                      \
      case Isa::avx2:                                         \
        return avx2::op(p, threads);                          \
      case Isa::avx2_vnni:                                    \
        return avx2_vnni::op(p, threads);                     \
      case Isa::avx512:                                       \
        return avx512::op(p, threads);                        \
      case Isa::avx512_vnni:                                  \
        return avx512_vnni::op(p, threads);                   \
      case Isa::avx512_bf16:                                  \
        return avx512_bf16::op(p, threads);                   \
      case Isa::amx:                                          \
        return amx::op(p, threads);                           \
    }                                                         \
  }                                                           \
  }
#else
#define LLMKERN_CPU_LAUNCHER(op, Params)                      \
  namespace llmkern {                                         \
  void launch_##op(const Params& p, const Threads& threads) { \
    portable::op(p, threads);                                 \
  }                                                           \
  }
#define LLMKERN_PRODUCTS_LAUNCHER(op, Params) LLMKERN_CPU_LAUNCHER(op, Params)
#endif
