#include "machine.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "context.h"
#include "counters.h"
#include "race.h"

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
constexpr int kBarriers = 16;

// Return address of a call to the machine.
#define LLMKERN_SIMT_PLACE (static_cast<const char*>(__builtin_return_address(0)) - 1)

struct Fault {};  // thrown through a fiber's frames; the sentence is in `error`

struct Copy {
  char* to;
  const void* from;
  int bytes, read;
  Site site;
  bool landed = false;
};

struct Thread {
  enum State { ready, waiting, exited };
  Context context;
  State state;
  uint3 index;
  const char* instruction;  // where it waits, and for the barrier of which number (or -1)
  const void* place;
  int barrier;
  std::vector<Copy> open;                 // copies not yet committed
  std::vector<std::vector<Copy>> groups;  // committed and not landed, oldest first
};

struct Meeting {
  const char* instruction;
  const void* place;  // of the first lane
  unsigned mask, arrived;
  void* operands[kWarp];
};

struct Warp {
  std::vector<Meeting> meetings;  // one per mask, of lanes that are waiting
};

struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<int> waiting;
  std::map<int, std::pair<int, const void*>> warps;  // lanes that have arrived, and where the first one was
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
std::pair<uintptr_t, const Allocation*> last_used;
std::string error;
std::set<std::pair<const void*, const void*>> met;  // places where lanes met at an aligned instruction

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

void suspend(const Site& site, int barrier = -1) {
  Thread& self = threads[running];
  self.instruction = site.instruction;
  self.place = site.place;
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
    if (thread.state == Thread::waiting) what += " at " + name_of(thread.place);
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

void land(Copy& copy) {
  if (copy.landed) return;
  std::memset(copy.to, 0, copy.bytes);
  if (copy.read > 0) std::memcpy(copy.to, copy.from, copy.read);
  copy.landed = true;
}

size_t shared_offset(const void* p) {
  return static_cast<const char*>(p) - shared_buffer;
}

// Work that the thread has waited for.
void finish(Copy& copy) {
  land(copy);
  race::finish_copy(running, copy.site, shared_offset(copy.to), copy.bytes);
}

// Ends a block: copies still in flight are dropped.
void end_block() {
  for (running = 0; running < static_cast<int>(threads.size()); ++running) {
    Thread& thread = threads[running];
    thread.groups.push_back(std::exchange(thread.open, {}));
    for (auto& group : thread.groups)
      for (Copy& copy : group) finish(copy);
    thread.groups.clear();
  }
  if (settings.count) counters::block_ended();
}

// A generator apart for copies, so that their arrival does not change the order of warps.
Random arrivals{0};

void land_some(Thread& thread) {
  auto draw = [](std::vector<Copy>& copies) {
    for (Copy& copy : copies)
      if (!copy.landed && arrivals.below(4) == 0) land(copy);
  };
  draw(thread.open);
  for (auto& group : thread.groups) draw(group);
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

// The threads of a block that a kernel was compiled for: as many bytes are before its entry, whose first the section
// lists.  0 where it was compiled without.
extern "C" __attribute__((visibility("hidden"))) const uintptr_t __start___patchable_function_entries[]
    __attribute__((weak));
extern "C" __attribute__((visibility("hidden"))) const uintptr_t __stop___patchable_function_entries[]
    __attribute__((weak));

size_t launch_bound(const void* entry) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(entry);
  uintptr_t nearest = 0;
  for (const uintptr_t* p = __start___patchable_function_entries; p != __stop___patchable_function_entries; ++p)
    if (*p <= at) nearest = std::max(nearest, *p);
  return nearest && at - nearest <= kMaxThreads ? at - nearest : 0;
}

}  // namespace

void fault(const std::string& sentence) {
  error = "thread " + std::to_string(running) + ": " + sentence;
  throw Fault();
}

std::string name_of(const void* place) {
  Dl_info library;
  const bool found = dladdr(place, &library) != 0;
  char text[32];
  std::snprintf(text, sizeof(text), "@{%zx}",
                static_cast<size_t>(static_cast<const char*>(place) -
                                    (found ? static_cast<const char*>(library.dli_fbase) : nullptr)));
  return text;
}

std::string meeting_places() {
  std::string text;
  for (const auto& [one, other] : std::exchange(met, {})) text += name_of(one) + " " + name_of(other) + "\n";
  return text;
}

void launch(const char* kernel, const void* entry, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            const std::function<void()>& body) {
  if (!error.empty()) return;
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const size_t count = size_t{block.x} * block.y * block.z;
  const std::string who = std::string(kernel) + ": ";
  if (blocks == 0 || count == 0 || count > kMaxThreads || grid.y > 65535 || grid.z > 65535) {
    error = who + "the grid " + text({grid.x, grid.y, grid.z}) + " of blocks " + text({block.x, block.y, block.z}) +
            " is not one that CUDA launches";
    return;
  }
  if (const size_t most = settings.gpu.sm().block_shared_kib * size_t{1024}; dynamic_shared_bytes > most) {
    error = who + std::to_string(dynamic_shared_bytes) + " bytes of shared memory, and a block of sm_" +
            std::to_string(settings.gpu.capability) + " has at most " + std::to_string(most);
    return;
  }
  if (const size_t bound = launch_bound(entry); bound && count > bound) {
    error =
        who + "blocks of " + std::to_string(count) + " threads, and its __launch_bounds__ are " + std::to_string(bound);
    return;
  }
  kernel_name = kernel, kernel_body = &body, shared_bytes = dynamic_shared_bytes;
  threads.resize(count);
  warps.resize((count + kWarp - 1) / kWarp);
  for (unsigned i = 0; i < count; ++i) threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  gridDim = grid, blockDim = block;
  Random random{settings.seed};
  arrivals = Random{settings.seed + 1};
  race::start_launch();
  if (settings.count) counters::start_launch(kernel);
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
    race::start_block(at, static_cast<int>(count));
    run_block(random);
    end_block();
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
  last_used = {};
}

void forget_all_memory() {
  memory.clear();
  last_used = {};
}

void adopt_memory(void* begin, size_t bytes, const std::string& name) {
  std::memset(begin, 0xff, bytes);
  register_memory(begin, bytes, true, name);
}

namespace {

// The allocation that `bytes` from `address` are within.
const Allocation& check_global(const char* instruction, bool write, const void* address, size_t bytes, size_t align) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (!last_used.second || at < last_used.first || at + bytes > last_used.first + last_used.second->bytes) {
    const auto next = memory.upper_bound(at);
    if (next == memory.begin()) fault(std::string(instruction) + ": the address is in no allocation");
    const auto& found = *std::prev(next);
    last_used = {found.first, &found.second};
  }
  const auto& [begin, allocation] = last_used;
  auto refuse = [&](const std::string& why) {
    fault(std::string(instruction) + " of " + std::to_string(bytes) + " bytes at byte " +
          std::to_string(static_cast<int64_t>(at - begin)) + " of " + allocation->name + ", which " + why);
  };
  if (at + bytes > begin + allocation->bytes) refuse("has " + std::to_string(allocation->bytes) + " bytes");
  if (write && !allocation->writable) refuse("may only be read");
  if (at % align) refuse("is not aligned");
  return *allocation;
}

void check_shared(const char* instruction, const void* address, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address), begin = reinterpret_cast<uintptr_t>(shared_buffer);
  const bool inside = at >= begin && at + bytes <= begin + shared_bytes;
  if (inside && at % bytes == 0) return;
  fault(std::string(instruction) + " of " + std::to_string(bytes) + " bytes at byte " +
        std::to_string(static_cast<int64_t>(at - begin)) + " of shared memory, which " +
        (inside ? "is not aligned" : "has " + std::to_string(shared_bytes) + " bytes"));
}

void access_shared(const Site& site, bool write, const void* address, size_t bytes) {
  check_shared(site.instruction, address, bytes);
  race::access_shared(running, site, shared_offset(address), static_cast<int>(bytes), write);
  if (settings.count)
    counters::count_access(running, site, true, write, shared_offset(address), static_cast<int>(bytes));
}

}  // namespace

void check(const char* instruction, Space space, Access access, const void* address, size_t bytes) {
  const Site site{instruction, LLMKERN_SIMT_PLACE};
  const bool write = access == Access::write || access == Access::atomic;
  if (space == Space::shared) return access_shared(site, write, address, bytes);
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const Allocation& allocation = check_global(instruction, write, address, bytes, bytes);
  if (allocation.writable) race::access_global(running, site, at, static_cast<int>(bytes), access);
  if (!settings.count) return;
  counters::count_access(running, site, false, write, at, static_cast<int>(bytes));
  counters::count_bytes(allocation.name, write, static_cast<int>(bytes));
}

char* shared_memory() {
  return shared_buffer;
}

char* shared_address(const char* instruction, uint32_t address, size_t bytes, Access access) {
  char* p = shared_buffer + (static_cast<int64_t>(address) - kSharedWindow);
  access_shared({instruction, LLMKERN_SIMT_PLACE}, access == Access::write, p, bytes);
  return p;
}

uint32_t to_shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - shared_buffer) + kSharedWindow;
}

int lane() {
  return running % kWarp;
}

namespace {

// Returns whether this lane was the last to arrive; then `done` is the rendezvous.
bool meet(const Site& site, unsigned mask, Meets meets, void* operands, Meeting& done) {
  const int warp = running / kWarp, self = lane();
  std::vector<Meeting>& meetings = warps[warp].meetings;
  if (!(mask >> self & 1)) fault(std::string(site.instruction) + " with a mask that lacks its own lane");
  size_t at = 0;
  for (; at < meetings.size(); ++at) {
    Meeting& there = meetings[at];
    if (there.mask == mask && std::strcmp(there.instruction, site.instruction) == 0) break;
    if (there.mask & mask)
      fault(std::string("is at ") + site.instruction + " while lanes that it needs are at " + there.instruction);
  }
  if (at == meetings.size()) meetings.push_back({site.instruction, site.place, mask, 0, {}});
  Meeting& meeting = meetings[at];
  if (meets == Meets::aligned && meeting.place != site.place) met.insert(std::minmax(meeting.place, site.place));
  meeting.arrived |= 1u << self;
  meeting.operands[self] = operands;
  if (meeting.arrived != mask) {
    suspend(site);
    return false;
  }
  done = meeting;
  meetings.erase(meetings.begin() + static_cast<int64_t>(at));
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) threads[warp * kWarp + i].state = Thread::ready;
  if (settings.count) {
    if (mask == kAllLanes) counters::warp_met(warp);
    if (!std::strstr(site.instruction, "matrix")) counters::count_instruction(site);  // those count as accesses
  }
  return true;
}

}  // namespace

void rendezvous(const char* instruction, unsigned mask, Meets meets, void* operands,
                void (*complete)(void* const* lanes)) {
  Meeting done;
  if (meet({instruction, LLMKERN_SIMT_PLACE}, mask, meets, operands, done)) complete(done.operands);
}

void sync_warp(unsigned mask) {
  Meeting done;
  if (!meet({"bar.warp.sync", LLMKERN_SIMT_PLACE}, mask, Meets::anywhere, nullptr, done)) return;
  int members[kWarp], count = 0;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) members[count++] = running / kWarp * kWarp + i;
  race::join({members, static_cast<size_t>(count)});
}

void fence() {
  race::fence(running);
}

void barrier(const char* instruction, int id, int count, bool wait) {
  const Site site{instruction, LLMKERN_SIMT_PLACE};
  auto refuse = [&](const std::string& why) {
    fault(std::string(instruction) + " " + std::to_string(id) + " for " + std::to_string(count) + " threads: " + why);
  };
  if (id < 0 || id >= kBarriers) refuse("there are barriers 0 to 15");
  const int all = static_cast<int>(warps.size()) * kWarp;
  if (count == 0) count = all;
  if (count % kWarp) refuse("not a multiple of 32");
  if (count > all) refuse("the block has " + std::to_string(threads.size()));
  Barrier& at = barriers[id];
  if (at.arrived == 0) at.expected = count;
  if (at.expected != count) refuse("others wait there for " + std::to_string(at.expected));
  // A warp whose lanes are not all there (the last one of an odd block) counts as a whole one.
  const bool last_lane = running + 1 == static_cast<int>(threads.size());
  const int counts = 1 + (last_lane ? kWarp - 1 - lane() : 0);
  auto& [lanes, place] = at.warps.try_emplace(running / kWarp, 0, site.place).first->second;
  if (lanes == kWarp) refuse("warp " + std::to_string(running / kWarp) + " has arrived there already");
  if (place != site.place) met.insert(std::minmax(place, site.place));
  lanes += counts;
  at.arrived += counts;
  if (settings.count && lanes == kWarp) counters::count_instruction(site), counters::warp_met(running / kWarp);
  if (!wait) race::arrive(id, running);
  if (at.arrived < at.expected) {
    if (!wait) return;
    at.waiting.push_back(running);
    suspend(site, id);
    return;
  }
  for (const auto& [warp, arrived] : at.warps)
    if (arrived.first != kWarp)
      refuse("complete with " + std::to_string(arrived.first) + " lanes of warp " + std::to_string(warp) + " only");
  for (int thread : at.waiting) threads[thread].state = Thread::ready;
  if (wait) at.waiting.push_back(running);
  if (at.waiting.size() == threads.size())
    race::join_all();
  else
    race::complete(id, at.waiting);
  at = {};
}

void copy_async(const char* instruction, uint32_t to, const void* from, int bytes, int read) {
  const Site site{instruction, LLMKERN_SIMT_PLACE};
  if (read < 0 || read > bytes) fault(std::string(instruction) + ": " + std::to_string(read) + " bytes to be read");
  const uintptr_t source = reinterpret_cast<uintptr_t>(from);
  if (read > 0) {
    const Allocation& allocation = check_global(instruction, false, from, read, bytes);
    if (allocation.writable) race::access_global(running, site, source, read, Access::read);
    if (settings.count) counters::count_bytes(allocation.name, false, read);
  }
  char* place = shared_buffer + (static_cast<int64_t>(to) - kSharedWindow);
  check_shared(instruction, place, bytes);
  race::start_copy(running, site, shared_offset(place), bytes);
  if (settings.count) {
    counters::count_access(running, site, true, true, shared_offset(place), bytes);
    if (read > 0) counters::count_access(running, site, false, false, source, read);
  }
  Thread& self = threads[running];
  self.open.push_back({place, from, bytes, read, site});
  if (settings.copies == Copies::at_once) land(self.open.back());
  if (settings.copies == Copies::random) land_some(self);
}

void commit_copies() {
  Thread& self = threads[running];
  self.groups.push_back(std::exchange(self.open, {}));
  if (settings.copies == Copies::random) land_some(self);
}

void wait_copies(int newest_still_flying) {
  std::vector<std::vector<Copy>>& groups = threads[running].groups;
  while (static_cast<int>(groups.size()) > newest_still_flying) {
    for (Copy& copy : groups.front()) finish(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace llmkern::simt
