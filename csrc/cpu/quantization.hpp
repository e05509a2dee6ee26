#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "cpu/packed_matrix.hpp"

// All of internal linkage: the linker must not choose one instruction set's copy for another.
namespace rts::cpu {

// The Walsh-Hadamard transform of kRotation neighbours, not normalised: out[i] = Σ (-1)^popcount(i & j) in[j]. Halves
// that are interleaved four times are back in order, and compilers make vectors of it. The kernels of every instruction
// set add in this order, so they agree to the bit.
template <typename Number>
static inline void rotate(Number* values) noexcept {
  constexpr std::size_t kHalf = kRotation / 2;
  for (int stage = 0; stage < std::countr_zero(kRotation); ++stage) {
    Number turned[kRotation];
    for (std::size_t i = 0; i < kHalf; ++i) {
      turned[2 * i] = static_cast<Number>(values[i] + values[i + kHalf]);
      turned[2 * i + 1] = static_cast<Number>(values[i] - values[i + kHalf]);
    }
    for (std::size_t i = 0; i < kRotation; ++i) values[i] = turned[i];
  }
}

// What makes the transform orthonormal.
inline constexpr float kRotationNorm = 0.25F;

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
