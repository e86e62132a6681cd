// csrc/cuda/common/ptx.cuh for the SIMT machine: the same functions, written down from the PTX ISA's definitions.
// Fragments: lane = 4 * group + t; which element of a matrix a register of a lane holds is said at each instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "approximate.h"
#include "machine.h"
#include "tensor_core.h"

namespace llmkern::ptx {

using simt::collective;
using simt::kAllLanes;
using simt::kWarp;

inline uint32_t cvta_to_shared(const void* p) {
  return simt::to_shared_address(p);
}

inline int laneid() {
  return simt::lane();
}

// ---- barriers

LLMKERN_SIMT_INLINE void bar_sync(int barrier, int threads) {
  simt::barrier("bar.sync", barrier, threads, true);
}

LLMKERN_SIMT_INLINE void bar_arrive(int barrier, int threads) {
  simt::barrier("bar.arrive", barrier, threads, false);
}

// ---- global memory

LLMKERN_SIMT_INLINE void st_global_v4(uint4* to, const uint4& value) {
  simt::check("st.global.v4", simt::Space::global, simt::Access::write, to, 16);
  *to = value;
}

LLMKERN_SIMT_INLINE uint4 ld_global_nc_no_allocate_v4(const uint4* from) {
  simt::check("ld.global.nc.v4", simt::Space::global, simt::Access::constant, from, 16);
  return *from;
}

// ---- asynchronous copies

LLMKERN_SIMT_INLINE void cp_async_ca_4(uint32_t to, const void* from, int read) {
  simt::copy_async("cp.async.ca.shared.global", to, from, 4, read);
}

LLMKERN_SIMT_INLINE void cp_async_ca_8(uint32_t to, const void* from, int read) {
  simt::copy_async("cp.async.ca.shared.global", to, from, 8, read);
}

LLMKERN_SIMT_INLINE void cp_async_cg_16(uint32_t to, const void* from, int read) {
  simt::copy_async("cp.async.cg.shared.global", to, from, 16, read);
}

LLMKERN_SIMT_INLINE void cp_async_commit_group() {
  simt::commit_copies();
}

template <int kNewestStillFlying>
LLMKERN_SIMT_INLINE void cp_async_wait_group() {
  simt::wait_copies(kNewestStillFlying);
}

// ---- matrices of 8x8 16-bit elements between shared memory and registers

// Row r of matrix i is the 16 bytes at the address that lane 8 * i + r gives.  Lane l gets elements 2 * (l % 4) and
// the next of row l / 4; with trans, of column l / 4.
template <int kMatrices, bool kTrans>
LLMKERN_SIMT_INLINE void ldmatrix(const char* instruction, uint32_t (&r)[kMatrices], uint32_t row) {
  struct Operands {
    uint32_t* r;
    const char* row;
  };
  const bool gives = simt::lane() < 8 * kMatrices;
  const char* from = gives ? simt::shared_address(instruction, row, 16, simt::Access::read) : nullptr;
  collective(instruction, kAllLanes, Operands{r, from}, [](Operands* const(&lanes)[kWarp]) {
    for (int i = 0; i < kMatrices; ++i) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) std::memcpy(matrix[row], lanes[8 * i + row]->row, 16);
      for (int l = 0; l < kWarp; ++l) {
        const int a = l / 4, b = 2 * (l % 4);
        const uint16_t low = kTrans ? matrix[b][a] : matrix[a][b], high = kTrans ? matrix[b + 1][a] : matrix[a][b + 1];
        lanes[l]->r[i] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

template <int kMatrices, bool kTrans>
LLMKERN_SIMT_INLINE void stmatrix(const char* instruction, uint32_t row, const uint32_t (&r)[kMatrices]) {
  struct Operands {
    const uint32_t* r;
    char* row;
  };
  const bool gives = simt::lane() < 8 * kMatrices;
  char* to = gives ? simt::shared_address(instruction, row, 16, simt::Access::write) : nullptr;
  collective(instruction, kAllLanes, Operands{r, to}, [](Operands* const(&lanes)[kWarp]) {
    for (int i = 0; i < kMatrices; ++i) {
      uint16_t matrix[8][8];
      for (int l = 0; l < kWarp; ++l) {
        const int a = l / 4, b = 2 * (l % 4);
        const uint32_t pair = lanes[l]->r[i];
        (kTrans ? matrix[b][a] : matrix[a][b]) = static_cast<uint16_t>(pair);
        (kTrans ? matrix[b + 1][a] : matrix[a][b + 1]) = static_cast<uint16_t>(pair >> 16);
      }
      for (int row = 0; row < 8; ++row) std::memcpy(lanes[8 * i + row]->row, matrix[row], 16);
    }
  });
}

LLMKERN_SIMT_INLINE void ldmatrix_x1(uint32_t (&r)[1], uint32_t row) {
  ldmatrix<1, false>("ldmatrix.x1", r, row);
}

LLMKERN_SIMT_INLINE void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {
  ldmatrix<2, false>("ldmatrix.x2", r, row);
}

LLMKERN_SIMT_INLINE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  ldmatrix<4, false>("ldmatrix.x4", r, row);
}

LLMKERN_SIMT_INLINE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) {
  ldmatrix<2, true>("ldmatrix.x2.trans", r, row);
}

LLMKERN_SIMT_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  ldmatrix<4, true>("ldmatrix.x4.trans", r, row);
}

LLMKERN_SIMT_INLINE void stmatrix_x2(uint32_t row, const uint32_t (&r)[2]) {
  stmatrix<2, false>("stmatrix.x2", row, r);
}

LLMKERN_SIMT_INLINE void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  stmatrix<4, false>("stmatrix.x4", row, r);
}

LLMKERN_SIMT_INLINE void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
  stmatrix<4, true>("stmatrix.x4.trans", row, r);
}

// ---- matrix products of a warp: d[16][8] += a[16][k] · b[k][8]

// A register holds n = 32 / bits neighbours along k.  With g = lane / 4 and t = lane % 4:
//   a[i]: row g + 8 * (i % 2), from column n * t + 4 * n * (i / 2)
//   b[i]: column g, from row n * t + 4 * n * i
//   d[i]: row g + 8 * (i / 2), column 2 * t + i % 2
template <class Element, int kK, int kA, int kB, class D>
LLMKERN_SIMT_INLINE void mma(const char* instruction, D (&d)[4], const uint32_t (&a)[kA], const uint32_t (&b)[kB]) {
  struct Operands {
    D* d;
    const uint32_t *a, *b;
  };
  collective(instruction, kAllLanes, Operands{d, a, b}, [](Operands* const(&lanes)[kWarp]) {
    constexpr int n = 4 / sizeof(Element);
    alignas(32) D left[16][kK], right[kK][8], sums[16][8];
    auto unpack = [&](uint32_t packed, const auto& put) {
      Element elements[n];
      std::memcpy(elements, &packed, 4);
      for (int j = 0; j < n; ++j) put(j, simt::number<D>(elements[j]));
    };
    for (int l = 0; l < kWarp; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < kA; ++i)
        unpack(lanes[l]->a[i], [&](int j, D x) { left[g + 8 * (i % 2)][n * t + 4 * n * (i / 2) + j] = x; });
      for (int i = 0; i < kB; ++i) unpack(lanes[l]->b[i], [&](int j, D x) { right[n * t + 4 * n * i + j][g] = x; });
      for (int i = 0; i < 4; ++i) sums[g + 8 * (i / 2)][2 * t + i % 2] = lanes[l]->d[i];
    }
    simt::add_products<kK>(sums, left, right);
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < 4; ++i) lanes[l]->d[i] = sums[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
  });
}

LLMKERN_SIMT_INLINE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<__nv_bfloat16, 16>("mma.m16n8k16.bf16", d, a, b);
}

LLMKERN_SIMT_INLINE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<__half, 16>("mma.m16n8k16.f16", d, a, b);
}

LLMKERN_SIMT_INLINE void mma_m16n8k8_bf16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  mma<__nv_bfloat16, 8>("mma.m16n8k8.bf16", d, a, b);
}

LLMKERN_SIMT_INLINE void mma_m16n8k8_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  mma<__half, 8>("mma.m16n8k8.f16", d, a, b);
}

LLMKERN_SIMT_INLINE void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<int8_t, 32>("mma.m16n8k32.s8", d, a, b);
}

LLMKERN_SIMT_INLINE void mma_m16n8k16_s8(int32_t (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  mma<int8_t, 16>("mma.m16n8k16.s8", d, a, b);
}

// ---- arithmetic

// The errors that PTX lets these have are drawn where Settings::approximate says so; subnormals, given and returned,
// are zero with .ftz.
inline float ex2_approx_ftz(float x) {
  return simt::flushed(simt::approximate(std::exp2(simt::flushed(x)), x, 0x1p-22f));
}

inline float rcp_approx_ftz(float x) {
  return simt::flushed(simt::approximate(1.0f / simt::flushed(x), x, 0x1p-23f));
}

inline float tanh_approx(float x) {
  return simt::approximate(std::tanh(x), x, 0x1p-11f);
}

}  // namespace llmkern::ptx
