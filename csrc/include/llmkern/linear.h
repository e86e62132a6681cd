// linear: out[r, j] = act(Σ_k x[r, k] · w[j, k] · w_scale[j] + bias[j]) · multiplier + residual[r, j], for up to three
// weights that share x, such as q, k, v or gate, up: x is prepared once and the threads are woken once.
//
// Weights are read as they are stored, fp32, bf16, fp16 or int8.  Floating x is multiplied in fp32, or as precisely:
// bf16 with bf16 or int8, and the three bf16 that an fp32 is the sum of with int8, by instructions that multiply bf16
// and add in fp32; few rows with int8 in fixed point of 32 bits.  Under w8a8 each row of x is rounded to int8 first, as
// the op quantize_int8 does, or given as codes (x_q), and the sum of integer products is exact.  With packed weights
// each 32 numbers of x are rounded to int8; the sums of a block are exact, and added up in fp32 from left to right.
#pragma once

#include <cstdint>

#include "llmkern/activation.h"
#include "llmkern/dtype.h"
#include "llmkern/packed.h"
#include "llmkern/rows.h"
#include "llmkern/threads.h"

namespace llmkern {

enum class WeightType : int8_t { f32, bf16, f16, s8, packed };

struct LinearSegment {
  const void* w;                   // [n, k]; row j at j * w_stride, contiguous; not of a packed weight
  const float* w_scale = nullptr;  // [n]; null for 1
  const void* bias = nullptr;      // [n], bias_dtype; null for 0
  const void* residual = nullptr;  // [rows.count, n], residual_dtype; row r at r * residual_stride; null for 0
  void* out;                       // [rows.count, n], out_dtype; row r at r * out_stride; may be the residual
  int64_t n;
  int64_t w_stride;  // all strides in elements
  int64_t residual_stride = 0;
  int64_t out_stride;
  Activation activation = Activation::none;  // one of those in epilogues
  float multiplier = 1.0f;                   // with a residual only
  PackedWeight packed = {};                  // of WeightType::packed; segments may differ in everything
};

// So many products of two int8 sum up in an int32 without overflow, whatever their values.
inline constexpr int64_t kMostExactProducts = 131071;

struct LinearParams {
  const void* x = nullptr;         // [rows.count, k], dtype; rows at rows.offset(r), each contiguous; apart from out
  const int8_t* x_q = nullptr;     // instead of x: its codes, at the same places; any int8; needs w8a8
  const float* x_scale = nullptr;  // [rows.count], of x_q; null for 1
  char* workspace;                 // linear_workspace_bytes(rows.count, k, w8a8) bytes, 64-byte aligned
  LinearSegment segment[3];
  int segments = 1;
  Rows rows;
  int64_t k;               // at most kMostExactProducts under w8a8; a multiple of 32 with packed weights
  WeightType weight_type;  // of every segment
  DType dtype = DType::f32, out_dtype = DType::f32, bias_dtype = DType::f32, residual_dtype = DType::f32;
  bool w8a8 = false;  // round each row of x to int8; the weights are s8
  bool sums = false;  // out is int32: the sums of x_q · w themselves, and nothing else is applied
};

// Packed weights need the workspace of w8a8.  At most so many bytes lie between two rows of x in the workspace, where
// they are padded with zeros to whole vectors of any instruction set: int16 codes, or three bf16 for each fp32, and a
// cache line.
constexpr int64_t linear_row_bytes(int64_t k, bool w8a8) {
  return ((k + 63) / 64 * (w8a8 ? 2 : 6) | 1) * 64;
}

// Rows are prepared in blocks of 32, each row with its scale and corrections of its sums.
inline constexpr int64_t kLinearHeaderBytes = 20;
constexpr int64_t linear_workspace_bytes(int64_t rows, int64_t k, bool w8a8) {
  return (rows + 31) / 32 * 32 * (kLinearHeaderBytes + linear_row_bytes(k, w8a8));
}

void launch_linear(const LinearParams& p, const Threads& threads);

// Return true if every row gets the bits that it gets alone, however many there are (LLMKERN_BATCH_INVARIANT=1).  Many
// rows of floats are then multiplied as few are, which takes longer.  Integer products are exact in any case.
bool linear_keeps_rows_alone();

// Return true if this CPU's instructions multiply many rows in 16 bits with a weight of 16 bits of this type: then
// launch_linear is as fast as the best libraries at any number of rows.
bool linear_takes_many_rows(WeightType weight);

}  // namespace llmkern
