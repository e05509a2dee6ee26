#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/anonymous_memory.hpp"
#include "cpu/attention.hpp"
#include "cpu/decoder_spec.hpp"

namespace rts::cpu {

// The keys and values of all layers in half precision. Each KV head has arrays of its own, as if it were a layer with
// one, so that whoever computes its attention also writes its keys and values, and waits for nobody. Memory is taken as
// blocks are first used.
class KvCache {
 public:
  KvCache(const DecoderSpec& spec, std::size_t num_blocks)
      : kv_heads_(spec.kv_heads),
        head_numbers_(num_blocks * kBlockPositions * spec.head_dim),
        memory_(2 * spec.layers * kv_heads_ * head_numbers_ * sizeof(std::uint16_t)) {}

  static std::size_t block_bytes(const DecoderSpec& spec) {
    return 2 * spec.layers * spec.kv_heads * kBlockPositions * spec.head_dim * sizeof(std::uint16_t);
  }

  KvLayer of(std::size_t layer, std::size_t kv_head) const {
    std::uint16_t* const keys = memory_.as<std::uint16_t>() + 2 * (layer * kv_heads_ + kv_head) * head_numbers_;
    return {keys, keys + head_numbers_};
  }

 private:
  std::size_t kv_heads_;
  std::size_t head_numbers_;  // of a head's keys, and of its values
  AnonymousMemory memory_;
};

}  // namespace rts::cpu
