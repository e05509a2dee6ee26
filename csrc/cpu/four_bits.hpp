#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/packed_matrix.hpp"

namespace rts::cpu {

// A panel's group of 4-bit values as those of 8 bits are stored: rotated. Three dozen operations on vectors of bytes
// for 16 outputs, where a row's product has a dozen; in return half as much comes from memory. Static, so that each
// instruction set has its own: the vectors are as long as the longest, and compilers split them.
static inline void expand_four_bits(const std::byte* group, std::byte* out) noexcept {
  using Bytes [[gnu::vector_size(kLanes * kQuad)]] = std::uint8_t;
  constexpr std::size_t kQuads = kGroup / kQuad;
  // A sum of all 8 has 8 eights too many, and differences have none; what is added to the first is in each.
  constexpr std::uint8_t kOffset = 8, kOffsets = kRotation * kOffset;
  static_assert(kQuads == kRotation && kQuad == kRotationStride);
  for (std::size_t vector = 0; vector < kPanelOutputs / kLanes; ++vector) {
    Bytes quads[kQuads];
#pragma GCC unroll 4
    for (std::size_t i = 0; i < kQuads / 2; ++i) {
      Bytes pairs;
      std::memcpy(&pairs, group + (vector * kQuads / 2 + i) * sizeof pairs, sizeof pairs);
      quads[i] = pairs & 15;
      quads[i + kQuads / 2] = pairs >> 4;
    }
    quads[0] |= kBias;
#pragma GCC unroll 3
    for (std::size_t distance = kQuads / 2; distance > 0; distance /= 2) {
#pragma GCC unroll 8
      for (std::size_t i = 0; i < kQuads; ++i) {
        if ((i & distance) != 0) continue;
        const Bytes a = quads[i], b = quads[i + distance];
        quads[i] = a + b;
        quads[i + distance] = a - b;
      }
    }
    quads[0] -= kOffsets;
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kQuads; ++i) {
      std::memcpy(out + (i * kPanelOutputs / kLanes + vector) * sizeof(Bytes), &quads[i], sizeof(Bytes));
    }
  }
}

}  // namespace rts::cpu
