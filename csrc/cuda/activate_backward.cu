// activate_backward: gradients of activation(x) · up, for gelu and swiglu (llmkern/activate_backward.h)
// work     as in activate.cu: 256 threads take 1024 vectors of a row, here two at a time, all loaded before the first
//          is used; rows without gaps are one long row
// needs    any shape; 16-byte accesses where rows are aligned, else element by element
#include "llmkern/activate_backward.h"

#include "common/activation.cuh"
#include "common/elementwise.cuh"

namespace llmkern {
namespace {

template <class T, int kVector, Activation kActivation>
__global__ void __launch_bounds__(kElementwise.threads, kElementwise.blocks)
    activate_backward_kernel(const ActivateBackwardParams p) {
  using Vector = Packed<T, kVector>;
  constexpr int kTogether = 2;
  each_chunk<kVector>(p.x_rows.count, p.hidden, [&](int64_t row, const auto& column) {
    const T* dy = static_cast<const T*>(p.dy) + p.dy_rows.offset(row);
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    const T* up = p.up ? static_cast<const T*>(p.up) + p.up_rows.offset(row) : nullptr;
    T* dx = static_cast<T*>(p.dx) + row * p.hidden;
    T* dup = static_cast<T*>(p.dup) + row * p.hidden;
#pragma unroll
    for (int first = 0; first < kElementwiseVectors; first += kTogether) {
      Vector given[kTogether], value[kTogether], factor[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (column(first + i) >= p.hidden) break;
        given[i].load(dy + column(first + i)), value[i].load(x + column(first + i));
        if (up) factor[i].load(up + column(first + i));
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (column(first + i) >= p.hidden) break;
        float d[kVector], z[kVector], f[kVector];
        given[i].unpack(d), value[i].unpack(z);
        if (up) factor[i].unpack(f);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const Activated at = activate_with_slope<kActivation, kDigitsOf<T>>(z[j]);
          z[j] = d[j] * at.slope;
          if (up) z[j] *= f[j], f[j] = d[j] * at.value;
        }
        value[i].pack(z);
        value[i].store(dx + column(first + i));
        if (!up) continue;
        factor[i].pack(f);
        factor[i].store(dup + column(first + i));
      }
    }
  });
}

template <class T, int kVector>
void launch_elements(const ActivateBackwardParams& p, const Gpu& gpu) {
  const LaunchConfig config = elementwise_launch(p.x_rows.count, p.hidden, kVector);
  with_op_activation(p.activation, [&]<Activation kActivation>() {
    launch("activate_backward", activate_backward_kernel<T, kVector, kActivation>, config, gpu, p);
  });
}

}  // namespace

void launch_activate_backward(const ActivateBackwardParams& given, const Gpu& gpu) {
  ActivateBackwardParams p = given;
  if (p.x_rows.count == 0 || p.hidden == 0) return;  // an empty grid is a launch error
  if (without_gaps(p.x_rows, p.hidden) && without_gaps(p.dy_rows, p.hidden) &&
      (!p.up || without_gaps(p.up_rows, p.hidden))) {
    p.hidden *= p.x_rows.count;
    p.x_rows = p.dy_rows = p.up_rows = dense_rows(1, p.hidden);
  }
  with_type(p.dtype, [&]<class T>() {
    constexpr int kV = kPerVector<T>;
    const bool vectors = p.hidden % kV == 0 && aligned(p.dx, sizeof(T), kV) && aligned(p.dup, sizeof(T), kV) &&
                         aligned_rows<T>(p.dy, p.dy_rows) && aligned_rows<T>(p.x, p.x_rows) &&
                         aligned_rows<T>(p.up, p.up_rows);
    vectors ? launch_elements<T, kV>(p, gpu) : launch_elements<T, 1>(p, gpu);
  });
}

}  // namespace llmkern
