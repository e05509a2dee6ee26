#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/attention.hpp"
#include "cpu/quantized_head.hpp"

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

// The same in 8 bits.
template <typename Vector>
void store_position(const AttentionShape& shape, const KvLayerInt8& cache, std::int64_t slot, const float* key,
                    const float* value) {
  constexpr std::size_t kPair = 2;
  constexpr std::uint32_t kBiases = 0x80808080;  // as signs are turned, 128 is added
  static_assert(kKeyBias == 0x80);
  const std::size_t block = static_cast<std::size_t>(slot) / kBlockPositions;
  const std::size_t offset = static_cast<std::size_t>(slot) % kBlockPositions;
  const std::size_t number_bytes = kBlockPositions * shape.head_dim;
  std::byte* record = cache.records + block * cache.block_stride;
  for (std::size_t head = 0; head < shape.kv_heads; ++head) {
    float turned[kMaxHeadDim];
    std::int8_t numbers[kMaxHeadDim];
    turn_head<Vector>(key, shape.head_dim, turned);
    float* const scales = reinterpret_cast<float*>(record + 2 * number_bytes) + offset;
    scales[0] = quantize_head<Vector>(turned, shape.head_dim, numbers);
    for (std::size_t i = 0; i < shape.head_dim; i += kQuad) {
      std::uint32_t quad;
      std::memcpy(&quad, numbers + i, sizeof quad);
      quad ^= kBiases;
      std::memcpy(record + i * kBlockPositions + offset * kQuad, &quad, sizeof quad);
    }
    scales[kBlockPositions] = quantize_head<Vector>(value, shape.head_dim, numbers);
    std::byte* const values = record + number_bytes + offset / kPair * kPair * shape.head_dim + offset % kPair;
    for (std::size_t i = 0; i < shape.head_dim; ++i) values[i * kPair] = static_cast<std::byte>(numbers[i]);
    key += shape.head_dim;
    value += shape.head_dim;
    record += kv_record_bytes(shape.head_dim);
  }
}

}  // namespace rts::cpu
