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

// Of each size: the 16 bytes of shared memory before the wait, and after it.
template <auto kInstruction>
__global__ void copy(const char* from, int read, uint4* out) {
  char* shared = dynamic_shared_memory();
  kInstruction(ptx::cvta_to_shared(shared), from, read);
  ptx::cp_async_commit_group();
  st_global(out, ld_shared(reinterpret_cast<const uint4*>(shared)));
  ptx::cp_async_wait_group<0>();
  st_global(out + 1, ld_shared(reinterpret_cast<const uint4*>(shared)));
}

__global__ void global_v4(const uint4* in, uint4* out) {
  ptx::st_global_v4(out + threadIdx.x, ptx::ld_global_nc_no_allocate_v4(in + threadIdx.x));
}

// Three groups of one copy each; what has landed when at most two, one, none may still fly.
__global__ void copy_groups(const uint4* from, uint4* out) {
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared_memory());
  for (int i = 0; i < 3; ++i) {
    ptx::cp_async_cg_16(ptx::cvta_to_shared(shared + i), from + i, 16);
    ptx::cp_async_commit_group();
  }
  ptx::cp_async_wait_group<2>();
  for (int i = 0; i < 3; ++i) st_global(out + i, ld_shared(shared + i));
  ptx::cp_async_wait_group<1>();
  for (int i = 0; i < 3; ++i) st_global(out + 3 + i, ld_shared(shared + i));
  ptx::cp_async_wait_group<0>();
  for (int i = 0; i < 3; ++i) st_global(out + 6 + i, ld_shared(shared + i));
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
      st_global(out + blockIdx.x, ld_shared(shared));
      __syncthreads();
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

LLMKERN_EXPORT void run_copy_groups(const uint4* from, uint4* out) {
  launch("copy_groups", copy_groups, {1, 1, 48}, kGpu, from, out);
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
