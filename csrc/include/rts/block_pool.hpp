#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace rts {

// The KV cache's blocks: which are free, and how many are promised. A sequence reserves its worst case when it is
// admitted and then allocates as it grows, so one that runs never finds the pool empty. O(1) a block, single-threaded.
class BlockPool {
 public:
  explicit BlockPool(std::uint32_t blocks) : used_(blocks, 0) {
    free_.reserve(blocks);
    for (std::uint32_t block = blocks; block-- > 0;) free_.push_back(static_cast<std::int32_t>(block));
  }

  std::uint32_t size() const { return static_cast<std::uint32_t>(used_.size()); }
  std::uint32_t in_use() const { return size() - static_cast<std::uint32_t>(free_.size()); }
  std::uint32_t reserved() const { return reserved_; }

  // Neither in use nor promised.
  std::uint32_t available() const { return size() - in_use() - reserved_; }
  // Promises `blocks` more. False: that many are not left, and nothing is promised.
  bool reserve(std::uint32_t blocks) {
    if (blocks > available()) return false;
    reserved_ += blocks;
    return true;
  }
  void unreserve(std::uint32_t blocks) {
    if (blocks > reserved_) throw std::logic_error("more KV blocks given back than were reserved");
    reserved_ -= blocks;
  }

  // Makes one promised block into one in use. The one that was freed last, whose memory is warm.
  std::int32_t allocate_reserved() {
    unreserve(1);
    const std::int32_t block = free_.back();
    free_.pop_back();
    used_[static_cast<std::size_t>(block)] = 1;
    return block;
  }

  // Throws std::logic_error for a block that is not in use.
  void free(std::span<const std::int32_t> blocks) {
    for (const std::int32_t block : blocks) {
      std::uint8_t& used = used_.at(static_cast<std::size_t>(block));
      if (used == 0) throw std::logic_error("a KV block was freed twice");
      used = 0;
      free_.push_back(block);
    }
  }

 private:
  std::vector<std::int32_t> free_;
  std::vector<std::uint8_t> used_;
  std::uint32_t reserved_ = 0;
};

}  // namespace rts
