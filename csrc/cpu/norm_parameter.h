// The weight and bias of a normalisation, widened to fp32 once for all rows.
#pragma once

#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kKept = 8192;  // of a row, or a parameter, in fp32 on the stack

// weight + offset, or bias.
template <bool kLong>
struct Parameter {
  const void* values;  // fp32 but for long rows; null where there is no such parameter
  DType dtype;
  float offset;

  Parameter(const void* given, DType type, float added, int64_t hidden, float* kept)
      : values(given), dtype(type), offset(added) {
    if (kLong || !given || (dtype == DType::f32 && offset == 0.0f)) return;
    for_registers(hidden, [&](int64_t i, int n) { store_at_most(kept + i, widened(i, n), n); });
    values = kept;
  }

  F32 widened(int64_t i, int n) const {
    const auto raw = with_type(dtype, [&]<class P>() { return load_at_most(static_cast<const P*>(values) + i, n); });
    return raw + offset;
  }

  F32 at(int64_t i, int n) const {
    if constexpr (kLong) return widened(i, n);
    return load_at_most(static_cast<const float*>(values) + i, n);
  }
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
