#include "counters.h"

#include <algorithm>
#include <array>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "machine.h"

namespace llmkern::simt::counters {
namespace {

constexpr int kBank = 4, kBanks = 32, kSector = 32;

struct Counts {
  int64_t instructions = 0, wavefronts = 0, fewest_wavefronts = 0, sectors = 0, fewest_sectors = 0;
  int64_t read = 0, written = 0;
};
std::map<std::tuple<std::string, const void*, std::string>, Counts> all;
std::map<std::string, std::pair<int64_t, int64_t>> by_allocation;  // read, written
std::string kernel;

// One access of a warp, as far as its lanes have come.
struct Access {
  std::array<uintptr_t, kWarp> address;
  uint32_t lanes = 0;
};
struct Place {
  Site site;
  bool shared, write;
  int bytes;
  std::array<int, kWarp> count{};
  std::vector<Access> accesses;
};
// Accesses by warp; a copy has two, to global and to shared memory, from one place.
std::array<std::map<std::pair<const void*, bool>, Place>, kMaxThreads / kWarp> places;

int64_t distinct(std::vector<uintptr_t>& numbers) {
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return static_cast<int64_t>(numbers.size());
}

void count_shared(const Access& access, int bytes, Counts& to) {
  const int lanes = std::min(kWarp, kBanks * kBank / std::max(bytes, kBank));  // at a time
  for (int first = 0; first < kWarp; first += lanes) {
    std::vector<uintptr_t> words;
    for (int l = first; l < first + lanes; ++l)
      if (access.lanes >> l & 1)
        for (int at = 0; at < bytes; at += kBank) words.push_back((access.address[l] + at) / kBank);
    if (words.empty()) continue;
    const int64_t count = distinct(words);
    std::array<int64_t, kBanks> of_bank{};
    for (uintptr_t word : words) ++of_bank[word % kBanks];
    to.wavefronts += *std::max_element(of_bank.begin(), of_bank.end());
    to.fewest_wavefronts += (count + kBanks - 1) / kBanks;
  }
}

void count_global(const Access& access, int bytes, bool write, Counts& to) {
  std::vector<uintptr_t> sectors, units;
  int lanes = 0;
  for (int l = 0; l < kWarp; ++l)
    if (access.lanes >> l & 1) {
      ++lanes;
      sectors.push_back(access.address[l] / kSector), units.push_back(access.address[l]);
    }
  to.sectors += distinct(sectors);
  to.fewest_sectors += (distinct(units) * bytes + kSector - 1) / kSector;
  (write ? to.written : to.read) += int64_t{lanes} * bytes;
}

void flush(Place& place) {
  Counts& to = all[{kernel, place.site.place, place.site.instruction}];
  const bool is_copy = place.site.instruction[0] == 'c';  // its instruction is counted on its way to shared memory
  for (const Access& access : place.accesses) {
    if (place.shared || !is_copy) ++to.instructions;
    place.shared ? count_shared(access, place.bytes, to) : count_global(access, place.bytes, place.write, to);
  }
  place.accesses.clear();
  place.count = {};
}

}  // namespace

void start_launch(const char* name) {
  kernel = name;
}

void count_instruction(const Site& site) {
  ++all[{kernel, site.place, site.instruction}].instructions;
}

void count_access(int thread, const Site& site, bool shared, bool write, uintptr_t address, int bytes) {
  Place& place = places[thread / kWarp][{site.place, shared}];
  place.site = site, place.shared = shared, place.write = write, place.bytes = bytes;
  const int lane = thread % kWarp, number = place.count[lane]++;
  if (number == static_cast<int>(place.accesses.size())) place.accesses.emplace_back();
  Access& access = place.accesses[number];
  access.address[lane] = address, access.lanes |= 1u << lane;
}

void count_bytes(const std::string& allocation, bool write, int bytes) {
  auto& [read, written] = by_allocation[allocation];
  (write ? written : read) += bytes;
}

void warp_met(int warp) {
  for (auto& [key, place] : places[warp])
    if (!place.accesses.empty()) flush(place);
}

void block_ended() {
  for (size_t warp = 0; warp < places.size(); ++warp) {
    warp_met(static_cast<int>(warp));
    places[warp].clear();
  }
}

std::string take() {
  std::string text;
  for (const auto& [key, c] : all) {
    const auto& [name, place, instruction] = key;
    text += name + "\t" + name_of(place) + "\t" + instruction;
    for (int64_t n :
         {c.instructions, c.wavefronts, c.fewest_wavefronts, c.sectors, c.fewest_sectors, c.read, c.written})
      text += "\t" + std::to_string(n);
    text += "\n";
  }
  all.clear();
  return text;
}

std::string take_bytes() {
  std::string text;
  for (const auto& [name, bytes] : std::exchange(by_allocation, {}))
    text += name + "\t" + std::to_string(bytes.first) + "\t" + std::to_string(bytes.second) + "\n";
  return text;
}

}  // namespace llmkern::simt::counters
