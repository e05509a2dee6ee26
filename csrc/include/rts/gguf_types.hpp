#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace rts {

// The types that are decoded here, by their ids in a file.
enum class GgufTypeId : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

// How a tensor's values are stored: `block_values` neighbours of a row, as `block_bytes` bytes.
struct GgufTensorType {
  GgufTypeId id;          // also those that have no name above
  std::string_view name;  // as ggml spells it: "Q4_1"
  std::uint32_t block_values;
  std::uint32_t block_bytes;
  // Writes the values of `blocks` blocks, in any alignment, to `out`, bit for bit what ggml's reference gives; which
  // NaN a quantized block with a NaN scale gives is left open. nullptr: a known type that is not decoded here.
  void (*dequantize)(const std::byte* from, std::size_t blocks, float* out) noexcept;
};

// nullptr for an id that ggml does not use, or not any more. What it points to lives for ever.
const GgufTensorType* find_gguf_type(std::uint32_t id) noexcept;
// The names of those that are decoded here, for messages: "F32, F16, …".
std::string decoded_gguf_types();

}  // namespace rts
