#pragma once

#include <cstdint>
#include <vector>

#include "rts/siphash.hpp"

namespace rts {

// Which KV block holds which prefix, and in which order the idle ones, those that no sequence uses, are given up: the
// one that has been idle for longest first.
//
// A block is known by the hash of all tokens up to its end, so that what is found is right from the first position on.
// An open-addressed table (linear probing, no tombstones) and a list through the blocks: O(1) each, no allocation after
// construction. Single-threaded.
class PrefixCache {
 public:
  static constexpr std::int32_t kNone = -1;

  explicit PrefixCache(std::uint32_t blocks);

  // The block with that prefix, idle or not; kNone where there is none.
  std::int32_t find(const Hash128& prefix) const noexcept;
  // False, and nothing is changed, where another block has that prefix already. A block has one prefix at a time.
  bool insert(const Hash128& prefix, std::int32_t block) noexcept;
  bool knows(std::int32_t block) const noexcept { return entry(block).known; }
  // Its content is to be found no more. For blocks that are not idle.
  void erase(std::int32_t block) noexcept;

  // A known block is used by nobody any more, or by somebody again.
  void set_idle(std::int32_t block) noexcept;
  void set_used(std::int32_t block) noexcept;
  bool is_idle(std::int32_t block) const noexcept { return entry(block).idle; }
  std::uint32_t idle() const noexcept { return idle_; }
  // Gives up the block that has been idle for longest; kNone where none is.
  std::int32_t evict() noexcept;

 private:
  struct Entry {
    Hash128 prefix;
    std::int32_t older = kNone, newer = kNone;  // in the list of idle ones
    bool known = false;
    bool idle = false;
  };

  const Entry& entry(std::int32_t block) const noexcept { return entries_[static_cast<std::size_t>(block)]; }
  Entry& entry(std::int32_t block) noexcept { return entries_[static_cast<std::size_t>(block)]; }
  std::size_t home(const Hash128& prefix) const noexcept { return prefix.low & mask_; }
  std::size_t slot_of(const Hash128& prefix) const noexcept;

  std::vector<Entry> entries_;       // by block
  std::vector<std::int32_t> table_;  // blocks by hash; at most half full
  std::size_t mask_;
  std::int32_t oldest_ = kNone, newest_ = kNone;
  std::uint32_t idle_ = 0;
};

}  // namespace rts
