#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>

#include "rts/cache_line.hpp"

namespace rts::cpu {

// Items that threads take part by part: one that was delayed leaves its parts to the others.
class alignas(kCacheLine) SharedWork {
 public:
  // Of a thread, about: few enough that taking one costs nothing, many enough that a delay is shared.
  static constexpr std::size_t kPartsOfAThread = 6;

  static std::size_t part_of(std::size_t items, std::size_t threads) {
    return std::max<std::size_t>(1, items / (threads * kPartsOfAThread));
  }

  // Nobody may be in share().
  void reset() noexcept { next_.store(0, std::memory_order_relaxed); }

  // Calls `take(begin, end)` with parts of [0, items) that no other thread gets.
  template <typename Take>
  void share(std::size_t items, std::size_t part, Take&& take) {
    for (std::size_t begin; (begin = next_.fetch_add(part, std::memory_order_relaxed)) < items;) {
      take(begin, std::min(begin + part, items));
    }
  }

 private:
  std::atomic<std::size_t> next_{0};
};

}  // namespace rts::cpu
