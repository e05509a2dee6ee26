#include "rts/philox.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <set>

namespace rts {
namespace {

using Words = std::array<std::uint32_t, 4>;

// The known answers of Philox4x32-10 that come with Random123.
TEST(Philox, GivesTheKnownAnswers) {
  EXPECT_EQ(philox(0, {0, 0, 0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr std::uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(philox(0xffffffffffffffff, {kOnes, kOnes, kOnes, kOnes}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox(0x299f31d0a4093822, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, IsAConstantExpression) {
  static_assert(philox(0, {0, 0, 0, 0})[0] == 0x6627e8d5);
  static_assert(uniform(1, 2) >= 0.0);
}

TEST(Uniform, IsTheFirstFiftyThreeBits) {
  EXPECT_EQ(uniform(0, 0), static_cast<double>(0x6627e8d5e169c58d >> 11) * 0x1p-53);
}

TEST(Uniform, EverySeedAndPositionDrawsItsOwn) {
  std::set<double> seen;
  for (const std::uint64_t base : {std::uint64_t{0}, std::uint64_t{1} << 32, ~std::uint64_t{0} - 31}) {
    for (std::uint64_t i = 0; i < 32; ++i) {
      for (std::uint64_t j = 0; j < 32; ++j) seen.insert(uniform(base + i, base + j));
    }
  }
  EXPECT_EQ(seen.size(), 3U * 32 * 32);
}

TEST(Uniform, IsEvenOverTheUnitInterval) {
  constexpr int kBins = 64, kDraws = 64000;
  std::array<int, kBins> bins{};
  for (std::uint64_t position = 0; position < kDraws; ++position) {
    const double u = uniform(42, position);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    ++bins[static_cast<std::size_t>(u * kBins)];
  }
  double chi_square = 0;
  for (const int count : bins) chi_square += (count - 1000.0) * (count - 1000.0) / 1000.0;
  EXPECT_LT(chi_square, 103.4);  // 63 degrees of freedom, p = 0.001
  EXPECT_GT(chi_square, 34.6);   // and as little too even
}

}  // namespace
}  // namespace rts
