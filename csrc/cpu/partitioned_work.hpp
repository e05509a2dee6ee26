#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>

#include "rts/cache_line.hpp"

namespace rts::cpu {

// Items of which each thread has a range of its own, taken part by part: the next part is known, so that its memory can
// be fetched in advance. Who has done with its own takes parts of the others', so one that was delayed holds nobody up.
class PartitionedWork {
 public:
  explicit PartitionedWork(std::size_t threads) : threads_(threads), cursors_(new Cursor[threads]) {}

  // Of a thread's items, about: few enough that taking one costs nothing, many enough that a delay is shared.
  static std::size_t part_of(std::size_t items, std::size_t threads) {
    constexpr std::size_t kPartsOfAThread = 4;
    return std::max<std::size_t>(1, items / (threads * kPartsOfAThread));
  }

  // Where a thread's own items begin; those of `threads` would begin at the end.
  static std::size_t own_begin(std::size_t items, std::size_t thread, std::size_t threads) {
    return items * thread / threads;
  }

  // Nobody may be in share().
  void reset() noexcept {
    for (std::size_t thread = 0; thread < threads_; ++thread)
      cursors_[thread].taken.store(0, std::memory_order_relaxed);
  }

  // Calls `take(begin, end, range_end)` with parts of [0, items) that no other thread gets; what the thread will be
  // given next begins at `end`, unless that is range_end.
  template <typename Take>
  void share(std::size_t thread, std::size_t items, std::size_t part, Take&& take) {
    for (std::size_t i = 0; i < threads_; ++i) {
      const std::size_t owner = (thread + i) % threads_;
      const std::size_t first = own_begin(items, owner, threads_), end = own_begin(items, owner + 1, threads_);
      std::atomic<std::size_t>& taken = cursors_[owner].taken;
      for (std::size_t begin; (begin = first + taken.fetch_add(part, std::memory_order_relaxed)) < end;) {
        take(begin, std::min(begin + part, end), end);
      }
    }
  }

 private:
  struct alignas(kCacheLine) Cursor {
    std::atomic<std::size_t> taken{0};
  };

  std::size_t threads_;
  std::unique_ptr<Cursor[]> cursors_;
};

}  // namespace rts::cpu
