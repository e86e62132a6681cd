// Launching a kernel and finding its shared memory, on a GPU or on the SIMT machine.
#pragma once

#include <cstdint>

#ifdef LLMKERN_SIMT
#include "simt/cuda.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

#include "llmkern/gpu.h"

namespace llmkern {

// All shared memory is dynamic: one buffer, aligned for every instruction, as large as the launcher said.
__device__ __forceinline__ char* dynamic_shared_memory() {
#ifdef LLMKERN_SIMT
  return simt::shared_memory();
#else
  extern __shared__ __align__(1024) char buffer[];
  return buffer;
#endif
}

struct LaunchConfig {
  dim3 grid, block;
  int shared_bytes = 0;
};

// kernel<<<...>>>(args...); `name` is what reports call it.  Throws std::runtime_error where CUDA refuses the launch.
template <class... Params, class... Args>
inline void launch(const char* name, void (*kernel)(Params...), const LaunchConfig& config, const Gpu& gpu,
                   const Args&... args) {
#ifdef LLMKERN_SIMT
  (void)gpu;
  simt::launch(name, reinterpret_cast<const void*>(kernel), config.grid, config.block, config.shared_bytes,
               [&] { kernel(args...); });
#else
  constexpr int kWithoutAsking = 48 * 1024;
  cudaError_t status = cudaSuccess;
  if (config.shared_bytes > kWithoutAsking)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes);
  if (status == cudaSuccess) {
    auto start = [&](Params... params) {  // of the kernel's own types: CUDA copies them from where they are
      void* pointers[] = {&params...};
      return cudaLaunchKernel(kernel, config.grid, config.block, pointers, config.shared_bytes, gpu.stream);
    };
    status = start(args...);
  }
  if (status != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
#endif
}

}  // namespace llmkern
