// Counters of what decides a kernel's speed, for each place in its code while Settings::count says so:
//   instructions   of warps
//   wavefronts     passes over the 32 banks of shared memory that a warp's access takes, and the fewest that its words
//                  could take; 8 bytes of a lane go by half warps, 16 by quarters
//   sectors        of 32 bytes of global memory that a warp's access touches, and the fewest that its bytes could
//   bytes          of global memory, read and written: by place, and by allocation
// Lanes run one after the other, so accesses from one place are put together by their number since the warp last met.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "race.h"

namespace llmkern::simt::counters {

void start_launch(const char* kernel);
void count_instruction(const Site& site);
void count_access(int thread, const Site& site, bool shared, bool write, uintptr_t address, int bytes);
void count_bytes(const std::string& allocation, bool write, int bytes);
void warp_met(int warp);
void block_ended();

// A line of tab-separated numbers for each kernel and place, which are then forgotten: kernel, place, instruction,
// count, wavefronts, fewest wavefronts, sectors, fewest sectors, bytes read, bytes written.
std::string take();

// The same for the bytes that kernels asked for: allocation, read, written.
std::string take_bytes();

}  // namespace llmkern::simt::counters
