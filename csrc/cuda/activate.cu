// activate: activation(x) · up, for swiglu and gelu, quantized to int8 or not (llmkern/activate.h)
// work     256 threads take 1024 vectors of 16 bytes of a row, four each, all loaded before the first is used; rows
//          without gaps are one long row
// codes    A warp or a block per row (plan_rows), since the scale is the whole row's.  y stays in registers, in fp32;
// what
//          is beyond them is read and made twice, for the largest magnitude and for the codes.
// smem     with codes, 256 bytes per block for the largest magnitude
// needs    any shape; 16-byte accesses where rows are aligned, else element by element
#include "llmkern/activate.h"

#include "common/activation.cuh"
#include "common/elementwise.cuh"
#include "common/quantize.cuh"

namespace llmkern {
namespace {

template <class T, int kVector, Activation kActivation>
__global__ void __launch_bounds__(kElementwise.threads, kElementwise.blocks) activate_kernel(const ActivateParams p) {
  using Vector = Packed<T, kVector>;
  each_chunk<kVector>(p.x_rows.count, p.hidden, [&](int64_t row, const auto& column) {
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    const T* up = p.up ? static_cast<const T*>(p.up) + p.up_rows.offset(row) : nullptr;
    T* out = static_cast<T*>(p.out) + p.out_rows.offset(row);
    Vector left[kElementwiseVectors], right[kElementwiseVectors];
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
        y[j] = activate<kActivation, kDigitsOf<T>>(y[j]);
        if (up) y[j] *= factor[j];
      }
      left[i].pack(y);
      left[i].store(out + column(i));
    }
  });
}

template <class T, int kVector, int kHeld, Activation kActivation>
__global__ void __launch_bounds__(kMaxRowThreads, codes_residency(kHeld).blocks)
    activate_codes_kernel(const ActivateParams p) {
  constexpr bool kKeeps = kHeld <= 4;
  RowReduce reduce(dynamic_shared_memory());
  // Warps beyond the last row go on with none, since barriers and shuffles are for all.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < p.x_rows.count;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool inside = row < p.x_rows.count;
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    const T* up = p.up ? static_cast<const T*>(p.up) + p.up_rows.offset(row) : nullptr;
    RowShare<T, kVector, kHeld> share(inside ? p.hidden : 0);
    share.load(x);
    auto activated = [&](const Packed<T, kVector>& values, int column, float (&y)[kVector]) {
      values.unpack(y);
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = activate<kActivation, Digits::fp32>(y[i]);
      if (!up) return;
      Packed<T, kVector> vector;
      float factor[kVector];
      vector.load(up + column);
      vector.unpack(factor);
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] *= factor[i];
    };
    auto beyond = [&](const auto& f) {
      share.each_other([&](int column) {
        Packed<T, kVector> vector;
        float y[kVector];
        vector.load(x + column);
        activated(vector, column, y);
        f(y, column);
      });
    };
    float held[kKeeps ? kHeld : 1][kVector];
    uint32_t most = 0;
    share.each_held([&](const Packed<T, kVector>& vector, int column, int i) {
      float (&y)[kVector] = held[kKeeps ? i : 0];
      activated(vector, column, y);
      most = largest(most, y);
    });
    beyond([&](const float (&y)[kVector], int) { most = largest(most, y); });
    const RowCodes codes(reduce(most, MaxBits()));
    int8_t* out = p.codes + row * p.hidden;
    share.each_held([&](const Packed<T, kVector>& vector, int column, int i) {
      if (!kKeeps) activated(vector, column, held[0]);
      codes.store(out + column, held[kKeeps ? i : 0]);
    });
    beyond([&](const float (&y)[kVector], int column) { codes.store(out + column, y); });
    if (inside && threadIdx.x == 0) st_global(p.scale + row, codes.scale);
  }
}

template <class T>
void launch_codes(const ActivateParams& p, const Gpu& gpu) {
  constexpr int kV = kPerVector<T>;
  const bool vectors = aligned_rows<T>(p.x, p.x_rows) && aligned_rows<T>(p.up, p.up_rows) && aligned(p.codes, 1, kV);
  const RowPlan plan = plan_rows(p.x_rows.count, p.hidden, sizeof(T), vectors, gpu);
  with_row_plan<T>(plan, [&]<int kVector, int kHeld>() {
    with_op_activation(p.activation, [&]<Activation kActivation>() {
      launch("activate_codes", activate_codes_kernel<T, kVector, kHeld, kActivation>, row_launch(plan), gpu, p);
    });
  });
}

template <class T, int kVector>
void launch_elements(const ActivateParams& p, const Gpu& gpu) {
  const LaunchConfig config = elementwise_launch(p.x_rows.count, p.hidden, kVector);
  with_op_activation(p.activation, [&]<Activation kActivation>() {
    launch("activate", activate_kernel<T, kVector, kActivation>, config, gpu, p);
  });
}

}  // namespace

void launch_activate(const ActivateParams& given, const Gpu& gpu) {
  ActivateParams p = given;
  if (p.x_rows.count == 0) return;  // an empty grid is a launch error
  if (p.scale) return with_type(p.dtype, [&]<class T>() { launch_codes<T>(p, gpu); });
  if (p.hidden == 0) return;
  if (without_gaps(p.x_rows, p.hidden) && without_gaps(p.out_rows, p.hidden) &&
      (!p.up || without_gaps(p.up_rows, p.hidden))) {
    p.hidden *= p.x_rows.count;
    p.x_rows = p.up_rows = p.out_rows = dense_rows(1, p.hidden);
  }
  with_type(p.dtype, [&]<class T>() {
    constexpr int kV = kPerVector<T>;
    const bool vectors = p.hidden % kV == 0 && aligned_rows<T>(p.x, p.x_rows) && aligned_rows<T>(p.up, p.up_rows) &&
                         aligned_rows<T>(p.out, p.out_rows);
    vectors ? launch_elements<T, kV>(p, gpu) : launch_elements<T, 1>(p, gpu);
  });
}

}  // namespace llmkern
