#include "rts/sequence_memory.hpp"

#include <algorithm>
#include <cstring>

namespace rts {

SequenceMemory::SequenceMemory(BlockPool& pool, std::uint32_t block_size, const SipKey& key)
    : pool_(pool),
      block_size_(block_size),
      key_(key),
      states_(pool.size()),
      hashed_(sizeof(Hash128) + block_size * sizeof(std::int32_t)) {
  found_.reserve(pool.size());
}

// Of what comes before the first block, its extra key; then of the hash before it and its tokens.
void SequenceMemory::extend_hashes(Sequence& sequence, std::uint32_t blocks) {
  while (sequence.hashes.size() < blocks) {
    const std::size_t at = sequence.hashes.size();
    const Hash128 before =
        at > 0 ? sequence.hashes[at - 1] : siphash128(key_, std::as_bytes(std::span(&sequence.extra_key, 1)));
    std::memcpy(hashed_.data(), &before, sizeof before);
    std::memcpy(hashed_.data() + sizeof before, sequence.tokens.data() + at * block_size_,
                block_size_ * sizeof(std::int32_t));
    sequence.hashes.push_back(siphash128(key_, hashed_));
  }
}

// The leading blocks that are there already, into found_; how many of them are idle.
std::uint32_t SequenceMemory::find_shared(Sequence& sequence) {
  found_.clear();
  sequence.shareable_blocks = 0;
  if (!pool_.keeps_prefixes()) return 0;
  sequence.shareable_blocks = (static_cast<std::uint32_t>(sequence.tokens.size()) - 1) / block_size_;
  extend_hashes(sequence, sequence.shareable_blocks);
  std::uint32_t idle = 0;
  for (std::uint32_t i = 0; i < sequence.shareable_blocks; ++i) {
    const std::int32_t block = pool_.find(sequence.hashes[i]);
    if (block == PrefixCache::kNone) break;
    found_.push_back(block);
    idle += pool_.is_idle(block) ? 1 : 0;
  }
  return idle;
}

std::uint32_t SequenceMemory::needed(Sequence& sequence) {
  const std::uint32_t idle = find_shared(sequence);
  return blocks_for(sequence.tokens.size()) - static_cast<std::uint32_t>(found_.size()) + idle;
}

bool SequenceMemory::acquire(Sequence& sequence, std::uint32_t headroom) {
  if (std::uint64_t{needed(sequence)} + headroom > pool_.available()) return false;
  const std::uint32_t blocks = blocks_for(sequence.tokens.size());
  for (const std::int32_t block : found_) {
    pool_.share(block);
    sequence.blocks.push_back(block);
  }
  for (std::uint32_t i = static_cast<std::uint32_t>(found_.size()); i < blocks; ++i) {
    const std::int32_t block = pool_.allocate();
    state(block) = {};
    sequence.blocks.push_back(block);
    if (i < sequence.shareable_blocks) pool_.publish(block, sequence.hashes[i]);
  }
  sequence.published_blocks = sequence.shareable_blocks;
  sequence.scheduled = 0;
  return true;
}

std::uint32_t SequenceMemory::held_alone(const Sequence& sequence) const {
  return static_cast<std::uint32_t>(
      std::ranges::count_if(sequence.blocks, [this](std::int32_t block) { return pool_.has_one_user(block); }));
}

std::uint32_t SequenceMemory::reach(const Sequence& sequence, std::uint32_t positions) const {
  const std::uint64_t blocks = sequence.blocks.size() + std::uint64_t{pool_.available()};
  auto end = static_cast<std::uint32_t>(
      std::min<std::uint64_t>(std::uint64_t{sequence.scheduled} + positions, blocks * block_size_));
  for (std::uint32_t i = sequence.scheduled / block_size_ + 1; i < sequence.shareable_blocks && i * block_size_ < end;
       ++i) {
    if (state(sequence.blocks[i]).filled) end = i * block_size_;
  }
  return end - sequence.scheduled;
}

bool SequenceMemory::pass_over_computed(Sequence& sequence) {
  while (sequence.scheduled % block_size_ == 0 && sequence.scheduled / block_size_ < sequence.shareable_blocks) {
    Block& next = state(sequence.blocks[sequence.scheduled / block_size_]);
    if (!next.filled) {
      // Whoever is paused may be so for long: then this one computes it. Both write the same.
      if (next.filler == nullptr || next.filler->paused) next.filler = &sequence;
      return next.filler == &sequence;
    }
    sequence.scheduled += block_size_;
    if (!sequence.was_preempted) sequence.cached_tokens += block_size_;
  }
  return true;
}

void SequenceMemory::grow(Sequence& sequence) {
  while (sequence.blocks.size() * block_size_ < sequence.scheduled) {
    const std::int32_t block = pool_.allocate();
    state(block) = {};
    sequence.blocks.push_back(block);
  }
}

void SequenceMemory::fill(Sequence& sequence, std::uint32_t start) {
  const std::uint32_t complete = std::min(sequence.scheduled / block_size_, sequence.shareable_blocks);
  for (std::uint32_t i = start / block_size_; i < complete; ++i) {
    state(sequence.blocks[i]) = {.filler = nullptr, .filled = true};
  }
  if (complete == sequence.shareable_blocks || sequence.scheduled % block_size_ == 0) return;
  Block& begun = state(sequence.blocks[complete]);
  if (begun.filler == nullptr && !begun.filled) begun.filler = &sequence;
}

void SequenceMemory::publish(Sequence& sequence, std::uint32_t positions) {
  const std::uint32_t complete = positions / block_size_;
  extend_hashes(sequence, complete);
  for (; sequence.published_blocks < complete; ++sequence.published_blocks) {
    const std::int32_t block = sequence.blocks[sequence.published_blocks];
    state(block).filled = true;
    pool_.publish(block, sequence.hashes[sequence.published_blocks]);
  }
}

void SequenceMemory::retract(Sequence& sequence, std::uint32_t start) {
  for (std::uint32_t i = start / block_size_; i < sequence.blocks.size(); ++i) {
    state(sequence.blocks[i]) = {};
    pool_.retract(sequence.blocks[i]);
  }
}

void SequenceMemory::rewind(Sequence& sequence) {
  const std::uint32_t complete = sequence.scheduled / block_size_;
  for (std::uint32_t i = 0; i < sequence.published_blocks && i * block_size_ < sequence.scheduled; ++i) {
    const Block& block = state(sequence.blocks[i]);
    // One that it has begun is its own, or another took it over while it was paused.
    if (block.filled || (i == complete && block.filler == &sequence)) continue;
    sequence.scheduled = i * block_size_;
    sequence.cached_tokens = std::min(sequence.cached_tokens, sequence.scheduled);
    return;
  }
}

void SequenceMemory::release(Sequence& sequence) {
  for (const std::int32_t block : sequence.blocks) {
    Block& left = state(block);
    if (left.filler == &sequence) left.filler = nullptr;
    if (!left.filled && pool_.has_one_user(block)) pool_.retract(block);
  }
  pool_.free(sequence.blocks);
  sequence.blocks.clear();
}

}  // namespace rts
