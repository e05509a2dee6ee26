#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/anonymous_memory.hpp"
#include "cpu/attention.hpp"

namespace rts::cpu {

// The keys and values of all layers. Each KV head's are apart, as if it were a layer with one, so that whoever computes
// its attention also writes its keys and values, and waits for nobody. All that belongs to a block lies together, so
// that memory is taken as blocks are first used, even in huge pages; without those, each two blocks of a head would
// want an entry of the processor's address cache.
template <typename Number>
class KvCacheOf {
 public:
  KvCacheOf(std::size_t layers, std::size_t kv_heads, std::size_t head_dim, std::size_t num_blocks)
      : kv_heads_(kv_heads),
        head_numbers_(kBlockPositions * head_dim),
        block_numbers_(block_bytes(layers, kv_heads, head_dim) / sizeof(Number)),
        memory_(num_blocks * block_bytes(layers, kv_heads, head_dim), true) {}

  static std::size_t block_bytes(std::size_t layers, std::size_t kv_heads, std::size_t head_dim) {
    return 2 * layers * kv_heads * kBlockPositions * head_dim * sizeof(Number);
  }

  KvLayerOf<Number> of(std::size_t layer, std::size_t kv_head) const {
    Number* const keys = memory_.as<Number>() + 2 * (layer * kv_heads_ + kv_head) * head_numbers_;
    return {keys, keys + head_numbers_, block_numbers_};
  }

 private:
  std::size_t kv_heads_;
  std::size_t head_numbers_;  // of a head's keys in a block, and of its values
  std::size_t block_numbers_;
  AnonymousMemory memory_;
};

using KvCache = KvCacheOf<std::uint16_t>;  // IEEE half precision
using KvCacheFloat = KvCacheOf<float>;

// The same in 8 bits.
class KvCacheInt8 {
 public:
  KvCacheInt8(std::size_t layers, std::size_t kv_heads, std::size_t head_dim, std::size_t num_blocks)
      : kv_heads_(kv_heads),
        record_bytes_(kv_record_bytes(head_dim)),
        block_bytes_(block_bytes(layers, kv_heads, head_dim)),
        memory_(num_blocks * block_bytes_, true) {}

  static std::size_t block_bytes(std::size_t layers, std::size_t kv_heads, std::size_t head_dim) {
    return layers * kv_heads * kv_record_bytes(head_dim);
  }

  KvLayerInt8 of(std::size_t layer, std::size_t kv_head) const {
    return {memory_.as<std::byte>() + (layer * kv_heads_ + kv_head) * record_bytes_, block_bytes_};
  }

 private:
  std::size_t kv_heads_;
  std::size_t record_bytes_;
  std::size_t block_bytes_;
  AnonymousMemory memory_;
};

}  // namespace rts::cpu
