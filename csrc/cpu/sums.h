// Sums over a row that lose no accuracy where it is long.
#pragma once

#include <array>

#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// Σ f(i, n) over the registers of a row, kSums sums at a time, each of which is made of sums of blocks.  f returns the
// kSums addends; of a last register of n < kLanes elements the other lanes are ignored.
template <size_t kSums, class F>
std::array<float, kSums> sums_of(int64_t count, const F& f) {
  constexpr int64_t kStep = 2 * kLanes, kBlock = 32 * kStep;
  F32 total[kSums] = {};
  int64_t i = 0;
  while (i + kStep <= count) {
    const int64_t end = count - i < kBlock ? count : i + kBlock;
    F32 even[kSums] = {}, odd[kSums] = {};
    for (; i + kStep <= end; i += kStep) {
      const std::array<F32, kSums> a = f(i, kLanes), b = f(i + kLanes, kLanes);
      for (size_t s = 0; s < kSums; ++s) even[s] += a[s], odd[s] += b[s];
    }
    for (size_t s = 0; s < kSums; ++s) total[s] += even[s] + odd[s];
  }
  for (; i < count; i += kLanes) {
    const int n = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    const std::array<F32, kSums> a = f(i, n);
    for (size_t s = 0; s < kSums; ++s) total[s] += first(a[s], n);
  }
  std::array<float, kSums> sums;
  for (size_t s = 0; s < kSums; ++s) sums[s] = sum(total[s]);
  return sums;
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
