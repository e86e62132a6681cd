// The machine's switches for tests in Python (ctypes).
#include "counters.h"
#include "machine.h"

#define LLMKERN_EXPORT extern "C" __attribute__((visibility("default")))

LLMKERN_EXPORT void simt_set(uint64_t seed, int copies, int sm_count, int capability, uint64_t approximate, int count,
                             int fault) {
  llmkern::simt::settings = {.seed = seed,
                             .copies = static_cast<llmkern::simt::Copies>(copies),
                             .gpu = {.stream = nullptr, .sm_count = sm_count, .capability = capability},
                             .approximate = approximate,
                             .count = count != 0,
                             .fault = fault};
}

// The string is valid until the next call; so are those of the three functions below.
LLMKERN_EXPORT const char* simt_take_counters() {
  static std::string text;
  text = llmkern::simt::counters::take();
  return text.c_str();
}

LLMKERN_EXPORT const char* simt_take_bytes() {
  static std::string text;
  text = llmkern::simt::counters::take_bytes();
  return text.c_str();
}

LLMKERN_EXPORT const char* simt_take_meetings() {
  static std::string text;
  text = llmkern::simt::meeting_places();
  return text.c_str();
}

// Empty where nothing was wrong.
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
