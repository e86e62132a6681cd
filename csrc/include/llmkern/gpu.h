// Gpu: where a CUDA launcher works, without knowing torch or CUDA's headers.
#pragma once

struct CUstream_st;  // cudaStream_t points to it

namespace llmkern {

struct Gpu {
  CUstream_st* stream;
  int sm_count;
  int capability;  // 10 * major + minor
};

}  // namespace llmkern
