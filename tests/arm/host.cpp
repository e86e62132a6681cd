// The launchers of csrc/include/llmkern as the bindings call them: each is carried out by guest.cpp on an emulated CPU.
// Tensors, and what the bindings allocate, come from memory that both processes share.
#include <c10/core/Allocator.h>
#include <sys/mman.h>
#include <torch/headeronly/util/Exception.h>
#include <unistd.h>

#include <bit>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "calls.h"

#define LLMKERN_EXPORT extern "C" __attribute__((visibility("default")))

namespace llmkern {
namespace {

// Blocks of powers of two, which are reused, behind each other in the shared memory.
class Window final : public c10::Allocator {
 public:
  bool open(int descriptor, size_t size) {
    void* const at = reinterpret_cast<void*>(kSharedAt);
    size_ = size;
    return mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, descriptor, 0) == at;
  }

  // Filled with NaN, of any type: what nobody wrote shows in the results.
  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    const int order = std::bit_width(std::max<size_t>(bytes, 64) - 1);
    const uintptr_t at = kSharedAt + used_;
    void* block = reinterpret_cast<void*>(at);
    if (!free_[order].empty()) {
      block = free_[order].back();
      free_[order].pop_back();
    } else {
      STD_TORCH_CHECK(used_ + (size_t{1} << order) <= size_, "the shared memory is full");
      used_ += size_t{1} << order;
      orders_.emplace_back(at, order);
    }
    return std::memset(block, 0xff, bytes);
  }

  bool owns(const void* block) const { return reinterpret_cast<uintptr_t>(block) - kSharedAt < size_; }

  void give_back(void* block) {
    const std::lock_guard lock(mutex_);
    const auto found = std::ranges::lower_bound(orders_, reinterpret_cast<uintptr_t>(block), {},
                                                [](const auto& entry) { return entry.first; });
    free_[found->second].push_back(block);
  }

  c10::DataPtr allocate(size_t bytes) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  std::mutex mutex_;
  size_t used_ = 0, size_ = 0;
  std::vector<void*> free_[48];                    // by the binary logarithm of their size
  std::vector<std::pair<uintptr_t, int>> orders_;  // of all blocks, by address
};

Window& window() {
  static Window& window = *new Window;  // tensors may outlive static objects
  return window;
}

c10::DataPtr Window::allocate(size_t bytes) {
  void* const block = bytes == 0 ? nullptr : take(bytes);
  return {block, block, raw_deleter(), c10::Device(c10::DeviceType::CPU)};
}

c10::DeleterFnPtr Window::raw_deleter() const {
  return [](void* block) {
    if (block != nullptr) window().give_back(block);
  };
}

int to_guest = -1, from_guest = -1;

Answer ask(Function function, const void* params, size_t bytes) {
  static Request request;
  request.function = function;
  std::memcpy(request.params, params, bytes);
  bool ok = write(to_guest, &request, sizeof(request)) == sizeof(request);
  Answer answer;
  char* to = reinterpret_cast<char*>(&answer);
  for (size_t left = sizeof(answer); ok && left > 0;) {
    const ssize_t n = read(from_guest, to, left);
    ok = n > 0;
    to += n, left -= n;
  }
  STD_TORCH_CHECK(ok, "the emulated CPU has stopped");
  return answer;
}

template <class Params>
int64_t ask(Function function, const Params& params) {
  static_assert(sizeof(Params) <= sizeof(Request::params));
  return ask(function, &params, sizeof(params)).value;
}

}  // namespace

#define LLMKERN_FORWARD(op, Params)                   \
  void launch_##op(const Params& p, const Threads&) { \
    ask(Function::op, p);                             \
  }
LLMKERN_LAUNCHERS(LLMKERN_FORWARD)

int64_t attention_workspace_bytes(const AttentionParams& p) {
  return ask(Function::attention_workspace_bytes, p);
}

int64_t attention_decode_workspace_bytes(const AttentionDecodeParams& p) {
  return ask(Function::attention_decode_workspace_bytes, p);
}

int64_t attention_varlen_workspace_bytes(const AttentionVarlenParams& p) {
  return ask(Function::attention_varlen_workspace_bytes, p);
}

bool linear_takes_many_rows(WeightType weight) {
  return ask(Function::linear_takes_many_rows, weight) != 0;
}

bool linear_keeps_rows_alone() {
  return ask(Function::linear_keeps_rows_alone, "", 1).value != 0;
}

}  // namespace llmkern

// The linker has the bindings call these (--wrap), for the memory that layers keep.
extern "C" void __real_free(void* block);

extern "C" void* __wrap_aligned_alloc(size_t, size_t bytes) {
  return llmkern::window().take(bytes);
}

extern "C" void __wrap_free(void* block) {
  llmkern::window().owns(block) ? llmkern::window().give_back(block) : __real_free(block);
}

// 0: the shared memory is where it is to be.
LLMKERN_EXPORT int arm_open(int descriptor, size_t size) {
  return llmkern::window().open(descriptor, size) ? 0 : 1;
}

// Has PyTorch allocate in shared memory from now on, or as before.
LLMKERN_EXPORT void arm_share(int shared) {
  static c10::Allocator* const before = c10::GetAllocator(c10::DeviceType::CPU);
  c10::SetAllocator(c10::DeviceType::CPU, shared ? &llmkern::window() : before);
}

LLMKERN_EXPORT void arm_connect(int to, int from) {
  llmkern::to_guest = to, llmkern::from_guest = from;
}

LLMKERN_EXPORT int arm_set_isa(const char* name) {
  return static_cast<int>(llmkern::ask(llmkern::Function::set_isa, name, std::strlen(name) + 1).value);
}

LLMKERN_EXPORT const char* arm_isa() {
  static llmkern::Answer answer;
  answer = llmkern::ask(llmkern::Function::get_isa, "", 1);
  return answer.text;
}
