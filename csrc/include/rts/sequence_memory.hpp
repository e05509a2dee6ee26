#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "rts/block_pool.hpp"
#include "rts/sequence.hpp"
#include "rts/siphash.hpp"

namespace rts {

// The KV blocks of sequences: what each holds of its own, what it shares with others that have the same prefix, and who
// computes what several of them wait for.
//
// A sequence gets the blocks for all the tokens that it has when it is admitted, and one more whenever it grows into
// it. Full blocks of the same prefix are the same block: of those that others have computed nothing is computed again,
// and where another is about to compute one, this one waits for it. The last known token is always computed, for its
// logits. So nobody writes to what another has computed; but where one was paused in the middle of a block and another
// took it over, both write the same to it.
class SequenceMemory {
 public:
  SequenceMemory(BlockPool& pool, std::uint32_t block_size, const SipKey& key);

  // Takes the blocks for a sequence's tokens, and leaves `headroom` blocks to others. False: that many are not there,
  // and none is taken.
  bool acquire(Sequence& sequence, std::uint32_t headroom);
  // How many blocks acquire() would take that nobody has now.
  std::uint32_t needed(Sequence& sequence);
  // How many would be there again if it gave up its own.
  std::uint32_t held_alone(const Sequence& sequence) const;
  // How many of the next `positions` positions it can compute at once: as far as blocks are available, and no further
  // than to the next block that another has computed.
  std::uint32_t reach(const Sequence& sequence, std::uint32_t positions) const;
  // How many more it needs for its first `positions` positions.
  std::uint32_t growth(const Sequence& sequence, std::uint32_t positions) const {
    const auto held = static_cast<std::uint32_t>(sequence.blocks.size());
    return positions <= held * block_size_ ? 0 : blocks_for(positions) - held;
  }

  // Passes over what others have computed of its prompt. False: it is to wait, for another one computes what comes
  // next.
  bool pass_over_computed(Sequence& sequence);
  // Its positions from `start` up to `scheduled` are in a plan: takes the blocks that it has grown into. Throws
  // std::logic_error where there are none.
  void advanced(Sequence& sequence, std::uint32_t start) {
    if (sequence.blocks.size() * block_size_ < sequence.scheduled) grow(sequence);
    if (start < sequence.shareable_blocks * block_size_) fill(sequence, start);  // none that decodes
  }
  // Its first `positions` positions have been computed: others can find those blocks of them whose tokens are known.
  void computed(Sequence& sequence, std::uint32_t positions) {
    const std::uint32_t known = std::min(positions, static_cast<std::uint32_t>(sequence.tokens.size()));
    if (pool_.keeps_prefixes() && known >= (sequence.published_blocks + 1) * block_size_) publish(sequence, known);
  }
  // The model failed in a plan that has positions from `start` on: nobody is to find them.
  void retract(Sequence& sequence, std::uint32_t start);
  // Goes back to before what was retracted of the blocks that it shares.
  void rewind(Sequence& sequence);
  void release(Sequence& sequence);

 private:
  struct Block {
    const Sequence* filler = nullptr;  // who computes it
    bool filled = false;               // all its positions are in plans
  };

  std::uint32_t blocks_for(std::uint64_t positions) const {
    return static_cast<std::uint32_t>((positions + block_size_ - 1) / block_size_);
  }
  Block& state(std::int32_t block) { return states_[static_cast<std::size_t>(block)]; }
  const Block& state(std::int32_t block) const { return states_[static_cast<std::size_t>(block)]; }
  void grow(Sequence& sequence);
  void fill(Sequence& sequence, std::uint32_t start);
  void publish(Sequence& sequence, std::uint32_t positions);
  std::uint32_t find_shared(Sequence& sequence);
  void extend_hashes(Sequence& sequence, std::uint32_t blocks);

  BlockPool& pool_;
  std::uint32_t block_size_;
  SipKey key_;
  std::vector<Block> states_;        // by block
  std::vector<std::int32_t> found_;  // of the last look at a prefix
  std::vector<std::byte> hashed_;    // a block's hash input
};

}  // namespace rts
