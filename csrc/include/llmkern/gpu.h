// Gpu: where a CUDA launcher works, without knowing torch or CUDA's headers.
#pragma once

struct CUstream_st;  // cudaStream_t points to it

namespace llmkern {

// Capacity of an SM: KiB of shared memory, of which a block may have block_shared_kib; warps; blocks.
struct Sm {
  int shared_kib, block_shared_kib, warps, blocks;
};

// Capacities by compute capability, 10 * major + minor (CUDA C++ Programming Guide, "Technical Specifications per
// Compute Capability").  One that is not listed is taken for the smallest.
constexpr Sm sm_of(int capability) {
  switch (capability) {
    case 80:
      return {164, 163, 64, 32};
    case 87:
      return {164, 163, 48, 16};
    case 89:
      return {100, 99, 48, 24};
    case 90:
    case 100:
    case 103:
      return {228, 227, 64, 32};
    case 120:
    case 121:
      return {100, 99, 48, 24};
    default:
      return {100, 99, 48, 16};
  }
}

struct Gpu {
  CUstream_st* stream;
  int sm_count;
  int capability;  // 10 * major + minor

  constexpr Sm sm() const { return sm_of(capability); }
};

}  // namespace llmkern
