// Scratch memory of a layer's values: pieces of one block, each in use until its last read.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace llmkern::layers {

// Offsets into a block that is as large as it has to be.
class Arena {
 public:
  int64_t take(int64_t bytes) {
    bytes = rounded(bytes);
    for (Piece& piece : free_) {
      if (piece.bytes < bytes) continue;
      const int64_t at = piece.begin;
      piece.begin += bytes, piece.bytes -= bytes;
      return at;
    }
    const bool grows = !free_.empty() && free_.back().begin + free_.back().bytes == bytes_;
    const int64_t at = grows ? free_.back().begin : bytes_;
    if (grows) free_.pop_back();
    bytes_ = at + bytes;
    return at;
  }

  void give_back(int64_t begin, int64_t bytes) {
    bytes = rounded(bytes);
    if (bytes == 0) return;
    size_t next = 0;
    while (next < free_.size() && free_[next].begin < begin) ++next;
    free_.insert(free_.begin() + static_cast<int64_t>(next), {begin, bytes});
    merge(next);
    if (next > 0) merge(next - 1);
  }

  int64_t bytes() const { return bytes_; }

 private:
  struct Piece {
    int64_t begin, bytes;
  };

  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  // The piece with the one behind it, where nothing lies between.
  void merge(size_t i) {
    if (i + 1 >= free_.size() || free_[i].begin + free_[i].bytes != free_[i + 1].begin) return;
    free_[i].bytes += free_[i + 1].bytes;
    free_.erase(free_.begin() + static_cast<int64_t>(i) + 1);
  }

  std::vector<Piece> free_;  // in order
  int64_t bytes_ = 0;
};

// Memory for a layer's values, kept for the next layer: the system would take every large block back and clear the
// pages of the next one, which takes as long as the products do.
class KeptMemory {
 public:
  char* at_least(int64_t bytes) {
    if (bytes > bytes_ || bytes_ > kMostKept) {
      memory_.reset();
      bytes_ = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, bytes_)));
      if (!memory_ && bytes > 0) {
        bytes_ = 0;
        throw std::bad_alloc();
      }
    }
    return memory_.get();
  }

  static KeptMemory& of_this_thread() {
    thread_local KeptMemory memory;
    return memory;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kMostKept = int64_t{256} << 20;  // a larger block is freed by the next call

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };

  std::unique_ptr<char, Free> memory_;
  int64_t bytes_ = 0;
};

}  // namespace llmkern::layers
