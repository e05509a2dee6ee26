#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/attention.hpp"

namespace rts::cpu {

// Writes a position's keys and values, each [kv_heads][head_dim], to a slot: a block's number times kBlockPositions,
// and the position's place in the block.
template <typename Vector, typename Number>
void store_position(const AttentionShape& shape, const KvLayerOf<Number>& cache, std::int64_t slot, const float* key,
                    const float* value) {
  constexpr std::size_t kEight = 8;
  const std::size_t block = static_cast<std::size_t>(slot) / kBlockPositions;
  const std::size_t offset = static_cast<std::size_t>(slot) % kBlockPositions;
  for (std::size_t head = 0; head < shape.kv_heads; ++head, key += shape.head_dim, value += shape.head_dim) {
    const std::size_t begin = block * cache.block_stride + head * kBlockPositions * shape.head_dim;
    Number* const keys = cache.keys + begin + offset;
    Number* const values = cache.values + begin + offset * shape.head_dim;
    Number column[Vector::kLanes];
    std::size_t i = 0;
    for (; i + Vector::kLanes <= shape.head_dim; i += Vector::kLanes) {
      Vector::load(value + i).store(values + i);
      Vector::load(key + i).store(column);
      for (std::size_t lane = 0; lane < Vector::kLanes; ++lane) keys[(i + lane) * kBlockPositions] = column[lane];
    }
    if (i < shape.head_dim) {
      Vector::load_eight(value + i).store_eight(values + i);
      Vector::load_eight(key + i).store_eight(column);
      for (std::size_t lane = 0; lane < kEight; ++lane) keys[(i + lane) * kBlockPositions] = column[lane];
    }
  }
}

}  // namespace rts::cpu
