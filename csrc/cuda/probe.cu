// Probe whether the driver takes kernels of this library, once, so that a GPU without an image, or a driver older than
// the compiler, is a sentence of `llmkern info` and not an error of the first call.
#ifndef LLMKERN_SIMT
#include "common/launch.cuh"

namespace llmkern {
namespace {

__global__ void probe_kernel() {}

}  // namespace
}  // namespace llmkern

// Returns CUDA's error for `device`, or an empty string.  Nothing is launched, so that it may be asked while a graph is
// captured; the current device stays what it is.
extern "C" __attribute__((visibility("default"))) const char* llmkern_cuda_error(int device) {
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, llmkern::probe_kernel);
    cudaSetDevice(before);
  }
  cudaGetLastError();  // what was found is told here, not by whoever asks next
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}
#endif
