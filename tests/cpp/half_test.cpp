#include "rts/half.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace rts {
namespace {

// What the bits say.
double value_of(std::uint32_t half) {
  const double sign = (half & 0x8000U) != 0 ? -1 : 1;
  const int exponent = static_cast<int>(half >> 10 & 31), fraction = static_cast<int>(half & 0x3FF);
  if (exponent == 31) return fraction == 0 ? sign * HUGE_VAL : std::numeric_limits<double>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

TEST(Half, EveryOneIsTheFloatThatItStandsForAndBack) {
  for (std::uint32_t half = 0; half < 0x10000; ++half) {
    const float value = from_half(static_cast<std::uint16_t>(half));
    if (std::isnan(value_of(half))) {
      ASSERT_TRUE(std::isnan(value));
      ASSERT_TRUE(std::isnan(from_half(to_half(value))));
      continue;
    }
    ASSERT_EQ(value, value_of(half));
    ASSERT_EQ(std::signbit(value), half >= 0x8000);
    ASSERT_EQ(to_half(value), half);
  }
}

TEST(Half, RoundsToTheNearestAndTiesToEven) {
  for (std::uint32_t half = 0; half < 0x7C00; ++half) {
    // The float that is half way to the next; that after the largest would be 2^16.
    const double next = half + 1 == 0x7C00 ? 65536.0 : value_of(half + 1);
    const auto middle = static_cast<float>((value_of(half) + next) / 2);
    ASSERT_EQ(to_half(middle), half + half % 2);
    ASSERT_EQ(to_half(std::nextafter(middle, 0.0F)), half);
    ASSERT_EQ(to_half(std::nextafter(middle, HUGE_VALF)), half + 1);
    ASSERT_EQ(to_half(-middle), 0x8000 | (half + half % 2));
  }
}

TEST(Half, WhatIsTooLargeIsInfinityAndWhatIsTooSmallZero) {
  for (const float value : {65520.0F, 65536.0F, 1e10F, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(to_half(value), 0x7C00) << value;
    EXPECT_EQ(to_half(-value), 0xFC00) << value;
  }
  for (const float value : {0.0F, 1e-45F, 1e-30F, 2.9e-8F}) {
    EXPECT_EQ(to_half(value), 0) << value;
    EXPECT_EQ(to_half(-value), 0x8000) << value;
  }
}

}  // namespace
}  // namespace rts
