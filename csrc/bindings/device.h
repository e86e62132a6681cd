// The device that a binding is compiled for.  Each csrc/bindings/<op>.cpp is compiled once for the CPU, once for CUDA
// (LLMKERN_CUDA) and, in tests, for the SIMT machine (LLMKERN_SIMT), which
// takes CPU tensors; a test may register a copy under another name than llmkern (LLMKERN_NAMESPACE).  What differs is
// here:
//   LLMKERN_BINDINGS(m) { m.impl(...); }   where the operators are registered
//   on_device(x, t)                        whether kernels on x's device can read t
//   new_tensor(x, sizes, dtype)            memory on x's device
//   new_strided(x, sizes, strides)         the same in x's dtype, with any strides
//   Place(x)                               what launchers take behind their params
//   LLMKERN_GPU                            defined for both that launch kernels of csrc/cuda
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(LLMKERN_CUDA) || defined(LLMKERN_SIMT)
#define LLMKERN_GPU
#endif

#if defined(LLMKERN_CUDA)
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include "llmkern/gpu.h"

// In torch's CUDA library, which a CPU-only torch lacks.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#define LLMKERN_BINDINGS(m) LLMKERN_BINDINGS_ON(CUDA, m)
#elif defined(LLMKERN_SIMT)
#include "llmkern/gpu.h"
#include "simt/machine.h"
#ifndef LLMKERN_NAMESPACE
#define LLMKERN_NAMESPACE llmkern_simt
#endif
#else
#include "cpu/threads.h"
#ifndef LLMKERN_NAMESPACE
#define LLMKERN_BINDINGS(m) LLMKERN_BINDINGS_ON(CPU, m)
#endif
#endif

#ifdef LLMKERN_NAMESPACE
#define LLMKERN_BINDINGS_OF(ns, m) STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m)
#define LLMKERN_BINDINGS(m) LLMKERN_BINDINGS_OF(LLMKERN_NAMESPACE, m)
#endif

// Registers under llmkern, and under llmkern_native, whose operators have no autograd (llmkern/library.py).
#define LLMKERN_BINDINGS_ON(Device, m)                         \
  template <class Library>                                     \
  static void register_kernels(Library& m);                    \
  STABLE_TORCH_LIBRARY_IMPL(llmkern, Device, library) {        \
    register_kernels(library);                                 \
  }                                                            \
  STABLE_TORCH_LIBRARY_IMPL(llmkern_native, Device, library) { \
    register_kernels(library);                                 \
  }                                                            \
  template <class Library>                                     \
  static void register_kernels(Library& m)

namespace llmkern {
namespace {  // the copies for several devices are linked into one library

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Another GPU's memory cannot be read, or ends the process's context where the two have no peer access.
inline bool on_device(const Tensor& x, const Tensor& t) {
#ifdef LLMKERN_CUDA
  return t.is_cuda() && t.get_device_index() == x.get_device_index();
#else
  return t.is_cpu() && x.is_cpu();
#endif
}

inline Tensor adopted(Tensor made) {
#ifdef LLMKERN_SIMT
  simt::adopt_memory(made.mutable_data_ptr(), made.numel() * made.element_size(), "an output");
#endif
  return made;
}

inline Tensor empty_strided(const Tensor& x, int64_t dims, const int64_t* sizes, const int64_t* strides,
                            int32_t dtype) {
  int32_t device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, device, index, &made));
  return adopted(Tensor(made));
}

// Contiguous.  Not by stable::new_empty, which goes through the dispatcher twice: longer than a small op computes.
inline Tensor new_tensor(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  constexpr size_t kMostDims = 16;
  if (sizes.size() > kMostDims) return adopted(torch::stable::new_empty(x, sizes, dtype));
  int64_t strides[kMostDims], stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  return empty_strided(x, static_cast<int64_t>(sizes.size()), sizes.data(), strides, type);
}

// In x's dtype; the strides leave no gaps.
template <size_t kDims>
inline Tensor new_strided(const Tensor& x, const int64_t (&sizes)[kDims], const int64_t (&strides)[kDims]) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty_strided(x, kDims, sizes, strides, dtype);
}

#if defined(LLMKERN_CUDA)

class Place {
 public:
  explicit Place(const Tensor& x) : guard_(x.get_device_index()) {
    const int device = x.get_device_index();
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    gpu_ = {static_cast<CUstream_st*>(stream), attribute(cudaDevAttrMultiProcessorCount, device),
            10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                attribute(cudaDevAttrComputeCapabilityMinor, device)};
  }

  operator const Gpu&() const { return gpu_; }

 private:
  static int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&value, which, device);
    STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
    return value;
  }

  torch::stable::accelerator::DeviceGuard guard_;  // launchers launch on the current device
  Gpu gpu_;
};

#elif defined(LLMKERN_SIMT)

struct Place {
  explicit Place(const Tensor&) {}
  operator const Gpu&() const { return simt::settings.gpu; }
};

#else

struct Place {
  explicit Place(const Tensor&) {}
  operator const Threads&() const { return kTorchThreads; }
};

#endif

}  // namespace
}  // namespace llmkern
