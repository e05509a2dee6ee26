#pragma once

#include <bit>
#include <cstdint>

// IEEE half precision where a processor has no instruction for it. Both are free of branches, so that compilers make
// vectors of loops over them, and right in threads that flush binary32 denormals to zero: neither makes one.
namespace rts {

// `value` where a < b, else 0, for a and b below 2^31. gcc 12 makes a branch of a conditional, and no vector code.
inline std::uint32_t if_less(std::uint32_t a, std::uint32_t b, std::uint32_t value) noexcept {
  return value & static_cast<std::uint32_t>(static_cast<std::int32_t>(a - b) >> 31);
}

// A denormal gets the least exponent and so a leading one, which is then subtracted; all others subtract 0.
inline float from_half(std::uint16_t half) noexcept {
  constexpr std::uint32_t kInfinity = 31U << 23;  // binary16's exponents, where binary32 has its own
  constexpr std::uint32_t kNormal = 1U << 23;     // what is less is a denormal
  constexpr std::uint32_t kRebias = (127U - 15U) << 23;
  const std::uint32_t sign = (half & 0x8000U) << 16;
  const std::uint32_t magnitude = (half & 0x7FFFU) << 13;
  const std::uint32_t minuend = magnitude + kRebias + if_less(magnitude, kNormal, kNormal);
  const std::uint32_t subtrahend = if_less(magnitude, kNormal, kRebias + kNormal);
  const float finite = std::bit_cast<float>(minuend) - std::bit_cast<float>(subtrahend);
  const std::uint32_t to_infinity = if_less(kInfinity - 1, magnitude, kRebias);
  return std::bit_cast<float>(sign | (std::bit_cast<std::uint32_t>(finite) + to_infinity));
}

// To the nearest, ties to even; what is too large becomes infinity.
inline std::uint16_t to_half(float value) noexcept {
  constexpr std::uint32_t kNormal = (127U - 14U) << 23, kTooLarge = (127U + 16U) << 23, kInfinity = 255U << 23;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000U, magnitude = bits & 0x7FFFFFFFU;
  const std::uint32_t is_denormal = 0U - static_cast<std::uint32_t>(magnitude < kNormal);
  const std::uint32_t is_too_large = 0U - static_cast<std::uint32_t>(magnitude >= kTooLarge);
  const std::uint32_t is_nan = 0U - static_cast<std::uint32_t>(magnitude > kInfinity);
  // 0.5 has its last bit where half precision's denormals have theirs: the sum's rounding is theirs.
  const std::uint32_t denormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude & is_denormal) + 0.5F) -
                                 std::bit_cast<std::uint32_t>(0.5F);
  const std::uint32_t is_odd = magnitude >> 13 & 1U;
  const std::uint32_t normal = (magnitude - ((127U - 15U) << 23) + 0xFFFU + is_odd) >> 13;
  const std::uint32_t special = 0x7C00U | (is_nan & 0x200U);
  const std::uint32_t finite = (denormal & is_denormal) | (normal & ~is_denormal);
  return static_cast<std::uint16_t>(sign | (special & is_too_large) | (finite & ~is_too_large));
}

}  // namespace rts
