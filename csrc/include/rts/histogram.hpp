#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace rts {

// Raises a counter that one thread writes and any may read. Wait-free, without a read-modify-write; it orders nothing.
inline void raise(std::atomic<std::uint64_t>& counter, std::uint64_t by = 1) noexcept {
  counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

// How many values lay below each power of two: bucket i has those with i significant bits, from 2^(i-1) to 2^i - 1; the
// last one all that are larger, too. One thread adds, any may read, also in another process; wait-free, and a reader
// may see a value counted and not yet summed. Zeroed memory is an empty one.
template <std::size_t kSize>
class Histogram {
 public:
  static constexpr std::size_t kBuckets = kSize;

  void add(std::uint64_t value) noexcept {
    raise(counts_[std::min<std::size_t>(std::bit_width(value), kSize - 1)]);
    raise(sum_, value);
  }
  std::uint64_t count(std::size_t bucket) const noexcept { return counts_[bucket].load(std::memory_order_relaxed); }
  std::uint64_t sum() const noexcept { return sum_.load(std::memory_order_relaxed); }

 private:
  std::array<std::atomic<std::uint64_t>, kSize> counts_{};
  std::atomic<std::uint64_t> sum_{0};
};

}  // namespace rts
