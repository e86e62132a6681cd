// norm_backward: gradients of rms_norm and layer_norm (llmkern/norm_backward.h), with the same bits every time
// work     as many blocks as the SMs hold; block b takes rows b, b + blocks, ...; thread t takes vectors t,
//          t + threads, ... and accumulates their columns of dweight and dbias over the block's rows, in registers
//          where they fit, else in the workspace.  A second kernel reduces over blocks, column by column, in order.
// passes   one: x and dy are read once, into registers, and the statistics recomputed; columns beyond the 8192nd are
//          read again, from L2
// smem     256 bytes per block for reductions
// needs    any shape; 16-byte accesses where rows are aligned, else element by element
#include "llmkern/norm_backward.h"

#include "common/row.cuh"

namespace llmkern {
namespace {

constexpr Residency residency(int held) {
  return held == 1 ? kNormBackward : kNormBackwardLong;
}

template <class T, int kVector, int kHeld>
__global__ void __launch_bounds__(residency(kHeld).threads, residency(kHeld).blocks)
    norm_backward_kernel(const NormBackwardParams p) {
  using Vector = Packed<T, kVector>;
  RowReduce reduce(dynamic_shared_memory());
  const bool centre = p.norm == Norm::layer, parameters = p.dweight || p.dbias;
  const float hidden = static_cast<float>(p.hidden);
  float* weight_sums = p.workspace + 2 * blockIdx.x * p.hidden;
  float* bias_sums = weight_sums + p.hidden;

  // A row's part of the sums over one vector's columns.
  struct Sums {
    float weight[kVector], bias[kVector];
  };
  Sums held_sums[kHeld] = {};
  bool first = true;
  for (int64_t row = blockIdx.x; row < p.x_rows.count; row += gridDim.x, first = false) {
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    const T* dy = static_cast<const T*>(p.dy) + p.dy_rows.offset(row);
    T* dx = static_cast<T*>(p.dx) + row * p.hidden;
    RowShare<T, kVector, kHeld> share(p.hidden), gradient(p.hidden);
    share.load(x), gradient.load(dy);

    float mean = 0.0f, squares = 0.0f;
    if (centre) {
      share.each(x, [&](const float (&values)[kVector], int) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) mean += values[i];
      });
      mean = reduce(mean, Sum()) / hidden;
    }
    share.each(x, [&](const float (&values)[kVector], int) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) squares += (values[i] - mean) * (values[i] - mean);
    });
    const float rstd = rsqrtf(reduce(squares, Sum()) / hidden + p.eps);

    // f(sums, n, dy, g, first column) for all of this thread's vectors; sums are null for those in the workspace.
    auto each = [&](const auto& f) {
      auto derived = [&](Sums* sums, const Vector& value, const Vector& given, int column) {
        float n[kVector], d[kVector], g[kVector];
        value.unpack(n), given.unpack(d);
        if (p.weight) {
          load_as_float(p.weight, p.weight_dtype, column, g);
#pragma unroll
          for (int i = 0; i < kVector; ++i) g[i] = d[i] * (g[i] + p.weight_offset);
        } else {
#pragma unroll
          for (int i = 0; i < kVector; ++i) g[i] = d[i];
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) n[i] = (n[i] - mean) * rstd;
        f(sums, n, d, g, column);
      };
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int vector = i * blockDim.x + threadIdx.x;
        if (vector < share.vectors) derived(&held_sums[i], share.held[i], gradient.held[i], vector * kVector);
      }
      share.each_other([&](int column) {
        Vector value, given;
        value.load(x + column), given.load(dy + column);
        derived(nullptr, value, given, column);
      });
    };

    float sum = 0.0f, product = 0.0f;
    each([&](Sums*, const float (&n)[kVector], const float (&)[kVector], const float (&g)[kVector], int) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += g[i], product += g[i] * n[i];
    });
    sum = centre ? reduce(sum, Sum()) / hidden : 0.0f;
    product = reduce(product, Sum()) / hidden;
    each([&](Sums* sums, const float (&n)[kVector], const float (&d)[kVector], const float (&g)[kVector], int column) {
      float y[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = rstd * (g[i] - sum - n[i] * product);
      Vector packed;
      packed.pack(y);
      packed.store(dx + column);
      if (!parameters) return;
      if (sums) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums->weight[i] += d[i] * n[i], sums->bias[i] += d[i];
        return;
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float *weight = weight_sums + column + i, *bias = bias_sums + column + i;
        st_global(weight, (first ? 0.0f : ld_global(weight)) + d[i] * n[i]);
        st_global(bias, (first ? 0.0f : ld_global(bias)) + d[i]);
      }
    });
  }
  if (!parameters) return;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = (i * blockDim.x + threadIdx.x) * kVector;
    if (column >= p.hidden) continue;
    Packed<float, kVector> packed;
    packed.pack(held_sums[i].weight);
    packed.store(weight_sums + column);
    packed.pack(held_sums[i].bias);
    packed.store(bias_sums + column);
  }
}

// A warp of columns per block of 32 x 8 threads: each of the 8 adds every eighth block's sums, then one adds the 8.
constexpr int kColumns = 32, kParts = kSumBlocks.threads / kColumns;

__global__ void __launch_bounds__(kSumBlocks.threads, kSumBlocks.blocks)
    sum_blocks_kernel(const NormBackwardParams p, int64_t blocks) {
  float* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float weight = 0.0f, bias = 0.0f;
  if (column < p.hidden)
    for (int64_t block = threadIdx.y; block < blocks; block += kParts) {
      weight += ld_global(p.workspace + 2 * block * p.hidden + column);
      bias += ld_global(p.workspace + (2 * block + 1) * p.hidden + column);
    }
  st_shared(shared + threadIdx.y * kColumns + threadIdx.x, weight);
  st_shared(shared + (kParts + threadIdx.y) * kColumns + threadIdx.x, bias);
  __syncthreads();
  if (column >= p.hidden || threadIdx.y > 1) return;
  void* out = threadIdx.y == 0 ? p.dweight : p.dbias;  // one row of threads adds the one, one the other
  if (!out) return;
  float total[1] = {};
  for (int i = 0; i < kParts; ++i) total[0] += ld_shared(shared + (threadIdx.y * kParts + i) * kColumns + threadIdx.x);
  store_as(out, threadIdx.y == 0 ? p.weight_dtype : p.bias_dtype, column, total);
}

}  // namespace

void launch_norm_backward(const NormBackwardParams& p, const Gpu& gpu) {
  if (p.hidden == 0) return;
  int64_t blocks = 0;
  if (p.x_rows.count > 0) {
    with_type(p.dtype, [&]<class T>() {
      constexpr int kV = kPerVector<T>, kLong = kV == 8 ? 2 : 4;
      const bool vectors = p.hidden % kV == 0 && aligned(p.x, sizeof(T), kV) && aligned(p.x_rows, kV) &&
                           aligned(p.dy, sizeof(T), kV) && aligned(p.dy_rows, kV) && aligned(p.dx, sizeof(T), kV) &&
                           aligned(p.weight, size_of(p.weight_dtype), kV);
      const bool short_rows = p.hidden <= int64_t{kNormBackward.threads} * (vectors ? kV : 1);
      const Residency shared = short_rows ? kNormBackward : kNormBackwardLong;
      blocks = plan_norm_backward_blocks(p.x_rows.count, shared, gpu);
      const LaunchConfig config = {static_cast<unsigned>(blocks), static_cast<unsigned>(shared.threads),
                                   kRowSharedBytes};
      if (vectors && short_rows) return launch("norm_backward", norm_backward_kernel<T, kV, 1>, config, gpu, p);
      if (vectors) return launch("norm_backward", norm_backward_kernel<T, kV, kLong>, config, gpu, p);
      if (short_rows) return launch("norm_backward", norm_backward_kernel<T, 1, 1>, config, gpu, p);
      return launch("norm_backward", norm_backward_kernel<T, 1, 4>, config, gpu, p);
    });
  }
  if (!p.dweight && !p.dbias) return;
  const LaunchConfig config = {static_cast<unsigned>((p.hidden + kColumns - 1) / kColumns), dim3(kColumns, kParts),
                               kSumBlocksSharedBytes};
  launch("sum_blocks", sum_blocks_kernel, config, gpu, p, blocks);
}

}  // namespace llmkern
