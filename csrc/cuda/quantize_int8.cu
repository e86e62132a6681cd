// quantize_int8: int8 codes and a scale per row (llmkern/quantize_int8.h)
// work     a warp or a block per row (plan_rows), the row in registers: one pass over memory
// smem     256 bytes per block for the largest magnitude
// needs    any shape; 16-byte accesses where rows are aligned, else element by element
#include "llmkern/quantize_int8.h"

#include "common/quantize.cuh"
#include "common/row.cuh"

namespace llmkern {
namespace {

template <class T, int kVector, int kHeld>
__global__ void __launch_bounds__(kMaxRowThreads, quantize_residency(kHeld).blocks)
    quantize_int8_kernel(const QuantizeInt8Params p) {
  RowReduce reduce(dynamic_shared_memory());
  // Warps beyond the last row go on with none, since barriers and shuffles are for all.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < p.rows.count;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool inside = row < p.rows.count;
    const T* x = static_cast<const T*>(p.x) + p.rows.offset(row);
    RowShare<T, kVector, kHeld> share(inside ? p.hidden : 0);
    share.load(x);
    uint32_t most = 0;
    share.each(x, [&](const float (&values)[kVector], int) { most = largest(most, values); });
    const RowCodes codes(reduce(most, MaxBits()));
    share.each(
        x, [&](const float (&values)[kVector], int column) { codes.store(p.codes + row * p.hidden + column, values); });
    if (inside && threadIdx.x == 0) st_global(p.scale + row, codes.scale);
  }
}

}  // namespace

void launch_quantize_int8(const QuantizeInt8Params& p, const Gpu& gpu) {
  if (p.rows.count == 0) return;  // an empty grid is a launch error
  with_type(p.dtype, [&]<class T>() {
    constexpr int kV = kPerVector<T>;
    const bool vectors = aligned(p.x, sizeof(T), kV) && aligned(p.rows, kV) && aligned(p.codes, 1, kV);
    const RowPlan plan = plan_rows(p.rows.count, p.hidden, sizeof(T), vectors, gpu);
    with_row_plan<T>(plan, [&]<int kVector, int kHeld>() {
      launch("quantize_int8", quantize_int8_kernel<T, kVector, kHeld>, row_launch(plan), gpu, p);
    });
  });
}

}  // namespace llmkern
