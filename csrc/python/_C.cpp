// llmkern._C: build information and launch plans.  No tensors, so that it loads next to any torch; everything works
// without it.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#include "plans.h"

namespace py = pybind11;

namespace {

std::string version_text(uint64_t packed) {
  return std::to_string(packed >> 56) + "." + std::to_string(packed >> 48 & 0xff);
}

py::object text_or_none(const char* text) {
  return *text ? py::object(py::str(text)) : py::object(py::none());
}

py::dict build_info() {
  py::dict info;
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = LLMKERN_FLAGS;
  info["torch"] = TORCH_VERSION;
  info["abi_target"] = version_text(TORCH_TARGET_VERSION);
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  info["cpu_isas"] = LLMKERN_ISAS;
  info["nvcc"] = text_or_none(LLMKERN_NVCC);
  info["cuda_archs"] = text_or_none(LLMKERN_ARCHS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was built and how.";
  m.def("build_info", &build_info, "Compilers, versions, ABI target, flags, instruction sets and CUDA architectures.");
  llmkern::define_plans(m);
}
