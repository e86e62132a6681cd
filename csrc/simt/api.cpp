// The machine's switches for tests in Python (ctypes).
#include "machine.h"

#define LLMKERN_EXPORT extern "C" __attribute__((visibility("default")))

LLMKERN_EXPORT void simt_set(uint64_t seed, int late_copies, int sm_count, int capability) {
  llmkern::simt::settings = {.seed = seed,
                             .late_copies = late_copies != 0,
                             .gpu = {.stream = nullptr, .sm_count = sm_count, .capability = capability}};
}

// Valid until the next call; empty where nothing was wrong.
LLMKERN_EXPORT const char* simt_take_error() {
  static std::string error;
  error = llmkern::simt::take_error();
  return error.c_str();
}

LLMKERN_EXPORT void simt_register(const void* begin, size_t bytes, int writable, const char* name) {
  llmkern::simt::register_memory(begin, bytes, writable != 0, name);
}

LLMKERN_EXPORT void simt_forget(const void* begin) {
  llmkern::simt::forget_memory(begin);
}

LLMKERN_EXPORT void simt_forget_all() {
  llmkern::simt::forget_all_memory();
}
