// Race detection by vector clocks: an unordered conflict between accesses of a launch ends the launch, whatever
// the seed made of it.
//
//   time      counts releases.  An access is stamped with it; a thread that synchronises with others learns up to which
//             time it has seen each of them (a row of clocks), and base is the time up to which all have seen all
//   orders    bar.sync and bar.arrive (what came before in the threads that arrive, before what follows in those that
//             wait), bar.warp.sync, and for global memory __threadfence around an atomic operation.  Shuffles, votes,
//             mma and ldmatrix order no memory (CUDA Programming Guide, "Warp Shuffle Functions"), so they do not here
//   copies    cp.async writes at any time from its issue to its thread's wait: until then nobody may touch the bytes,
//             and from then on they count as written by that thread, at that time
//   ldmatrix, stmatrix   the lane that gives a row's address accesses it
//   global    the same within a block; between blocks nothing is ordered but by a fence, an atomic operation, another
//             on the same address and a fence.  Read-only memory is not tracked
//   shadow    for each 16 bytes the accesses that are not yet ordered before all others, with a mask of their bytes
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "machine.h"

namespace llmkern::simt {

// An access or a copy: what, and from where in the kernel's code it was called.
struct Site {
  const char* instruction;
  const void* place;
};

// As sentences name places in the code; tests/simt/machine.py looks up file and line.
std::string name_of(const void* place);

namespace race {

void start_launch();
void start_block(int64_t block, int threads);

void access_shared(int thread, const Site& site, size_t offset, int bytes, bool write);
void start_copy(int thread, const Site& site, size_t offset, int bytes);
void finish_copy(int thread, const Site& site, size_t offset, int bytes);
void access_global(int thread, const Site& site, uintptr_t address, int bytes, Access kind);

// Orders all that the threads of a set have done before all that they do next.
void join(std::span<const int> threads);
void join_all();
void fence(int thread);

// A barrier: threads that only arrive say so when they do, those that wait are given when it is complete.
void arrive(int barrier, int thread);
void complete(int barrier, std::span<const int> waiting);

}  // namespace race
}  // namespace llmkern::simt
