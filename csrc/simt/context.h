// Switching between stacks, for fibers.  A dozen instructions on x86-64; elsewhere ucontext, which asks
// the kernel about signals at every switch and is some twenty times slower.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace llmkern::simt {

#ifdef __x86_64__

// The registers that a call preserves are on the stack that `top` points to.
struct Context {
  void* top = nullptr;
};

// Pushes the registers onto this stack, leaves its top in *from, and pops them from `to`.
extern "C" void llmkern_simt_switch(void** from, void* to);

inline void switch_to(Context& from, Context& to) {
  llmkern_simt_switch(&from.top, to.top);
}

// A context that starts in entry(), which must not return, on the given stack.
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kSaved = 6;  // rbx, rbp, r12 to r15
  auto* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = 0;                                   // where entry's caller would be; also aligns the stack as after a call
  *--top = reinterpret_cast<uintptr_t>(entry);  // popped by ret
  for (int i = 0; i < kSaved; ++i) *--top = 0;
  context.top = top;
}

#else

struct Context {
  ucontext_t state;
};

inline void switch_to(Context& from, Context& to) {
  swapcontext(&from.state, &to.state);
}

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#endif

}  // namespace llmkern::simt
