// A SIMT machine on the CPU: runs kernels of csrc/cuda, compiled by a host compiler, to judge them in tests.
//
//   a CUDA thread      a fiber: own stack, run until it must wait for others
//   a warp instruction a rendezvous of the lanes in its mask; the last to arrive computes it for all
//   a block            its warps, run in an order drawn from the seed; blocks one after the other, in such an order too
//   shared memory      one buffer, filled with 0xff (NaN in every floating type) before each block
//   global memory      registered by tests; every access through csrc/cuda/common is checked against it
//   cp.async           lands at once, only when waited for, or at any time between, in any order
//   order              race.h: accesses that conflict and that nothing orders are found under every seed
//   numbers            contracted to fma as nvcc contracts (-ffp-contract=fast); tensor cores and approximations as
//                      ptx.h says
//   counters           counters.h: bank conflicts, sectors and instructions, where a test asks for them
//
// A broken rule (an access out of bounds, a race, lanes that meet at different instructions, threads that wait for
// ever) ends the launch with a sentence that says who did what, which `take_error` returns.  One OS thread; nothing is
// reentrant.
//
// Sentences and counters name places in the code by the return address of the machine's functions, so all that kernels
// call is inlined into them (LLMKERN_SIMT_INLINE), and the debugger's tables have the whole chain of inlined calls.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "llmkern/gpu.h"

#define LLMKERN_SIMT_INLINE inline __attribute__((always_inline))

namespace llmkern::simt {

// When an asynchronous copy lands.
enum class Copies { at_once, late, random };

struct Settings {
  uint64_t seed = 0;  // of every order that CUDA leaves open
  Copies copies = Copies::at_once;
  Gpu gpu{.stream = nullptr, .sm_count = 4, .capability = 90};  // as launchers see it
  uint64_t approximate = 0;  // not 0: approximate instructions err as much as PTX lets them, by this salt
  bool count = false;        // counters.h
  int fault = 0;             // which of the planted faults of a copy of the kernels is on
};

inline Settings settings;

// True in the copies that tests/simt/planted.py makes of kernels, where fault `number` is to be.
inline bool planted(int number) {
  return settings.fault == number;
}

constexpr int kWarp = 32;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 * 1024;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr uint32_t kSharedWindow = 0x400;  // where shared memory starts in 32-bit addresses: 0 is no valid one

// Ends the launch with this sentence; the kernel, block and thread are added.
[[noreturn]] void fault(const std::string& sentence);

// Runs body as every thread of the grid.  Does nothing while an earlier launch's error has not been taken.
// `entry` is the kernel's own address, whose launch bounds are checked.
void launch(const char* kernel, const void* entry, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body);

// Returns the sentence of the first rule broken since the last call, or an empty string.
std::string take_error();

// Global memory that kernels may use.  Freed memory must be forgotten.
void register_memory(const void* begin, size_t bytes, bool writable, const std::string& name);
void forget_memory(const void* begin);
void forget_all_memory();

// Registers and poisons memory that a binding allocates.
void adopt_memory(void* begin, size_t bytes, const std::string& name);

enum class Space { global, shared };
enum class Access { read, write, constant, atomic };  // constant: no thread may write it in the same launch

// Every access goes through here: within one allocation, aligned to its size, and written only where that is allowed.
void check(const char* instruction, Space space, Access access, const void* address, size_t bytes);

// The running thread's block's shared memory, and where a 32-bit address in it points to.
char* shared_memory();
char* shared_address(const char* instruction, uint32_t address, size_t bytes, Access access);
uint32_t to_shared_address(const void* p);

int lane();

// Waits until every lane of `mask` is at this instruction with this mask; the last one calls complete(operands of
// the lanes, nullptr for those not in the mask).  Aligned instructions must be met at one place of the code.
enum class Meets { anywhere, aligned };
void rendezvous(const char* instruction, unsigned mask, Meets meets, void* operands,
                void (*complete)(void* const* lanes));

// bar.warp.sync: a rendezvous that orders memory, which others do not.
void sync_warp(unsigned mask);
void fence();

// "place place" for each two places where lanes of a warp met at an aligned instruction, which the compiler may have
// made of one or which are two; a line each.
std::string meeting_places();

// The same with types: F is a lambda without captures that takes Operands* const (&)[32].
template <Meets kMeets = Meets::aligned, class Operands, class F>
LLMKERN_SIMT_INLINE void collective(const char* instruction, unsigned mask, Operands operands, F) {
  rendezvous(instruction, mask, kMeets, &operands, [](void* const* lanes) {
    Operands* typed[kWarp];
    for (int i = 0; i < kWarp; ++i) typed[i] = static_cast<Operands*>(lanes[i]);
    F{}(typed);
  });
}

// Barrier `id` of the block, for `threads` of its threads (0: all); `wait` false only arrives.
void barrier(const char* instruction, int id, int threads, bool wait);

// cp.async: `read` of the `bytes` come from global memory, the rest is zero.
void copy_async(const char* instruction, uint32_t to, const void* from, int bytes, int read);
void commit_copies();
void wait_copies(int newest_still_flying);

}  // namespace llmkern::simt

// Declarations that nvcc makes by itself.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
