// One source, several instruction sets.  setup.py compiles every csrc/cpu/*.cpp for those of LLMKERN_CPU_SETS and every
// csrc/cpu/products/*.cpp for those of LLMKERN_PRODUCT_SETS, and all of them as portable, with
//   LLMKERN_ISA        the namespace that its code lives in
//   LLMKERN_ISA_LEVEL  0, 1, 2: the width of a register is 16 << level bytes
//   LLMKERN_PORTABLE   defined in the portable copy, for what one copy is enough of
// and LLMKERN_CPU_LAUNCHER, or LLMKERN_PRODUCTS_LAUNCHER, ties the copies together: launch_<op> calls the best one that
// this CPU runs.
//
// An object compiled for AVX-512 must not export an inline function or template instantiation under a name that
// the others share: the linker would keep one copy, perhaps that one, for all.  So everything in a kernel file is
// inside LLMKERN_ISA and, but for the entry point, in an unnamed namespace; tests/backends/test_native.py checks the
// objects.
#pragma once

// Best first; portable, the last of them all, is not listed.
#if defined(__x86_64__)
#define LLMKERN_CPU_SETS(X, ...) X(avx512, __VA_ARGS__) X(avx2, __VA_ARGS__)
#define LLMKERN_PRODUCT_SETS(X, ...) \
  X(amx, __VA_ARGS__)                \
  X(avx512_bf16, __VA_ARGS__)        \
  X(avx512_vnni, __VA_ARGS__) X(avx512, __VA_ARGS__) X(avx2_vnni, __VA_ARGS__) X(avx2, __VA_ARGS__)
#elif defined(__aarch64__)
#define LLMKERN_CPU_SETS(X, ...)
#define LLMKERN_PRODUCT_SETS(X, ...) X(neon_i8mm, __VA_ARGS__) X(neon_dotprod, __VA_ARGS__)
#else
#define LLMKERN_CPU_SETS(X, ...)
#define LLMKERN_PRODUCT_SETS(X, ...)
#endif

namespace llmkern {

// portable: the compiler's baseline (SSE2 on x86-64, NEON on aarch64).  avx2: with FMA, F16C, BMI (x86-64-v3).  avx512:
// F, BW, CD, DQ, VL (x86-64-v4).  _vnni: with products of four bytes.  _bf16: with both those and products of two bf16
// (AVX512-BF16).  amx: avx512_bf16 with AMX's tiles of int8 and bf16.  neon_dotprod: with products of four bytes.
// neon_i8mm: neon_dotprod with products of 2 × 2 rows of int8 and of bf16.
enum class Isa : int { portable, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16, amx, neon_dotprod, neon_i8mm };

// The set in use: the best one that this CPU and this build have, or the one that was asked for.
Isa isa();

}  // namespace llmkern

#define LLMKERN_DECLARE(set, op, Params)            \
  namespace set {                                   \
  void op(const Params& p, const Threads& threads); \
  }
#define LLMKERN_CALL_IF_BEST(set, op) \
  if (isa() >= Isa::set) return set::op(p, threads);

#ifdef LLMKERN_PORTABLE
#define LLMKERN_LAUNCHER(SETS, op, Params)                    \
  namespace llmkern {                                         \
  SETS(LLMKERN_DECLARE, op, Params)                           \
  void launch_##op(const Params& p, const Threads& threads) { \
    SETS(LLMKERN_CALL_IF_BEST, op)                            \
    portable::op(p, threads);                                 \
  }                                                           \
  }
#else
#define LLMKERN_LAUNCHER(SETS, op, Params)
#endif
#define LLMKERN_CPU_LAUNCHER(op, Params) LLMKERN_LAUNCHER(LLMKERN_CPU_SETS, op, Params)
#define LLMKERN_PRODUCTS_LAUNCHER(op, Params) LLMKERN_LAUNCHER(LLMKERN_PRODUCT_SETS, op, Params)
