// csrc/cuda/common/ptx.cuh for the SIMT machine: the same functions, written down from the PTX ISA's definitions.
// Fragments: lane = 4 * group + t; which element of a matrix a register of a lane holds is said at each instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "machine.h"

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

inline void bar_sync(int barrier, int threads) {
  simt::barrier("bar.sync", barrier, threads, true);
}

inline void bar_arrive(int barrier, int threads) {
  simt::barrier("bar.arrive", barrier, threads, false);
}

// ---- global memory

inline void st_global_v4(uint4* to, const uint4& value) {
  simt::check("st.global.v4", simt::Space::global, simt::Access::write, to, 16);
  *to = value;
}

inline uint4 ld_global_nc_no_allocate_v4(const uint4* from) {
  simt::check("ld.global.nc.v4", simt::Space::global, simt::Access::read, from, 16);
  return *from;
}

// ---- asynchronous copies

inline void cp_async_ca_4(uint32_t to, const void* from, int read) {
  simt::copy_async("cp.async.ca.shared.global", to, from, 4, read);
}

inline void cp_async_ca_8(uint32_t to, const void* from, int read) {
  simt::copy_async("cp.async.ca.shared.global", to, from, 8, read);
}

inline void cp_async_cg_16(uint32_t to, const void* from, int read) {
  simt::copy_async("cp.async.cg.shared.global", to, from, 16, read);
}

inline void cp_async_commit_group() {
  simt::commit_copies();
}

template <int kNewestStillFlying>
inline void cp_async_wait_group() {
  simt::wait_copies(kNewestStillFlying);
}

// ---- matrices of 8x8 16-bit elements between shared memory and registers

// Row r of matrix i is the 16 bytes at the address that lane 8 * i + r gives.  Lane l gets elements 2 * (l % 4) and
// the next of row l / 4; with trans, of column l / 4.
template <int kMatrices, bool kTrans>
inline void ldmatrix(const char* instruction, uint32_t (&r)[kMatrices], uint32_t row) {
  struct Operands {
    uint32_t* r;
    uint32_t row;
    const char* instruction;
  };
  collective(instruction, kAllLanes, Operands{r, row, instruction}, [](Operands* const(&lanes)[kWarp]) {
    for (int i = 0; i < kMatrices; ++i) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) {
        const Operands& lane = *lanes[8 * i + row];
        std::memcpy(matrix[row], simt::shared_address(lane.instruction, lane.row, 16, simt::Access::read), 16);
      }
      for (int l = 0; l < kWarp; ++l) {
        const int a = l / 4, b = 2 * (l % 4);
        const uint16_t low = kTrans ? matrix[b][a] : matrix[a][b], high = kTrans ? matrix[b + 1][a] : matrix[a][b + 1];
        lanes[l]->r[i] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

template <int kMatrices, bool kTrans>
inline void stmatrix(const char* instruction, uint32_t row, const uint32_t (&r)[kMatrices]) {
  struct Operands {
    const uint32_t* r;
    uint32_t row;
    const char* instruction;
  };
  collective(instruction, kAllLanes, Operands{r, row, instruction}, [](Operands* const(&lanes)[kWarp]) {
    for (int i = 0; i < kMatrices; ++i) {
      uint16_t matrix[8][8];
      for (int l = 0; l < kWarp; ++l) {
        const int a = l / 4, b = 2 * (l % 4);
        const uint32_t pair = lanes[l]->r[i];
        (kTrans ? matrix[b][a] : matrix[a][b]) = static_cast<uint16_t>(pair);
        (kTrans ? matrix[b + 1][a] : matrix[a][b + 1]) = static_cast<uint16_t>(pair >> 16);
      }
      for (int row = 0; row < 8; ++row) {
        const Operands& lane = *lanes[8 * i + row];
        std::memcpy(simt::shared_address(lane.instruction, lane.row, 16, simt::Access::write), matrix[row], 16);
      }
    }
  });
}

inline void ldmatrix_x1(uint32_t (&r)[1], uint32_t row) {
  ldmatrix<1, false>("ldmatrix.x1", r, row);
}

inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {
  ldmatrix<2, false>("ldmatrix.x2", r, row);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  ldmatrix<4, false>("ldmatrix.x4", r, row);
}

inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) {
  ldmatrix<2, true>("ldmatrix.x2.trans", r, row);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  ldmatrix<4, true>("ldmatrix.x4.trans", r, row);
}

inline void stmatrix_x2(uint32_t row, const uint32_t (&r)[2]) {
  stmatrix<2, false>("stmatrix.x2", row, r);
}

inline void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  stmatrix<4, false>("stmatrix.x4", row, r);
}

inline void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
  stmatrix<4, true>("stmatrix.x4.trans", row, r);
}

// ---- matrix products of a warp: d[16][8] += a[16][k] · b[k][8]

// A register holds n = 32 / bits neighbours along k.  With g = lane / 4 and t = lane % 4:
//   a[i]: row g + 8 * (i % 2), from column n * t + 4 * n * (i / 2)
//   b[i]: column g, from row n * t + 4 * n * i
//   d[i]: row g + 8 * (i / 2), column 2 * t + i % 2
// Products are summed in `Sum` and added to d once; tensor cores too keep more bits inside than between instructions.
template <class Element, class Sum, int kK, int kA, int kB, class D>
inline void mma(const char* instruction, D (&d)[4], const uint32_t (&a)[kA], const uint32_t (&b)[kB]) {
  struct Operands {
    D* d;
    const uint32_t *a, *b;
  };
  collective(instruction, kAllLanes, Operands{d, a, b}, [](Operands* const(&lanes)[kWarp]) {
    constexpr int n = 4 / sizeof(Element);
    Sum left[16][kK], right[8][kK];
    for (int l = 0; l < kWarp; ++l) {
      const int g = l / 4, t = l % 4;
      auto unpack = [&](uint32_t packed, Sum* to) {
        Element elements[n];
        std::memcpy(elements, &packed, 4);
        for (int j = 0; j < n; ++j) to[j] = static_cast<Sum>(elements[j]);
      };
      for (int i = 0; i < kA; ++i) unpack(lanes[l]->a[i], &left[g + 8 * (i % 2)][n * t + 4 * n * (i / 2)]);
      for (int i = 0; i < kB; ++i) unpack(lanes[l]->b[i], &right[g][n * t + 4 * n * i]);
    }
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < 4; ++i) {
        const Sum *x = left[l / 4 + 8 * (i / 2)], *y = right[2 * (l % 4) + i % 2];
        Sum sum = 0;
        for (int k = 0; k < kK; ++k) sum += x[k] * y[k];
        lanes[l]->d[i] += static_cast<D>(sum);
      }
  });
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<__nv_bfloat16, float, 16>("mma.m16n8k16.bf16", d, a, b);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<__half, float, 16>("mma.m16n8k16.f16", d, a, b);
}

inline void mma_m16n8k8_bf16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  mma<__nv_bfloat16, float, 8>("mma.m16n8k8.bf16", d, a, b);
}

inline void mma_m16n8k8_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  mma<__half, float, 8>("mma.m16n8k8.f16", d, a, b);
}

inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<int8_t, int32_t, 32>("mma.m16n8k32.s8", d, a, b);
}

inline void mma_m16n8k16_s8(int32_t (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  mma<int8_t, int32_t, 16>("mma.m16n8k16.s8", d, a, b);
}

// ---- arithmetic

// Subnormals, given and returned, are zero.
inline float ex2_approx_ftz(float x) {
  const float y = std::exp2(std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x);
  return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

inline float rcp_approx_ftz(float x) {
  const float y = 1.0f / (std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x);
  return std::fpclassify(y) == FP_SUBNORMAL ? std::copysign(0.0f, y) : y;
}

inline float tanh_approx(float x) {
  return std::tanh(x);
}

}  // namespace llmkern::ptx
