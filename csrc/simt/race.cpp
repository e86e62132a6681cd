#include "race.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace llmkern::simt::race {
namespace {

constexpr int kUnit = 16;  // bytes of a shadow cell
constexpr int kBarriers = 16;

struct Record {
  int64_t block;
  uint32_t time;
  uint16_t thread, mask;  // mask: of the cell's bytes
  Access kind;
  bool copied;  // by cp.async
  Site site;
};
using Records = std::vector<Record>;

struct Cell {
  uint32_t last = 0;  // the latest time of a record
  Records writes, reads, copies;
};

// A row of clocks, shared by threads that have seen the same.
struct Row {
  std::vector<uint32_t> seen;
  int owners = 0;
};

uint32_t now = 1, base = 0;
int64_t block = 0;
int thread_count = 0;
std::vector<Cell> shared_cells(kMaxShared / kUnit);
std::vector<Row> rows;
std::vector<int> row_of, free_rows;
std::array<std::vector<uint32_t>, kBarriers> arrived;  // clocks of those that have arrived

// Global memory.
struct Page {
  static constexpr int kCells = 256;
  uint64_t launch = 0;
  std::array<Cell, kCells> cells;
};
uint64_t launch_number = 0;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page = 0;
Page* last = nullptr;

// A release of another block, which `thread` of this one has acquired at `time`.
struct Release {
  int64_t block;
  int thread;
  uint32_t time, base;
  std::vector<uint32_t> seen;
};
struct Acquired {
  int thread;
  uint32_t time;
  Release from;
};
std::vector<Acquired> acquired;                      // by the running block
std::map<uintptr_t, std::vector<Release>> released;  // by atomic operations on an address
std::vector<char> fenced;                            // by thread: since its last fence only atomic operations
std::vector<std::vector<Release>> observed;          // by thread: releases that its next fence acquires

bool seen(int thread, int other, uint32_t time) {
  return time <= base || thread == other || time <= rows[row_of[thread]].seen[other];
}

// Returns whether a record is ordered before the current operation of `thread`.
bool before(const Record& record, int thread) {
  if (record.block == block) return seen(thread, record.thread, record.time);
  for (const Acquired& a : acquired) {
    const Release& from = a.from;
    if (from.block == record.block && seen(thread, a.thread, a.time) &&
        (record.time <= from.base || record.time <= from.seen[record.thread] ||
         (from.thread == record.thread && record.time <= from.time)))
      return true;
  }
  return false;
}

uint16_t mask_of(uintptr_t at, int bytes) {
  return static_cast<uint16_t>(((1u << bytes) - 1) << at % kUnit);
}

std::string thread_text(const Record& record) {
  std::string text = "thread " + std::to_string(record.thread);
  return record.block == block ? text : text + " of block " + std::to_string(record.block);
}

// Suggestions how to order the two accesses.
std::string missing(const Record& record, int thread, bool global) {
  if (record.block != block)
    return "nothing orders blocks of a launch but an atomic operation between two __threadfence()";
  if (record.copied) return "the copy has landed for its own thread only: a barrier must come behind its wait";
  if (record.thread / kWarp == thread / kWarp)
    return std::string("the two lanes of one warp need a __syncwarp() or a barrier between") +
           (global ? " these accesses" : "");
  return "the two warps need a barrier between";
}

[[noreturn]] void conflict(const Record& earlier, int thread, const Site& site, bool write, bool global) {
  fault(std::string("a race: ") + site.instruction + " at " + name_of(site.place) + (write ? " writes" : " reads") +
        " what " + earlier.site.instruction + " of " + thread_text(earlier) + " at " + name_of(earlier.site.place) +
        (earlier.kind == Access::read || earlier.kind == Access::constant ? " reads" : " writes") + ", in no order; " +
        missing(earlier, thread, global));
}

// Takes bytes off the records that pass(record) picks; those without any are dropped.
template <class F>
void strip(Records& records, uint16_t mask, const F& pick) {
  size_t kept = 0;
  for (Record& record : records) {
    if ((record.mask & mask) && pick(record)) record.mask &= static_cast<uint16_t>(~mask);
    if (record.mask) records[kept++] = record;
  }
  records.resize(kept, Record{});
}

// One cell's share of an access: judged against those before, and recorded.
void touch(Cell& cell, const Record& own, bool global) {
  const int thread = own.thread;
  const bool write = own.kind == Access::write || own.kind == Access::atomic;
  for (const Record& copy : cell.copies)
    if (copy.mask & own.mask)
      fault(std::string("a race: ") + own.site.instruction + " at " + name_of(own.site.place) +
            (write ? " writes" : " reads") + " where " + copy.site.instruction + " of " + thread_text(copy) + " at " +
            name_of(copy.site.place) + " is still on its way: its thread must wait for it (cp.async.wait_group)" +
            (copy.thread == thread ? "" : ", and a barrier follow"));
  for (const Record& other : cell.writes) {
    if (!(other.mask & own.mask) || (own.kind == Access::atomic && other.kind == Access::atomic)) continue;
    if (own.kind == Access::constant || !before(other, thread)) conflict(other, thread, own.site, write, global);
  }
  if (!write) {
    if (!cell.reads.empty()) {
      if (global) {  // two other blocks that read the same convict whoever writes it
        int others = 0;
        for (const Record& r : cell.reads)
          others += r.block != block && r.kind == own.kind && (r.mask & own.mask) == own.mask;
        if (others > 1) return;
      }
      strip(cell.reads, own.mask, [&](const Record& r) {
        return r.thread == thread && r.block == block && (r.kind == own.kind || own.kind == Access::constant);
      });
    }
    cell.reads.push_back(own);
    return;
  }
  for (const Record& other : cell.reads)
    if ((other.mask & own.mask) && (other.kind == Access::constant || !before(other, thread)))
      conflict(other, thread, own.site, true, global);
  if (!cell.reads.empty()) strip(cell.reads, own.mask, [](const Record&) { return true; });
  if (!cell.writes.empty())
    strip(cell.writes, own.mask, [&](const Record& r) {
      return own.kind != Access::atomic || r.kind != Access::atomic || (r.thread == thread && r.block == block);
    });
  cell.writes.push_back(own);
}

// f(cell, mask) for each cell of shared memory that the bytes lie in.
template <class F>
void each_shared(size_t offset, int bytes, const F& f) {
  for (size_t at = offset, end = offset + bytes; at < end;) {
    const int here = static_cast<int>(std::min(end, (at / kUnit + 1) * kUnit) - at);
    Cell& cell = shared_cells[at / kUnit];
    if (cell.last <= base) cell.writes.clear(), cell.reads.clear();  // ordered before everything to come
    f(cell, mask_of(at, here));
    at += here;
  }
}

Cell& global_cell(uintptr_t at) {
  const uintptr_t page = at / kUnit / Page::kCells;
  if (!last || page != last_page) {
    std::unique_ptr<Page>& found = pages[page];
    if (!found) found = std::make_unique<Page>();
    last_page = page, last = found.get();
  }
  if (last->launch != launch_number) {
    for (Cell& cell : last->cells) cell.writes.clear(), cell.reads.clear();
    last->launch = launch_number;
  }
  return last->cells[at / kUnit % Page::kCells];
}

void leave_row(int thread) {
  if (--rows[row_of[thread]].owners == 0) free_rows.push_back(row_of[thread]);
}

int new_row() {
  if (free_rows.empty()) {
    rows.push_back({std::vector<uint32_t>(kMaxThreads), 0});
    return static_cast<int>(rows.size()) - 1;
  }
  const int row = free_rows.back();
  free_rows.pop_back();
  return row;
}

void merge(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  for (int i = 0; i < thread_count; ++i) into[i] = std::max(into[i], from[i]);
}

void give_row(int thread, int row) {
  leave_row(thread);
  row_of[thread] = row, ++rows[row].owners;
}

}  // namespace

void start_launch() {
  ++launch_number;
  if (pages.size() > 4096) pages.clear(), last = nullptr;  // 16 MiB of outputs
  released.clear();
  if (now > 0x40000000) {
    now = 1, base = 0;
    for (Cell& cell : shared_cells) cell = {};
    for (Row& row : rows) std::fill(row.seen.begin(), row.seen.end(), 0);
  }
}

void start_block(int64_t number, int threads) {
  block = number, thread_count = threads, base = now++;
  if (rows.empty()) rows.push_back({std::vector<uint32_t>(kMaxThreads), 0});
  free_rows.clear();
  for (size_t i = 1; i < rows.size(); ++i) rows[i].owners = 0, free_rows.push_back(static_cast<int>(i));
  rows[0].owners = threads;
  row_of.assign(threads, 0);
  for (auto& clocks : arrived) clocks.clear();
  acquired.clear();
  fenced.assign(threads, 0);
  observed.assign(threads, {});
}

void access_shared(int thread, const Site& site, size_t offset, int bytes, bool write) {
  const Access kind = write ? Access::write : Access::read;
  each_shared(offset, bytes, [&](Cell& cell, uint16_t mask) {
    touch(cell, {block, now, static_cast<uint16_t>(thread), mask, kind, false, site}, false);
    cell.last = now;
  });
}

void start_copy(int thread, const Site& site, size_t offset, int bytes) {
  each_shared(offset, bytes, [&](Cell& cell, uint16_t mask) {
    const Record own{block, now, static_cast<uint16_t>(thread), mask, Access::write, true, site};
    touch(cell, own, false);
    cell.writes.pop_back();
    cell.copies.push_back(own);
  });
}

void finish_copy(int thread, const Site& site, size_t offset, int bytes) {
  each_shared(offset, bytes, [&](Cell& cell, uint16_t mask) {
    strip(cell.copies, mask, [&](const Record& r) { return r.thread == thread; });
    cell.writes.push_back({block, now, static_cast<uint16_t>(thread), mask, Access::write, true, site});
    cell.last = now;
  });
}

void access_global(int thread, const Site& site, uintptr_t address, int bytes, Access kind) {
  for (uintptr_t at = address, end = address + bytes; at < end;) {
    const int here = static_cast<int>(std::min<uintptr_t>(end, (at / kUnit + 1) * kUnit) - at);
    touch(global_cell(at), {block, now, static_cast<uint16_t>(thread), mask_of(at, here), kind, false, site}, true);
    at += here;
  }
  if (kind != Access::atomic) {
    if (kind == Access::write) fenced[thread] = 0;
    return;
  }
  std::vector<Release>& at = released[address];
  observed[thread].insert(observed[thread].end(), at.begin(), at.end());
  if (!fenced[thread]) return;
  at.push_back({block, thread, now, base, rows[row_of[thread]].seen});
  for (const Acquired& a : acquired)  // pass on what others released to this thread
    if (seen(thread, a.thread, a.time)) at.push_back(a.from);
  ++now;
}

void fence(int thread) {
  fenced[thread] = 1;
  for (Release& release : observed[thread])
    if (release.block != block) acquired.push_back({thread, now, std::move(release)});
  observed[thread].clear();
}

void join(std::span<const int> threads) {
  const int first = row_of[threads.front()];
  bool same = true;
  for (int thread : threads) same &= row_of[thread] == first;
  int row = first;
  if (!same || rows[first].owners != static_cast<int>(threads.size())) {
    row = new_row();
    std::copy_n(rows[first].seen.begin(), thread_count, rows[row].seen.begin());
    for (int thread : threads)
      if (row_of[thread] != first) merge(rows[row].seen, rows[row_of[thread]].seen);
    for (int thread : threads) give_row(thread, row);
  }
  for (int thread : threads) rows[row].seen[thread] = now;
  ++now;
}

void join_all() {
  base = now++;
}

void arrive(int barrier, int thread) {
  std::vector<uint32_t>& clocks = arrived[barrier];
  if (clocks.empty()) clocks.assign(thread_count, 0);
  merge(clocks, rows[row_of[thread]].seen);
  clocks[thread] = now++;
}

void complete(int barrier, std::span<const int> waiting) {
  const int row = new_row();
  std::vector<uint32_t>& clocks = rows[row].seen;
  std::fill(clocks.begin(), clocks.end(), 0);
  std::copy(arrived[barrier].begin(), arrived[barrier].end(), clocks.begin());
  arrived[barrier].clear();
  int before = -1;
  for (int thread : waiting) {
    if (row_of[thread] != before) merge(clocks, rows[before = row_of[thread]].seen);
  }
  for (int thread : waiting) clocks[thread] = now, give_row(thread, row);
  ++now;
  if (waiting.empty()) free_rows.push_back(row);
}

}  // namespace llmkern::simt::race
