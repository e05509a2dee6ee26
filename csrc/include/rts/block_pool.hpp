#pragma once

#include <algorithm>
#include <cstdint>
#include <ranges>
#include <span>
#include <stdexcept>
#include <vector>

#include "rts/prefix_cache.hpp"

namespace rts {

// The KV cache's blocks: which are in use, by how many sequences, and which idle ones still hold a prefix that may be
// asked for again. Those are given up when no other block is free, or when there are more of them than are to be kept.
// O(1) a block, no allocation after construction, single-threaded.
class BlockPool {
 public:
  // Of the idle blocks that hold a prefix, `keep` are kept; 0: no prefix is ever found.
  explicit BlockPool(std::uint32_t blocks, std::uint32_t keep = 0) : users_(blocks, 0), prefixes_(blocks), keep_(keep) {
    free_.reserve(blocks);
    for (std::uint32_t block = blocks; block-- > 0;) free_.push_back(static_cast<std::int32_t>(block));
  }

  std::uint32_t size() const { return static_cast<std::uint32_t>(users_.size()); }
  // Those that could be had now, idle ones with a prefix among them.
  std::uint32_t available() const { return static_cast<std::uint32_t>(free_.size()) + prefixes_.idle(); }
  std::uint32_t in_use() const { return size() - available(); }
  std::uint32_t idle() const { return prefixes_.idle(); }
  bool keeps_prefixes() const { return keep_ > 0; }

  // A block of unknown content. Of those without a prefix the one that was freed last, whose memory is warm. Throws
  // std::logic_error where none is available.
  std::int32_t allocate() {
    if (free_.empty()) give_up_one();
    const std::int32_t block = free_.back();
    free_.pop_back();
    users(block) = 1;
    return block;
  }

  // The block that holds a prefix, for one more user; kNone where there is none.
  std::int32_t find(const Hash128& prefix) const { return prefixes_.find(prefix); }
  bool is_idle(std::int32_t block) const { return prefixes_.is_idle(block); }
  bool has_one_user(std::int32_t block) const { return users_[static_cast<std::size_t>(block)] == 1; }
  void share(std::int32_t block) {
    if (prefixes_.is_idle(block)) prefixes_.set_used(block);
    ++users(block);
  }
  // A block in use holds this prefix, or is about to before anybody reads it.
  void publish(std::int32_t block, const Hash128& prefix) { prefixes_.insert(prefix, block); }
  // It does not after all.
  void retract(std::int32_t block) { prefixes_.erase(block); }

  // A sequence's blocks, in its order, are used by it no more: its last ones are given up first. Throws
  // std::logic_error for a block that nobody uses.
  void free(std::span<const std::int32_t> blocks) {
    for (const std::int32_t block : std::views::reverse(blocks)) {
      if (users(block) == 0) throw std::logic_error("a KV block was freed twice");
      if (--users(block) > 0) continue;
      if (prefixes_.knows(block)) {
        prefixes_.set_idle(block);
        if (prefixes_.idle() > keep_) give_up_one();
      } else {
        free_.push_back(block);
      }
    }
  }

 private:
  std::uint32_t& users(std::int32_t block) { return users_.at(static_cast<std::size_t>(block)); }

  void give_up_one() {
    const std::int32_t block = prefixes_.evict();
    if (block == PrefixCache::kNone) throw std::logic_error("a KV block was asked for where none is available");
    free_.push_back(block);
  }

  std::vector<std::int32_t> free_;
  std::vector<std::uint32_t> users_;
  PrefixCache prefixes_;
  std::uint32_t keep_;
};

}  // namespace rts
