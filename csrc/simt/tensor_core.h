// Sums of products as tensor cores compute them, to the bit: Xie et al. 2025, "MMA-Sim", arXiv:2511.10909; tests
// compare with its package mmasim.  Up to L products and the running sum are each truncated, towards zero, F bits below
// the largest exponent (a product's is the sum of its factors'), added exactly, and the sum is truncated to fp32.  Up
// to sm_89 L = 8 and F = 24, from sm_90 on L = 16 and F = 25.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>
#include <type_traits>

namespace llmkern::simt {

template <class To, class From>
inline To number(From x) {
  if constexpr (std::is_same_v<From, __nv_bfloat16>) {
    return std::bit_cast<float>(static_cast<uint32_t>(std::bit_cast<uint16_t>(x)) << 16);
#ifdef __F16C__
  } else if constexpr (std::is_same_v<From, __half>) {
    return static_cast<float>(std::bit_cast<_Float16>(x));
#endif
  } else {
    return static_cast<To>(x);
  }
}

template <int kK>
inline void add_products(int32_t (&sums)[16][8], const int32_t (&left)[16][kK], const int32_t (&right)[kK][8]) {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kK; ++k)
      for (int n = 0; n < 8; ++n)
        sums[m][n] =
            static_cast<int32_t>(static_cast<uint32_t>(sums[m][n]) + static_cast<uint32_t>(left[m][k] * right[k][n]));
}

// kK is 8 or 16.
template <int kK>
void add_products(float (&sums)[16][8], const float (&left)[16][kK], const float (&right)[kK][8]);

}  // namespace llmkern::simt
