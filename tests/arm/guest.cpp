// The kernels on an emulated CPU: answers the requests (calls.h) that come by standard input, until it is closed.
// argv[1] is the descriptor of the shared memory, argv[2] its size.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "calls.h"

extern "C" const char* llmkern_cpu_isa();
extern "C" int llmkern_set_cpu_isa(const char* name);

namespace llmkern {
namespace {

// Three shares, the last first, as threads might take them.
constexpr Threads kThreads{[](int64_t begin, int64_t end, int64_t grain, Threads::Body body, void* context) {
  const int64_t count = end - begin, shares = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, 3);
  for (int64_t i = shares - 1; count > 0 && i >= 0; --i)
    body(begin + count * i / shares, begin + count * (i + 1) / shares, context);
}};

template <class Params>
const Params& as(const Request& request) {
  static_assert(sizeof(Params) <= sizeof(request.params));
  return *reinterpret_cast<const Params*>(request.params);
}

Answer answer(const Request& r) {
  switch (r.function) {
#define LLMKERN_LAUNCH(op, Params)        \
  case Function::op:                      \
    launch_##op(as<Params>(r), kThreads); \
    return {};
    LLMKERN_LAUNCHERS(LLMKERN_LAUNCH)
    case Function::attention_workspace_bytes:
      return {attention_workspace_bytes(as<AttentionParams>(r)), {}};
    case Function::attention_decode_workspace_bytes:
      return {attention_decode_workspace_bytes(as<AttentionDecodeParams>(r)), {}};
    case Function::attention_varlen_workspace_bytes:
      return {attention_varlen_workspace_bytes(as<AttentionVarlenParams>(r)), {}};
    case Function::linear_takes_many_rows:
      return {linear_takes_many_rows(as<WeightType>(r)), {}};
    case Function::linear_keeps_rows_alone:
      return {linear_keeps_rows_alone(), {}};
    case Function::set_isa:
      return {llmkern_set_cpu_isa(r.params), {}};
    case Function::get_isa: {
      Answer a{};
      std::strncpy(a.text, llmkern_cpu_isa(), sizeof(a.text) - 1);
      return a;
    }
  }
  std::abort();
}

void tell_address(int signal, siginfo_t* info, void*) {
  std::fprintf(stderr, "%s at %p\n", signal == SIGILL ? "an instruction that this CPU lacks" : "a wrong address",
               info->si_addr);
  _exit(1);
}

bool read_all(void* to, size_t size) {
  for (char* p = static_cast<char*>(to); size > 0;) {
    const ssize_t n = read(STDIN_FILENO, p, size);
    if (n <= 0) return false;
    p += n, size -= n;
  }
  return true;
}

}  // namespace
}  // namespace llmkern

int main(int, char** argv) {
  using namespace llmkern;
  void* const at = reinterpret_cast<void*>(kSharedAt);
  const size_t size = std::strtoull(argv[2], nullptr, 10);
  if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, std::atoi(argv[1]), 0) != at) return 2;
  struct sigaction action{};
  action.sa_sigaction = tell_address;
  action.sa_flags = SA_SIGINFO;
  for (int signal : {SIGSEGV, SIGBUS, SIGILL}) sigaction(signal, &action, nullptr);
  static Request request;
  while (read_all(&request, sizeof(request))) {
    const Answer a = answer(request);
    if (write(STDOUT_FILENO, &a, sizeof(a)) != sizeof(a)) return 3;
  }
  return 0;
}
