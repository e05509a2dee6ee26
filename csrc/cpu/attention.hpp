#pragma once

#include <cstddef>
#include <cstdint>

namespace rts::cpu {

inline constexpr std::size_t kBlockPositions = 16;  // of a KV block: the width of a vector of scores
inline constexpr std::size_t kMaxHeadDim = 256;

struct AttentionShape {
  std::size_t heads = 0;
  std::size_t kv_heads = 0;  // divides heads: neighbouring heads share one
  std::size_t head_dim = 0;  // a multiple of 8, at most kMaxHeadDim
  float scale = 0;           // of the products of queries and keys
  std::size_t window = 0;    // positions that a query sees, its own being the last; 0: all before it
};

// A layer's keys and values, block by block. A block's keys are [kv_heads][head_dim][kBlockPositions], so that a vector
// has a number of sixteen positions; its values are [kv_heads][kBlockPositions][head_dim]. It owns no memory.
template <typename Number>
struct KvLayerOf {
  Number* keys = nullptr;        // of the first block
  Number* values = nullptr;      // of the first block
  std::size_t block_stride = 0;  // numbers from a block's keys to the next one's, and from values to values
};
using KvLayer = KvLayerOf<std::uint16_t>;  // IEEE half precision
using KvLayerFloat = KvLayerOf<float>;

// The same in 8 bits: half the memory, and products of integers, which are exact. A block has a record for each KV
// head, kv_record_bytes() long:
//
//   keys: [head_dim / 4][kBlockPositions][4] bytes, each kKeyBias more than the number
//
//   values: [kBlockPositions / 2][head_dim][2] bytes
//
//   scales of the keys, then of the values: [kBlockPositions] floats each
//
// A scale is a head's largest magnitude / 127, and NaN where the head is not finite. Keys are turned by a Hadamard
// matrix before (as are queries, so that products stay as they are): some models have channels of keys that are ten
// times the others, which would take all of the scale.
struct KvLayerInt8 {
  std::byte* records = nullptr;  // of the first block
  std::size_t block_stride = 0;  // bytes from a block's records to the next one's
};
inline constexpr std::int32_t kKeyBias = 128;  // products want one side unsigned
static constexpr std::size_t kv_record_bytes(std::size_t head_dim) noexcept {
  return 2 * kBlockPositions * (head_dim + sizeof(float));
}

// Queries of one sequence, neighbours in position, with the heads that share one KV head.
//
// A query's result depends on its own context alone: positions are taken in segments of kSegment, counted from the
// sequence's first position, with a plain softmax over what the query sees of each, and the segments are merged in
// order. So it is the same to the bit whichever queries are beside it, and whatever lies where it does not look.
struct AttentionTask {
  const std::int32_t* block_table = nullptr;  // of the sequence
  std::size_t kv_head = 0;
  std::size_t first_position = 0;  // of the first query; its own key and value are stored already
  std::size_t queries = 0;
  const float* query = nullptr;  // [queries] rows, query_stride floats apart; a row is [heads][head_dim]
  std::size_t query_stride = 0;
  float* out = nullptr;  // the same of out_stride; only the heads of kv_head are written
  std::size_t out_stride = 0;
  float* scratch = nullptr;  // attention_scratch() floats, at a multiple of 64 bytes
};

inline constexpr std::size_t kSegment = 256;    // positions
inline constexpr std::size_t kMaxQueries = 16;  // of a task: more share a key that has been loaded
std::size_t attention_scratch(const AttentionShape& shape) noexcept;

}  // namespace rts::cpu
