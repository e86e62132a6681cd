// norm: rms_norm and layer_norm, with residual sum and int8 quantization (llmkern/norm.h)
// work     a warp or a block per row (plan_rows); vector i of a row belongs to thread i % row_threads
// passes   one: the row is read once, into registers, from which statistics, the scale (largest magnitude of y) and y
//          are computed.  Vectors beyond 8 per thread are read again, from L2.
// sums     fp32; layer_norm's variance from the centred values, so that a large mean costs no digits
// smem     256 bytes per block for reductions
// needs    any shape; 16-byte accesses where rows and parameters are aligned, else element by element
#include "llmkern/norm.h"

#include "common/quantize.cuh"
#include "common/row.cuh"

namespace llmkern {
namespace {

template <class T, int kVector, int kHeld>
__global__ void __launch_bounds__(kMaxRowThreads, norm_residency(kHeld).blocks) norm_kernel(const NormParams p) {
  using Vector = Packed<T, kVector>;
  RowReduce reduce(dynamic_shared_memory());
  const bool centre = p.norm == Norm::layer;
  // Warps beyond the last row go on with none, since barriers and shuffles are for all.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < p.x_rows.count;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool inside = row < p.x_rows.count;
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    T* total = static_cast<T*>(p.total) + p.total_rows.offset(row);
    RowShare<T, kVector, kHeld> share(inside ? p.hidden : 0);

    share.load(x);
    if (p.residual) {
      const T* residual = static_cast<const T*>(p.residual) + p.residual_rows.offset(row);
      auto add = [&](Vector& held, int column, int = 0) {
        Vector other;
        other.load(residual + column);
        float a[kVector], b[kVector];
        held.unpack(a), other.unpack(b);
#pragma unroll
        for (int i = 0; i < kVector; ++i) a[i] += b[i];
        held.pack(a);
        held.store(total + column);
      };
      share.each_held(add);
      share.each_other([&](int column) {
        Vector vector;
        vector.load(x + column);
        add(vector, column);
      });
    }
    const T* source = p.residual ? total : x;  // of vectors that are not held

    const float hidden = static_cast<float>(p.hidden);
    float mean = 0.0f, squares = 0.0f;
    if (centre) {
      share.each(source, [&](const float (&values)[kVector], int) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) mean += values[i];
      });
      mean = reduce(mean, Sum()) / hidden;
    }
    share.each(source, [&](const float (&values)[kVector], int) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) squares += (values[i] - mean) * (values[i] - mean);
    });
    const float rstd = rsqrtf(reduce(squares, Sum()) / hidden + p.eps);

    auto normalized = [&](const float (&values)[kVector], int column, float (&y)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = (values[i] - mean) * rstd;
      float parameter[kVector];
      if (p.weight) {
        load_as_float(p.weight, p.weight_dtype, column, parameter);
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] *= parameter[i] + p.weight_offset;
      }
      if (p.bias) {
        load_as_float(p.bias, p.bias_dtype, column, parameter);
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] += parameter[i];
      }
    };
    if (!p.scale) {
      T* out = static_cast<T*>(p.out) + p.out_rows.offset(row);
      share.each(source, [&](const float (&values)[kVector], int column) {
        float y[kVector];
        normalized(values, column, y);
        Vector packed;
        packed.pack(y);
        packed.store(out + column);
      });
      continue;
    }
    uint32_t most = 0;
    share.each(source, [&](const float (&values)[kVector], int column) {
      float y[kVector];
      normalized(values, column, y);
      most = largest(most, y);
    });
    const RowCodes codes(reduce(most, MaxBits()));
    share.each(source, [&](const float (&values)[kVector], int column) {
      float y[kVector];
      normalized(values, column, y);
      codes.store(p.codes + row * p.hidden + column, y);
    });
    if (inside && threadIdx.x == 0) st_global(p.scale + row, codes.scale);
  }
}

}  // namespace

void launch_norm(const NormParams& p, const Gpu& gpu) {
  if (p.x_rows.count == 0) return;  // an empty grid is a launch error
  with_type(p.dtype, [&]<class T>() {
    constexpr int kV = kPerVector<T>;
    const bool vectors = aligned(p.x, sizeof(T), kV) && aligned(p.x_rows, kV) && aligned(p.residual, sizeof(T), kV) &&
                         aligned(p.residual_rows, kV) && aligned(p.total, sizeof(T), kV) && aligned(p.total_rows, kV) &&
                         aligned(p.out, sizeof(T), kV) && aligned(p.out_rows, kV) && aligned(p.codes, 1, kV) &&
                         aligned(p.weight, size_of(p.weight_dtype), kV) && aligned(p.bias, size_of(p.bias_dtype), kV);
    const RowPlan plan = plan_rows(p.x_rows.count, p.hidden, sizeof(T), vectors, gpu);
    with_row_plan<T>(plan, [&]<int kVector, int kHeld>() {
      launch("norm", norm_kernel<T, kVector, kHeld>, row_launch(plan), gpu, p);
    });
  });
}

}  // namespace llmkern
