#include "machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <utility>
#include <vector>

#include "context.h"

#ifdef __x86_64__
asm(R"(
  .text
  .globl llmkern_simt_switch
  .type llmkern_simt_switch, @function
llmkern_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size llmkern_simt_switch, . - llmkern_simt_switch
)");
#endif

namespace llmkern::simt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 * 1024;
constexpr int kBarriers = 16;

struct Fault {};  // thrown through a fiber's frames; the sentence is in `error`

struct Copy {
  char* to;
  const void* from;
  int bytes, read;
};

struct Thread {
  enum State { ready, waiting, exited };
  Context context;
  State state;
  uint3 index;
  const char* instruction;  // where it waits, and for the barrier of which number (or -1)
  int barrier;
  std::vector<Copy> open;                 // copies not yet committed
  std::vector<std::vector<Copy>> groups;  // committed and not landed, oldest first
};

struct Meeting {
  const char* instruction;
  unsigned mask, arrived;
  void* operands[kWarp];
};

struct Warp {
  std::vector<Meeting> meetings;  // one per mask, of lanes that are waiting
};

struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<int> waiting;
};

struct Allocation {
  size_t bytes;
  bool writable;
  std::string name;
};

// splitmix64: any seed, 0 too, starts a good sequence.
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
};

// The stacks of a block's threads, each with a page below it that must not be touched.
char* stack_of(int thread) {
  static char* const stacks = [] {
    const size_t each = kStackBytes + 4096;
    void* memory =
        mmap(nullptr, kMaxThreads * each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::terminate();
    for (size_t i = 0; i < kMaxThreads; ++i) mprotect(static_cast<char*>(memory) + i * each, 4096, PROT_NONE);
    return static_cast<char*>(memory) + 4096;
  }();
  return stacks + thread * (kStackBytes + 4096);
}

alignas(1024) char shared_buffer[kMaxShared];
size_t shared_bytes;
std::map<uintptr_t, Allocation> memory;
std::string error;

const char* kernel_name;
const std::function<void()>* kernel_body;
std::vector<Thread> threads;
std::vector<Warp> warps;
Barrier barriers[kBarriers];
Context scheduler;
int running;  // index of the running thread

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

void suspend(const char* instruction, int barrier = -1) {
  Thread& self = threads[running];
  self.instruction = instruction;
  self.barrier = barrier;
  self.state = Thread::waiting;
  switch_to(self.context, scheduler);
}

void enter() {
  try {
    (*kernel_body)();
  } catch (const Fault&) {
  }
  Thread& self = threads[running];
  self.state = Thread::exited;
  switch_to(self.context, scheduler);
}

void resume(int thread) {
  running = thread;
  threadIdx = threads[thread].index;
  switch_to(scheduler, threads[thread].context);
}

// "threads 0-31, 40": who, in order.
std::string ranges(const std::vector<int>& of) {
  std::string out = of.size() == 1 ? "thread " : "threads ";
  for (size_t i = 0; i < of.size();) {
    size_t j = i;
    while (j + 1 < of.size() && of[j + 1] == of[j] + 1) ++j;
    out += (i ? ", " : "") + std::to_string(of[i]) + (j > i ? "-" + std::to_string(of[j]) : "");
    i = j + 1;
  }
  return out;
}

std::string deadlock() {
  std::map<std::string, std::vector<int>> doing;
  for (size_t i = 0; i < threads.size(); ++i) {
    const Thread& thread = threads[i];
    std::string what = thread.state == Thread::exited ? "exited" : std::string("waits at ") + thread.instruction;
    if (thread.state == Thread::waiting && thread.barrier >= 0) what += " " + std::to_string(thread.barrier);
    doing[what].push_back(static_cast<int>(i));
  }
  std::string out = "no thread can go on:";
  const char* separator = " ";
  for (const auto& [what, who] : doing) {
    out += separator + ranges(who) + ": " + what;
    separator = "; ";
  }
  return out;
}

bool has_ready(int warp) {
  const int end = std::min<int>((warp + 1) * kWarp, static_cast<int>(threads.size()));
  for (int i = warp * kWarp; i < end; ++i)
    if (threads[i].state == Thread::ready) return true;
  return false;
}

void run_block(Random& random) {
  const int count = static_cast<int>(threads.size());
  std::memset(shared_buffer, 0xff, shared_bytes);
  for (Barrier& barrier : barriers) barrier = {};
  for (Warp& warp : warps) warp.meetings.clear();
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.state = Thread::ready;
    thread.open.clear();
    thread.groups.clear();
    prepare(thread.context, stack_of(i), kStackBytes, enter);
  }
  std::vector<int> candidates;
  while (error.empty()) {
    candidates.clear();
    for (int w = 0; w < static_cast<int>(warps.size()); ++w)
      if (has_ready(w)) candidates.push_back(w);
    if (candidates.empty()) {
      for (const Thread& thread : threads)
        if (thread.state != Thread::exited) error = deadlock();
      return;
    }
    // A warp keeps running for a while: the one that is far ahead, or far behind, is what finds mistakes.
    const int warp = candidates[random.below(static_cast<int>(candidates.size()))];
    do {
      const int first = random.below(kWarp), step = 2 * random.below(kWarp / 2) + 1;
      for (int i = 0; i < kWarp && error.empty(); ++i) {
        const int thread = warp * kWarp + (first + i * step) % kWarp;
        if (thread < count && threads[thread].state == Thread::ready) resume(thread);
      }
    } while (error.empty() && has_ready(warp) && random.below(4) != 0);
  }
}

void land(const Copy& copy) {
  std::memset(copy.to, 0, copy.bytes);
  if (copy.read > 0) std::memcpy(copy.to, copy.from, copy.read);
}

}  // namespace

void fault(const std::string& sentence) {
  error = "thread " + std::to_string(running) + ": " + sentence;
  throw Fault();
}

void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& body) {
  if (!error.empty()) return;
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const size_t count = size_t{block.x} * block.y * block.z;
  const std::string who = std::string(kernel) + ": ";
  if (blocks == 0 || count == 0 || count > kMaxThreads || grid.y > 65535 || grid.z > 65535) {
    error = who + "the grid " + text({grid.x, grid.y, grid.z}) + " of blocks " + text({block.x, block.y, block.z}) +
            " is not one that CUDA launches";
    return;
  }
  if (dynamic_shared_bytes > kMaxShared) {
    error = who + std::to_string(dynamic_shared_bytes) + " bytes of shared memory, and there are 227 KiB";
    return;
  }
  kernel_name = kernel, kernel_body = &body, shared_bytes = dynamic_shared_bytes;
  threads.resize(count);
  warps.resize((count + kWarp - 1) / kWarp);
  for (unsigned i = 0; i < count; ++i) threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  gridDim = grid, blockDim = block;
  Random random{settings.seed};
  // Blocks in an order of the seed's: a step that shares no factor with their number visits each once.
  int64_t step = 1 + static_cast<int64_t>(random.next() % static_cast<uint64_t>(blocks));
  auto gcd = [](int64_t a, int64_t b) {
    while (b) a = std::exchange(b, a % b);
    return a;
  };
  while (gcd(step, blocks) != 1) ++step;
  int64_t at = static_cast<int64_t>(random.next() % static_cast<uint64_t>(blocks));
  for (int64_t i = 0; i < blocks && error.empty(); ++i, at = (at + step) % blocks) {
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                static_cast<unsigned>(at / grid.x / grid.y)};
    run_block(random);
    if (!error.empty()) error = who + "block " + text(blockIdx) + ", " + error;
  }
}

std::string take_error() {
  return std::exchange(error, {});
}

void register_memory(const void* begin, size_t bytes, bool writable, const std::string& name) {
  memory[reinterpret_cast<uintptr_t>(begin)] = {bytes, writable, name};
}

void forget_memory(const void* begin) {
  memory.erase(reinterpret_cast<uintptr_t>(begin));
}

void forget_all_memory() {
  memory.clear();
}

void adopt_memory(void* begin, size_t bytes, const std::string& name) {
  std::memset(begin, 0xff, bytes);
  register_memory(begin, bytes, true, name);
}

namespace {

// `bytes` from `address` within one allocation; `where` names the place for a sentence, if one is needed.
void check_range(const char* instruction, Space space, Access access, const void* address, size_t bytes, size_t align) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  auto refuse = [&](uintptr_t begin, const std::string& of, const std::string& why) {
    fault(std::string(instruction) + " of " + std::to_string(bytes) + " bytes at byte " +
          std::to_string(static_cast<int64_t>(at - begin)) + " of " + of + ", which " + why);
  };
  if (space == Space::shared) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(shared_buffer);
    if (at < begin || at + bytes > begin + shared_bytes)
      refuse(begin, "shared memory", "has " + std::to_string(shared_bytes) + " bytes");
    if (at % align) refuse(begin, "shared memory", "is not aligned");
    return;
  }
  const auto next = memory.upper_bound(at);
  if (next == memory.begin()) fault(std::string(instruction) + ": the address is in no allocation");
  const auto& [begin, allocation] = *std::prev(next);
  if (at + bytes > begin + allocation.bytes)
    refuse(begin, allocation.name, "has " + std::to_string(allocation.bytes) + " bytes");
  if (access == Access::write && !allocation.writable) refuse(begin, allocation.name, "may only be read");
  if (at % align) refuse(begin, allocation.name, "is not aligned");
}

}  // namespace

void check(const char* instruction, Space space, Access access, const void* address, size_t bytes) {
  check_range(instruction, space, access, address, bytes, bytes);
}

char* shared_memory() {
  return shared_buffer;
}

char* shared_address(const char* instruction, uint32_t address, size_t bytes, Access access) {
  char* p = shared_buffer + (static_cast<int64_t>(address) - kSharedWindow);
  check(instruction, Space::shared, access, p, bytes);
  return p;
}

uint32_t to_shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - shared_buffer) + kSharedWindow;
}

int lane() {
  return running % kWarp;
}

void rendezvous(const char* instruction, unsigned mask, void* operands, void (*complete)(void* const* lanes)) {
  const int warp = running / kWarp, self = lane();
  std::vector<Meeting>& meetings = warps[warp].meetings;
  if (!(mask >> self & 1)) fault(std::string(instruction) + " with a mask that lacks its own lane");
  size_t at = 0;
  for (; at < meetings.size(); ++at) {
    Meeting& there = meetings[at];
    if (there.mask == mask && std::strcmp(there.instruction, instruction) == 0) break;
    if (there.mask & mask)
      fault(std::string("is at ") + instruction + " while lanes that it needs are at " + there.instruction);
  }
  if (at == meetings.size()) meetings.push_back({instruction, mask, 0, {}});
  Meeting& meeting = meetings[at];
  meeting.arrived |= 1u << self;
  meeting.operands[self] = operands;
  if (meeting.arrived != mask) {
    suspend(instruction);
    return;
  }
  const Meeting done = meeting;
  meetings.erase(meetings.begin() + static_cast<int64_t>(at));
  complete(done.operands);
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) threads[warp * kWarp + i].state = Thread::ready;
}

void barrier(const char* instruction, int id, int count, bool wait) {
  auto refuse = [&](const std::string& why) {
    fault(std::string(instruction) + " " + std::to_string(id) + " for " + std::to_string(count) + " threads: " + why);
  };
  if (id < 0 || id >= kBarriers) refuse("there are barriers 0 to 15");
  if (count == 0) count = static_cast<int>(warps.size()) * kWarp;
  if (count % kWarp) refuse("not a multiple of 32");
  Barrier& at = barriers[id];
  if (at.arrived == 0) at.expected = count;
  if (at.expected != count) refuse("others wait there for " + std::to_string(at.expected));
  // A warp whose lanes are not all there (the last one of an odd block) counts as a whole one.
  const bool last_lane = running + 1 == static_cast<int>(threads.size());
  at.arrived += 1 + (last_lane ? kWarp - 1 - lane() : 0);
  if (at.arrived < at.expected) {
    if (!wait) return;
    at.waiting.push_back(running);
    suspend(instruction, id);
    return;
  }
  for (int thread : at.waiting) threads[thread].state = Thread::ready;
  at = {};
}

void copy_async(const char* instruction, uint32_t to, const void* from, int bytes, int read) {
  if (read < 0 || read > bytes) fault(std::string(instruction) + ": " + std::to_string(read) + " bytes to be read");
  if (read > 0) check_range(instruction, Space::global, Access::read, from, read, bytes);
  const Copy copy{shared_address(instruction, to, bytes, Access::write), from, bytes, read};
  if (settings.late_copies)
    threads[running].open.push_back(copy);
  else
    land(copy);
}

void commit_copies() {
  Thread& self = threads[running];
  self.groups.push_back(std::exchange(self.open, {}));
}

void wait_copies(int newest_still_flying) {
  std::vector<std::vector<Copy>>& groups = threads[running].groups;
  while (static_cast<int>(groups.size()) > newest_still_flying) {
    for (const Copy& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace llmkern::simt
