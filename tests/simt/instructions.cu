// One kernel per instruction or rule of the SIMT machine: operands come from global memory, results go there, and
// test_instructions.py knows what they must be.
#include "common/ptx.cuh"
#include "common/vec.cuh"

#define LLMKERN_EXPORT extern "C" __attribute__((visibility("default")))

namespace llmkern {
namespace {

const Gpu kGpu{.stream = nullptr, .sm_count = 1, .capability = 80};

// a, b, d: registers of the lanes, [lane][register]; d is added to.
template <auto kInstruction, class D, int kA, int kB>
__global__ void product(const uint32_t* a, const uint32_t* b, D* d) {
  uint32_t left[kA], right[kB];
  D sum[4];
  for (int i = 0; i < kA; ++i) left[i] = ld_global(a + threadIdx.x * kA + i);
  for (int i = 0; i < kB; ++i) right[i] = ld_global(b + threadIdx.x * kB + i);
  for (int i = 0; i < 4; ++i) sum[i] = ld_global(d + threadIdx.x * 4 + i);
  kInstruction(sum, left, right);
  for (int i = 0; i < 4; ++i) st_global(d + threadIdx.x * 4 + i, sum[i]);
}

// shared: 32 rows of 8 16-bit elements; row: for each lane, the one whose address it gives.
template <auto kInstruction, int kMatrices>
__global__ void load(const uint4* shared, const int* row, uint32_t* out) {
  uint4* rows = reinterpret_cast<uint4*>(dynamic_shared_memory());
  st_shared(rows + threadIdx.x, ld_global(shared + threadIdx.x));
  __syncwarp();
  uint32_t r[kMatrices];
  kInstruction(r, ptx::cvta_to_shared(rows + ld_global(row + threadIdx.x)));
  for (int i = 0; i < kMatrices; ++i) st_global(out + threadIdx.x * kMatrices + i, r[i]);
}

template <auto kInstruction, int kMatrices>
__global__ void store(const uint32_t* in, const int* row, uint4* out) {
  uint4* rows = reinterpret_cast<uint4*>(dynamic_shared_memory());
  uint32_t r[kMatrices];
  for (int i = 0; i < kMatrices; ++i) r[i] = ld_global(in + threadIdx.x * kMatrices + i);
  kInstruction(ptx::cvta_to_shared(rows + ld_global(row + threadIdx.x)), r);
  __syncwarp();
  st_global(out + threadIdx.x, ld_shared(rows + threadIdx.x));
}

template <auto kInstruction>
__global__ void copy(const char* from, int read, uint4* out) {
  char* shared = dynamic_shared_memory();
  kInstruction(ptx::cvta_to_shared(shared), from, read);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  st_global(out, ld_shared(reinterpret_cast<const uint4*>(shared)));
}

__global__ void global_v4(const uint4* in, uint4* out) {
  ptx::st_global_v4(out + threadIdx.x, ptx::ld_global_nc_no_allocate_v4(in + threadIdx.x));
}

// Three groups of one copy each, read when at most two, one, none may still fly; with `early` a group too soon.
__global__ void copy_groups(const uint4* from, int early, uint4* out) {
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared_memory());
  for (int i = 0; i < 3; ++i) {
    ptx::cp_async_cg_16(ptx::cvta_to_shared(shared + i), from + i, 16);
    ptx::cp_async_commit_group();
  }
  ptx::cp_async_wait_group<2>();
  st_global(out, ld_shared(shared + (early == 1)));
  ptx::cp_async_wait_group<1>();
  st_global(out + 1, ld_shared(shared + 1 + (early == 2)));
  ptx::cp_async_wait_group<0>();
  st_global(out + 2, ld_shared(shared + 2));
}

// Eight copies whose sources are rewritten while they are on their way.
__global__ void rewritten_source(uint4* from, uint4* out) {
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared_memory());
  for (int i = 0; i < 8; ++i) {
    ptx::cp_async_cg_16(ptx::cvta_to_shared(shared + i), from + i, 16);
    ptx::cp_async_commit_group();
  }
  for (int i = 0; i < 8; ++i) st_global(from + i, uint4{1, 1, 1, 1});
  ptx::cp_async_wait_group<0>();
  for (int i = 0; i < 8; ++i) st_global(out + i, ld_shared(shared + i));
}

__global__ void exchanges(const int* in, int argument, int* out) {
  const int lane = threadIdx.x, value = ld_global(in + lane);
  st_global(out + lane, __shfl_xor_sync(0xffffffffu, value, argument));
  st_global(out + 32 + lane, __shfl_up_sync(0xffffffffu, value, argument));
  st_global(out + 64 + lane, __shfl_down_sync(0xffffffffu, value, argument));
  st_global(out + 96 + lane, __shfl_sync(0xffffffffu, value, argument));
  st_global(out + 128 + lane, static_cast<int>(__ballot_sync(0xffffffffu, value > 0)));
  st_global(out + 160 + lane, __reduce_max_sync(0xffffffffu, value));
  st_global(out + 192 + lane, __reduce_min_sync(0xffffffffu, value));
  st_global(out + 224 + lane, __reduce_add_sync(0xffffffffu, value));
  st_global(out + 288 + lane, __any_sync(0xffffffffu, value == 7) + 2 * __all_sync(0xffffffffu, value < 1000));
  st_global(out + 256 + lane, static_cast<int>(__byte_perm(value, ~value, 0x4152)));
  st_global(out + 320 + lane, ptx::laneid());
}

__global__ void arithmetic(const float* in, float* out) {
  const float x = ld_global(in + threadIdx.x);
  const float results[] = {ptx::ex2_approx_ftz(x),
                           ptx::tanh_approx(x),
                           ptx::rcp_approx_ftz(x),
                           rsqrtf(x),
                           __uint_as_float(__float_as_uint(x) ^ 0x80000000u),
                           static_cast<float>(__float2int_rn(fabsf(x) < 1e6f ? x : 0.0f))};
  for (int i = 0; i < 6; ++i) st_global(out + 6 * threadIdx.x + i, results[i]);
}

// The second warp produces and goes on at once; the first waits for it.
__global__ void named_barrier(int* out) {
  int* shared = reinterpret_cast<int*>(dynamic_shared_memory());
  if (threadIdx.x >= 32) {
    st_shared(shared + threadIdx.x - 32, static_cast<int>(threadIdx.x));
    ptx::bar_arrive(3, 64);
  } else {
    ptx::bar_sync(3, 64);
    st_global(out + threadIdx.x, ld_shared(shared + 31 - threadIdx.x));
  }
}

// Each warp takes the next number: the order in which warps run.
__global__ void order(int* counter, int* out) {
  __syncthreads();
  if (threadIdx.x % 32 == 0) st_global(out + blockIdx.x * blockDim.x / 32 + threadIdx.x / 32, atomicAdd(counter, 1));
}

enum Mistake {
  poison,
  out_of_bounds,
  misaligned,
  read_only,
  outside_shared,
  barrier_in_a_branch,
  different_places,
  misaligned_v4,
  beyond_v4,
};

__global__ void broken(Mistake mistake, const uint32_t* in, uint32_t* out) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared_memory());
  switch (mistake) {
    case poison:
      if (threadIdx.x > 0) break;
      st_global(out + blockIdx.x, ld_shared(shared));
      st_shared(shared, 1u);
      break;
    case out_of_bounds:
      st_global(out, ld_global(in + 32));
      break;
    case misaligned:
      st_global(out, ld_global(reinterpret_cast<const uint4*>(in + 1)).x);
      break;
    case read_only:
      st_global(const_cast<uint32_t*>(in), 1u);
      break;
    case outside_shared:
      st_shared(shared + 64, 1u);
      break;
    case barrier_in_a_branch:
      if (threadIdx.x < 32) __syncthreads();
      break;
    case different_places:
      if (threadIdx.x % 2)
        __syncwarp();
      else
        __ballot_sync(0xffffffffu, 1);
      break;
    case misaligned_v4:
      ptx::ld_global_nc_no_allocate_v4(reinterpret_cast<const uint4*>(in + 1));
      break;
    case beyond_v4:
      ptx::st_global_v4(reinterpret_cast<uint4*>(out) + 8, uint4{});
      break;
  }
}

// Pairs of accesses of which each breaks one rule of order, and those that keep it.
enum class Order {
  warps,
  warps_barrier,
  lanes,
  lanes_syncwarp,
  lanes_shuffle,
  lanes_half_syncwarp,
  overwritten,
  overwritten_barrier,
  landed_for_one,
  landed_barrier,
  two_copies,
  ldmatrix_before_store,
  ldmatrix_syncwarp,
  arrive_orders,
  arrive_orders_nothing_back,
  bytes_beside_each_other,
  blocks,
  blocks_apart,
  blocks_atomic,
  blocks_fence,
  blocks_without_fence,
  constant_path,
};

__global__ void ordered(Order order, uint32_t* global, uint32_t* out) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared_memory());
  const int t = threadIdx.x, lane = t % 32;
  uint32_t* own = out + 64 * blockIdx.x;
  const uint32_t at = ptx::cvta_to_shared(shared);
  switch (order) {
    case Order::warps:
    case Order::warps_barrier:
      if (t == 0) st_shared(shared, 1u);
      if (order == Order::warps_barrier) __syncthreads();
      if (t == 32) st_global(own, ld_shared(shared));
      break;
    case Order::lanes:
    case Order::lanes_syncwarp:
    case Order::lanes_shuffle:
    case Order::lanes_half_syncwarp:
      st_shared(shared + t, 1u);
      if (order == Order::lanes_syncwarp) __syncwarp();
      if (order == Order::lanes_shuffle) __shfl_xor_sync(0xffffffffu, t, 1);
      if (order == Order::lanes_half_syncwarp) __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
      st_global(own + t, ld_shared(shared + (t ^ 31)));
      break;
    case Order::overwritten:
    case Order::overwritten_barrier:
      if (t == 32) st_global(own, ld_shared(shared));
      if (order == Order::overwritten_barrier) __syncthreads();
      if (t == 0) st_shared(shared, 1u);
      break;
    case Order::landed_for_one:
    case Order::landed_barrier:
      if (t == 0) ptx::cp_async_cg_16(at, global, 16);
      ptx::cp_async_commit_group();
      if (order == Order::landed_for_one) __syncthreads();
      ptx::cp_async_wait_group<0>();
      if (order == Order::landed_barrier) __syncthreads();
      if (t == 32) st_global(own, ld_shared(shared));
      break;
    case Order::two_copies:
      if (t == 0) ptx::cp_async_cg_16(at, global, 16), ptx::cp_async_cg_16(at, global, 0);
      break;
    case Order::ldmatrix_before_store:
    case Order::ldmatrix_syncwarp: {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, at + t * 16);
      if (order == Order::ldmatrix_syncwarp) __syncwarp();
      st_shared(shared + (t ^ 1) * 4, r[0]);
      break;
    }
    case Order::arrive_orders:
    case Order::arrive_orders_nothing_back:
      if (t < 32) {
        st_shared(shared + t, 1u);
        ptx::bar_arrive(1, 64);
        if (order == Order::arrive_orders_nothing_back) st_global(own + t, ld_shared(shared + 32 + t));
      } else {
        st_shared(shared + t, 1u);
        ptx::bar_sync(1, 64);
        st_global(own + t, ld_shared(shared + t - 32));
      }
      break;
    case Order::bytes_beside_each_other:
      st_shared(reinterpret_cast<uint8_t*>(shared) + t, uint8_t{1});
      st_global(reinterpret_cast<uint8_t*>(own) + t, uint8_t{1});
      break;
    case Order::blocks:
      if (t == 0) st_global(out, blockIdx.x);
      break;
    case Order::blocks_apart:
      if (t == 0) st_global(out + blockIdx.x, blockIdx.x);
      break;
    case Order::blocks_atomic:
      atomicAdd(out, 1u);
      break;
    case Order::blocks_fence:
    case Order::blocks_without_fence:  // the last block reads what all have written
      st_global(own + t, 1u);
      __syncthreads();
      if (t == 0) {
        if (order == Order::blocks_fence) __threadfence();
        const uint32_t before = atomicAdd(global, 1u);
        if (order == Order::blocks_fence) __threadfence();
        st_shared(shared, before);
      }
      __syncthreads();
      if (ld_shared(shared) == gridDim.x - 1) st_shared(shared + 1 + t, ld_global(out + 64 * (1 - blockIdx.x) + t));
      break;
    case Order::constant_path:
      st_global(reinterpret_cast<uint4*>(out) + blockIdx.x * 64 + t, uint4{});
      ptx::ld_global_nc_no_allocate_v4(reinterpret_cast<uint4*>(out) + blockIdx.x * 64 + t);
      break;
  }
}

// What may not be met at two places, or by half a warp.
enum class Meeting { two_places, one_place, half_a_warp };

__global__ void met(Meeting meeting, uint32_t* out) {
  const uint32_t at = ptx::cvta_to_shared(dynamic_shared_memory());
  uint32_t r[4];
  switch (meeting) {
    case Meeting::two_places:
      if (threadIdx.x % 2) {
        ptx::ldmatrix_x4(r, at);
        st_global(out + threadIdx.x, r[0]);  // so that the compiler cannot make one of the two
      } else {
        ptx::ldmatrix_x4(r, at);
      }
      break;
    case Meeting::one_place:
      for (int i = 0; i < static_cast<int>(threadIdx.x % 2 + 1); ++i)
        if (i == static_cast<int>(threadIdx.x % 2)) ptx::ldmatrix_x4(r, at);
      break;
    case Meeting::half_a_warp:
      if (threadIdx.x % 32 < 16) ptx::bar_sync(1, 32);
      break;
  }
  st_global(out + threadIdx.x, threadIdx.x);
}

__global__ void __launch_bounds__(64, 2) bounded(uint32_t* out) {
  if (threadIdx.x == 0) st_global(out, 1u);
}

// Loads and stores with a stride: words of shared memory and of global memory apart.
__global__ void strided(const uint32_t* in, int stride, uint32_t* out) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared_memory());
  st_shared(shared + threadIdx.x * stride, ld_global(in + threadIdx.x * stride));
  __syncwarp();
  st_global(out + threadIdx.x, ld_shared(shared + threadIdx.x * stride));
}

__global__ void contracted(const float* in, float* out) {
  const float a = ld_global(in), b = ld_global(in + 1), c = ld_global(in + 2);
  const float product = a * b;
  st_global(out, product - c);
}

}  // namespace
}  // namespace llmkern

using namespace llmkern;

#define PRODUCT(name, D, kA, kB)                                                                    \
  LLMKERN_EXPORT void name(const uint32_t* a, const uint32_t* b, D* d) {                            \
    launch(#name, product<[](auto&... r) { ptx::name(r...); }, D, kA, kB>, {1, 32}, kGpu, a, b, d); \
  }
PRODUCT(mma_m16n8k16_bf16, float, 4, 2)
PRODUCT(mma_m16n8k16_f16, float, 4, 2)
PRODUCT(mma_m16n8k8_bf16, float, 2, 1)
PRODUCT(mma_m16n8k8_f16, float, 2, 1)
PRODUCT(mma_m16n8k32_s8, int32_t, 4, 2)
PRODUCT(mma_m16n8k16_s8, int32_t, 2, 1)

#define LOAD(name, kMatrices)                                                                                         \
  LLMKERN_EXPORT void name(const uint4* shared, const int* row, uint32_t* out) {                                      \
    launch(#name, load<[](uint32_t (&r)[kMatrices], uint32_t a) { ptx::name(r, a); }, kMatrices>, {1, 32, 512}, kGpu, \
           shared, row, out);                                                                                         \
  }
LOAD(ldmatrix_x1, 1)
LOAD(ldmatrix_x2, 2)
LOAD(ldmatrix_x4, 4)
LOAD(ldmatrix_x2_trans, 2)
LOAD(ldmatrix_x4_trans, 4)

#define STORE(name, kMatrices)                                                                                         \
  LLMKERN_EXPORT void name(const uint32_t* in, const int* row, uint4* out) {                                           \
    launch(#name, store<[](uint32_t a, const uint32_t (&r)[kMatrices]) { ptx::name(a, r); }, kMatrices>, {1, 32, 512}, \
           kGpu, in, row, out);                                                                                        \
  }
STORE(stmatrix_x2, 2)
STORE(stmatrix_x4, 4)
STORE(stmatrix_x4_trans, 4)

#define COPY(name)                                                                                                    \
  LLMKERN_EXPORT void name(const char* from, int read, uint4* out) {                                                  \
    launch(#name, copy<[](uint32_t to, const void* p, int n) { ptx::name(to, p, n); }>, {1, 1, 16}, kGpu, from, read, \
           out);                                                                                                      \
  }
COPY(cp_async_ca_4)
COPY(cp_async_ca_8)
COPY(cp_async_cg_16)

LLMKERN_EXPORT void run_global_v4(const uint4* in, uint4* out) {
  launch("global_v4", global_v4, {1, 32}, kGpu, in, out);
}

LLMKERN_EXPORT void run_copy_groups(const uint4* from, int early, uint4* out) {
  launch("copy_groups", copy_groups, {1, 1, 48}, kGpu, from, early, out);
}

LLMKERN_EXPORT void run_rewritten_source(uint4* from, uint4* out) {
  launch("rewritten_source", rewritten_source, {1, 1, 128}, kGpu, from, out);
}

LLMKERN_EXPORT void run_exchanges(const int* in, int argument, int* out) {
  launch("exchanges", exchanges, {1, 32}, kGpu, in, argument, out);
}

LLMKERN_EXPORT void run_arithmetic(const float* in, float* out) {
  launch("arithmetic", arithmetic, {1, 32}, kGpu, in, out);
}

LLMKERN_EXPORT void run_named_barrier(int* out) {
  launch("named_barrier", named_barrier, {1, 64, 128}, kGpu, out);
}

LLMKERN_EXPORT void run_order(int* counter, int* out) {
  launch("order", order, {4, 256}, kGpu, counter, out);
}

LLMKERN_EXPORT void run_broken(int mistake, const uint32_t* in, uint32_t* out) {
  launch("broken", broken, {2, 64, 256}, kGpu, static_cast<Mistake>(mistake), in, out);
}

LLMKERN_EXPORT void run_ordered(int order, uint32_t* global, uint32_t* out) {
  launch("ordered", ordered, {2, 64, 1024}, kGpu, static_cast<Order>(order), global, out);
}

LLMKERN_EXPORT void run_met(int meeting, uint32_t* out) {
  launch("met", met, {1, 64, 1024}, kGpu, static_cast<Meeting>(meeting), out);
}

LLMKERN_EXPORT void run_bounded(int threads, int shared_bytes, uint32_t* out) {
  launch("bounded", bounded, {1, static_cast<unsigned>(threads), shared_bytes}, kGpu, out);
}

LLMKERN_EXPORT void run_strided(const uint32_t* in, int stride, uint32_t* out) {
  launch("strided", strided, {1, 32, 4096}, kGpu, in, stride, out);
}

LLMKERN_EXPORT void run_contracted(const float* in, float* out) {
  launch("contracted", contracted, {1, 1}, kGpu, in, out);
}
