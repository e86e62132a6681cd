// Built-in declarations of CUDA C++ for a host compiler and the SIMT machine: intrinsics that kernels of csrc/cuda use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "approximate.h"
#include "machine.h"

// The bound on a block's threads is kept where the machine finds it: as so many bytes before the kernel's entry, whose
// beginning is listed in a section of the library.
#undef __launch_bounds__
#define LLMKERN_SIMT_BOUND(threads, ...) __attribute__((patchable_function_entry((threads), (threads))))
#define __launch_bounds__(...) LLMKERN_SIMT_BOUND(__VA_ARGS__, 0)

LLMKERN_SIMT_INLINE void __syncthreads() {
  llmkern::simt::barrier("bar.sync", 0, 0, true);
}

LLMKERN_SIMT_INLINE void __syncwarp(unsigned mask = llmkern::simt::kAllLanes) {
  llmkern::simt::sync_warp(mask);
}

LLMKERN_SIMT_INLINE void __threadfence() {
  llmkern::simt::fence();
}

namespace llmkern::simt {

// Every lane of the mask gives a value and gets f(values by lane, lane).
template <class T, class F>
LLMKERN_SIMT_INLINE T exchange(const char* instruction, unsigned mask, T value, int argument, F) {
  struct Operands {
    T value, *result;
    int argument;
  };
  T result;
  collective<Meets::anywhere>(instruction, mask, Operands{value, &result, argument},
                              [](Operands* const(&lanes)[kWarp]) {
                                for (int l = 0; l < kWarp; ++l)
                                  if (lanes[l]) *lanes[l]->result = F{}(lanes, l);
                              });
  return result;
}

// The value of lane `from`, if it takes part; reading a lane that does not is undefined: here, all bits set.
template <class T, class Lanes>
T value_of(const Lanes& lanes, int from) {
  T poison;
  std::memset(&poison, 0xff, sizeof(poison));
  return lanes[from] ? lanes[from]->value : poison;
}

template <class T, class F>
LLMKERN_SIMT_INLINE T reduce(const char* instruction, unsigned mask, T value, F) {
  return exchange(instruction, mask, value, 0, [](const auto& lanes, int) {
    bool first = true;
    T all{};
    for (auto* lane : lanes) {
      if (!lane) continue;
      all = first ? lane->value : F{}(all, lane->value);
      first = false;
    }
    return all;
  });
}

}  // namespace llmkern::simt

template <class T>
LLMKERN_SIMT_INLINE T __shfl_sync(unsigned mask, T value, int from) {
  return llmkern::simt::exchange("shfl.sync.idx", mask, value, from, [](const auto& lanes, int l) {
    return llmkern::simt::value_of<T>(lanes, lanes[l]->argument & 31);
  });
}

template <class T>
LLMKERN_SIMT_INLINE T __shfl_xor_sync(unsigned mask, T value, int with) {
  return llmkern::simt::exchange("shfl.sync.bfly", mask, value, with, [](const auto& lanes, int l) {
    return llmkern::simt::value_of<T>(lanes, l ^ lanes[l]->argument);
  });
}

template <class T>
LLMKERN_SIMT_INLINE T __shfl_up_sync(unsigned mask, T value, int by) {
  return llmkern::simt::exchange("shfl.sync.up", mask, value, by, [](const auto& lanes, int l) {
    const int from = l - lanes[l]->argument;
    return llmkern::simt::value_of<T>(lanes, from < 0 ? l : from);
  });
}

template <class T>
LLMKERN_SIMT_INLINE T __shfl_down_sync(unsigned mask, T value, int by) {
  return llmkern::simt::exchange("shfl.sync.down", mask, value, by, [](const auto& lanes, int l) {
    const int from = l + lanes[l]->argument;
    return llmkern::simt::value_of<T>(lanes, from > 31 ? l : from);
  });
}

LLMKERN_SIMT_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
  return llmkern::simt::exchange("vote.sync.ballot", mask, unsigned{predicate != 0}, 0, [](const auto& lanes, int) {
    unsigned votes = 0;
    for (int l = 0; l < 32; ++l)
      if (lanes[l]) votes |= lanes[l]->value << l;
    return votes;
  });
}

LLMKERN_SIMT_INLINE int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}

LLMKERN_SIMT_INLINE int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

template <class T>
LLMKERN_SIMT_INLINE T __reduce_max_sync(unsigned mask, T value) {
  return llmkern::simt::reduce("redux.sync.max", mask, value, [](T a, T b) { return std::max(a, b); });
}

template <class T>
LLMKERN_SIMT_INLINE T __reduce_min_sync(unsigned mask, T value) {
  return llmkern::simt::reduce("redux.sync.min", mask, value, [](T a, T b) { return std::min(a, b); });
}

template <class T>
LLMKERN_SIMT_INLINE T __reduce_add_sync(unsigned mask, T value) {
  return llmkern::simt::reduce("redux.sync.add", mask, value, [](T a, T b) { return a + b; });
}

// Blocks run one after the other and a thread until it waits, so an atomic operation is an ordinary one.
template <class T, class U>
LLMKERN_SIMT_INLINE T atomicAdd(T* address, U value) {
  llmkern::simt::check("atom.add", llmkern::simt::Space::global, llmkern::simt::Access::atomic, address, sizeof(T));
  return std::exchange(*address, *address + value);
}

// Byte i of the result is byte selector[4 i, 4 i + 2] of the eight of low and high.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

using std::max, std::min;

inline float rsqrtf(float x) {
  return llmkern::simt::approximate(static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))), x,
                                    0x1.125fp-23f);  // 2^-22.9
}

inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}

inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}

inline int __float2int_rn(float x) {
  return static_cast<int>(std::nearbyint(x));
}
