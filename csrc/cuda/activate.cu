// activate: out = activation(x) · up, for swiglu and gelu (llmkern/activate.h)
// work     256 threads take 1024 vectors of 16 bytes of a row, four each, all loaded before the first is used; rows
//          without gaps are one long row
// needs    any shape; 16-byte accesses where rows are aligned, else element by element
#include "llmkern/activate.h"

#include "common/activation.cuh"
#include "common/row.cuh"

namespace llmkern {
namespace {

template <class T, int kVector, Activation kActivation>
__global__ void __launch_bounds__(kElementwiseThreads) activate_kernel(const ActivateParams p) {
  using Vector = Packed<T, kVector>;
  const int64_t chunks = elementwise_chunks(p.hidden, kVector);
  for (int64_t chunk = blockIdx.x; chunk < p.x_rows.count * chunks; chunk += gridDim.x) {
    const int64_t row = chunk / chunks, first = chunk % chunks * kElementwiseVectors * kElementwiseThreads;
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    const T* up = p.up ? static_cast<const T*>(p.up) + p.up_rows.offset(row) : nullptr;
    T* out = static_cast<T*>(p.out) + p.out_rows.offset(row);
    Vector left[kElementwiseVectors], right[kElementwiseVectors];
    auto column = [&](int i) { return (first + i * kElementwiseThreads + threadIdx.x) * kVector; };
#pragma unroll
    for (int i = 0; i < kElementwiseVectors; ++i) {
      if (column(i) >= p.hidden) break;
      left[i].load(x + column(i));
      if (up) right[i].load(up + column(i));
    }
#pragma unroll
    for (int i = 0; i < kElementwiseVectors; ++i) {
      if (column(i) >= p.hidden) break;
      float y[kVector], factor[kVector];
      left[i].unpack(y);
      if (up) right[i].unpack(factor);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        y[j] = activate<kActivation>(y[j]);
        if (up) y[j] *= factor[j];
      }
      left[i].pack(y);
      left[i].store(out + column(i));
    }
  }
}

// The activations that ops have: gelu both ways, and silu for swiglu.
template <class T, int kVector>
void launch_elements(const ActivateParams& p, const Gpu& gpu) {
  const LaunchConfig config = {static_cast<unsigned>(elementwise_blocks(p.x_rows.count, p.hidden, kVector)),
                               kElementwiseThreads};
  if (p.activation == Activation::silu)
    launch("activate", activate_kernel<T, kVector, Activation::silu>, config, gpu, p);
  else if (p.activation == Activation::gelu_tanh)
    launch("activate", activate_kernel<T, kVector, Activation::gelu_tanh>, config, gpu, p);
  else
    launch("activate", activate_kernel<T, kVector, Activation::gelu>, config, gpu, p);
}

}  // namespace

void launch_activate(const ActivateParams& given, const Gpu& gpu) {
  ActivateParams p = given;
  if (p.x_rows.count == 0 || p.hidden == 0) return;
  if (without_gaps(p.x_rows, p.hidden) && without_gaps(p.out_rows, p.hidden) &&
      (!p.up || without_gaps(p.up_rows, p.hidden))) {
    p.hidden *= p.x_rows.count;
    p.x_rows = p.up_rows = p.out_rows = dense_rows(1, p.hidden);
  }
  with_type(p.dtype, [&]<class T>() {
    constexpr int kV = kPerVector<T>;
    const bool vectors = p.hidden % kV == 0 && aligned(p.x, sizeof(T), kV) && aligned(p.x_rows, kV) &&
                         aligned(p.up, sizeof(T), kV) && aligned(p.up_rows, kV) && aligned(p.out, sizeof(T), kV) &&
                         aligned(p.out_rows, kV);
    vectors ? launch_elements<T, kV>(p, gpu) : launch_elements<T, 1>(p, gpu);
  });
}

}  // namespace llmkern
