#include "rts/prefix_cache.hpp"

#include <bit>

namespace rts {

PrefixCache::PrefixCache(std::uint32_t blocks)
    : entries_(blocks), table_(std::bit_ceil(std::size_t{blocks} * 2 + 1), kNone), mask_(table_.size() - 1) {}

// Where the prefix is, or where it would go.
std::size_t PrefixCache::slot_of(const Hash128& prefix) const noexcept {
  std::size_t slot = home(prefix);
  while (table_[slot] != kNone && entry(table_[slot]).prefix != prefix) slot = (slot + 1) & mask_;
  return slot;
}

std::int32_t PrefixCache::find(const Hash128& prefix) const noexcept {
  return table_[slot_of(prefix)];
}

bool PrefixCache::insert(const Hash128& prefix, std::int32_t block) noexcept {
  const std::size_t slot = slot_of(prefix);
  if (table_[slot] != kNone) return false;
  table_[slot] = block;
  entry(block).prefix = prefix;
  entry(block).known = true;
  return true;
}

void PrefixCache::erase(std::int32_t block) noexcept {
  if (!knows(block)) return;
  std::size_t hole = slot_of(entry(block).prefix);
  entry(block).known = false;
  // Whoever was pushed past the hole moves back into it: Knuth's algorithm R (vol. 3, 6.4).
  for (std::size_t slot = (hole + 1) & mask_; table_[slot] != kNone; slot = (slot + 1) & mask_) {
    const std::size_t wants = home(entry(table_[slot]).prefix);
    if (((slot - wants) & mask_) < ((slot - hole) & mask_)) continue;
    table_[hole] = table_[slot];
    hole = slot;
  }
  table_[hole] = kNone;
}

void PrefixCache::set_idle(std::int32_t block) noexcept {
  Entry& added = entry(block);
  added.idle = true;
  added.older = newest_;
  added.newer = kNone;
  (newest_ == kNone ? oldest_ : entry(newest_).newer) = block;
  newest_ = block;
  ++idle_;
}

void PrefixCache::set_used(std::int32_t block) noexcept {
  Entry& taken = entry(block);
  taken.idle = false;
  (taken.older == kNone ? oldest_ : entry(taken.older).newer) = taken.newer;
  (taken.newer == kNone ? newest_ : entry(taken.newer).older) = taken.older;
  --idle_;
}

std::int32_t PrefixCache::evict() noexcept {
  const std::int32_t block = oldest_;
  if (block == kNone) return kNone;
  set_used(block);
  erase(block);
  return block;
}

}  // namespace rts
