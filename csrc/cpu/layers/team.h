// A team: the threads of a pool, called together once for a whole layer, or many.  One of them leads: it goes through
// the launchers, and shares the work of each with the others, who wait for it in a loop.  A call of the pool costs
// several microseconds, as much as a small layer's product; a piece of shared work costs a fraction of one.
//
// Work is cut into a piece for each thread (smaller ones would break off streams of memory that are under way), and a
// piece belongs to who asks first.  So a thread that comes late, or never, delays nobody.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "llmkern/threads.h"

namespace llmkern {

class Team {
 public:
  // f(threads), where the launchers may be given `threads`: those of the pool, which has `count`, and which nobody else
  // may use meanwhile.
  template <class F>
  static void lead(const Threads& pool, int64_t count, const F& f) {
    if (count == 1) return f(pool);
    Team team(count);
    auto body = [&](int64_t begin, int64_t) { begin == 0 ? team.lead_with(f) : team.help(); };
    pool.parallel_for(count, 1, body);
  }

 private:
  // Pieces to claim, in one number: how many pieces the present work has, times this, plus how many are taken.
  // These may be more than there are: a thread counts itself in before it knows.
  static constexpr uint64_t kPieces = uint64_t{1} << 32;

  // Grains are meant for the pool, where sharing work costs several times as much.
  static constexpr int64_t kPiecesPerGrain = 4;

  static constexpr int kPatience = 256;  // turns of a loop before the thread lets others have its core

  struct Work {
    int64_t begin, count, pieces;
    Threads::Body body;
    void* context;

    void operator()(int64_t piece) const {
      body(begin + count * piece / pieces, begin + count * (piece + 1) / pieces, context);
    }
  };

  explicit Team(int64_t threads) : threads_(threads) {}

  template <class F>
  void lead_with(const F& f) {
    struct Led {
      Team* team;
      Team* before = std::exchange(led_, team);
      ~Led() {
        led_ = before;
        team->over_.store(true, std::memory_order_release);
      }
    };
    const Led led{this};
    f(kThreads);
  }

  void help() {
    for (int turns = 0; !over_.load(std::memory_order_relaxed); ++turns) {
      if (take_pieces()) turns = 0;
      wait(turns);
    }
  }

  void share(int64_t begin, int64_t end, int64_t grain, Threads::Body body, void* context) {
    const int64_t count = end - begin, most = grain > 1 ? count * kPiecesPerGrain / grain : count;
    const int64_t pieces = std::min({most, count, threads_});
    if (pieces <= 1) return body(begin, end, context);
    work_ = {begin, count, pieces, body, context};
    finished_.store(0, std::memory_order_relaxed);
    claims_.store(static_cast<uint64_t>(pieces) * kPieces, std::memory_order_release);
    take_pieces();
    for (int turns = 0; finished_.load(std::memory_order_acquire) != pieces; ++turns) wait(turns);
  }

  // Run pieces until none is left; return true if there was one.
  bool take_pieces() {
    bool any = false;
    while (is_left(claims_.load(std::memory_order_relaxed))) {
      const uint64_t claimed = claims_.fetch_add(1, std::memory_order_acquire);
      if (!is_left(claimed)) break;
      work_(claimed % kPieces);
      finished_.fetch_add(1, std::memory_order_release);
      any = true;
    }
    return any;
  }

  static bool is_left(uint64_t claims) { return claims % kPieces < claims / kPieces; }

  // With more threads than cores, the awaited thread may be waiting for this core.
  static void wait(int turns) {
    if (turns >= kPatience) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  static const Threads kThreads;
  static inline thread_local Team* led_ = nullptr;  // by this thread

  const int64_t threads_;
  Work work_{};
  alignas(64) std::atomic<uint64_t> claims_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
  std::atomic<bool> over_{false};
};

inline constexpr Threads Team::kThreads{[](int64_t begin, int64_t end, int64_t grain, Threads::Body body,
                                           void* context) { led_->share(begin, end, grain, body, context); }};

}  // namespace llmkern
