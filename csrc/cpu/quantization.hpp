#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "cpu/packed_matrix.hpp"

// All of internal linkage: the linker must not choose one instruction set's copy for another.
namespace rts::cpu {

// Sums and differences of the values of a group that are kDistance apart.
template <std::size_t kDistance, typename Number>
static inline void butterflies(Number* group) noexcept {
  for (std::size_t first = 0; first < kGroup; first += 2 * kDistance) {
    for (std::size_t i = first; i < first + kDistance; ++i) {
      const Number a = group[i], b = group[i + kDistance];
      group[i] = a + b;
      group[i + kDistance] = a - b;
    }
  }
}

// The Walsh-Hadamard transform of each kRotation values of a group, kRotationStride apart; not normalised:
// out[kRotationStride i + k] = Σ over j of (-1)^popcount(i & j) in[kRotationStride j + k]. The kernels of every
// instruction set add in this order, so they agree to the bit.
template <typename Number>
static inline void rotate(Number* group) noexcept {
  butterflies<4 * kRotationStride>(group);
  butterflies<2 * kRotationStride>(group);
  butterflies<kRotationStride>(group);
}
static_assert(kRotation == 8);

// The nearest integer, ties to even, of what is less than 2^22. Unlike std::lrint it becomes vector code everywhere.
static inline std::int32_t nearest(float value) noexcept {
  constexpr float kRound = 12582912.0F;  // 1.5 × 2^23: its last bit is 1
  return std::bit_cast<std::int32_t>(value + kRound) - std::bit_cast<std::int32_t>(kRound);
}

// In the order of magnitudes: NaN is larger than infinity, which is larger than all others. Unlike the largest of
// floats, that of integers becomes vector code.
static inline std::int32_t magnitude_bits(float value) noexcept {
  return std::bit_cast<std::int32_t>(value) & 0x7FFFFFFF;
}

// 1 / x, or 0 where x is too small for that.
inline constexpr float kSmallestInverted = 0x1p-120F;
static inline float inverse_or_zero(float value) noexcept {
  return value >= kSmallestInverted ? 1.0F / value : 0.0F;
}

inline constexpr float kLargestValue = 127.0F;

}  // namespace rts::cpu
