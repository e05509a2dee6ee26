#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "activations.hpp"
#include "cpu/kernels.hpp"
#include "stored_matrix.hpp"

namespace rts::cpu {
namespace {

using testing::Activations;
using testing::random_rows;

class EachQuantize : public ::testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& kernels() const { return *GetParam(); }
};
std::string name_of(const ::testing::TestParamInfo<const Kernels*>& info) {
  return std::string(info.param->name);
}
INSTANTIATE_TEST_SUITE_P(All, EachQuantize, ::testing::ValuesIn(available_kernels().begin(), available_kernels().end()),
                         name_of);

TEST_P(EachQuantize, GivesTheNearestToTheRotatedValues) {
  for (const std::size_t columns : {576U, 1536U, 40U, 16U, 1U}) {
    constexpr std::size_t kRows = 5, kPadding = 3;
    const std::vector<float> values = random_rows(kRows, columns + kPadding);
    Activations activations(kRows, columns);
    activations.quantize(kernels(), values, columns + kPadding);
    const QuantizedRows& rows = activations.rows();
    for (std::size_t row = 0; row < kRows; ++row) {
      const std::span<const float> from(values.data() + row * (columns + kPadding), columns);
      const std::vector<double> rotated = testing::rotated(from);
      for (std::size_t group = 0; group < rows.groups(); ++group) {
        const std::size_t at = row * rows.groups() + group;
        double largest = 0, sum = 0, magnitudes = 0;
        for (std::size_t i = group * kGroup; i < (group + 1) * kGroup; ++i) {
          largest = std::max(largest, std::fabs(rotated[i]));
          if (i >= columns) continue;
          sum += from[i];
          magnitudes += std::fabs(from[i]);
        }
        ASSERT_NEAR(rows.scales[at], largest / 127 / 8, 1e-7 * largest);
        ASSERT_NEAR(rows.sums[at], sum, 1e-6 * magnitudes);
        int total = 0;
        for (std::size_t i = 0; i < kGroup; ++i) {
          const int value = rows.values[at * kGroup + i];
          total += value;
          ASSERT_LE(std::abs(value), 127);
          ASSERT_NEAR(value * double{rows.scales[at]}, rotated[group * kGroup + i] / 8, 0.5001 * rows.scales[at]);
        }
        ASSERT_EQ(rows.corrections[at], -128 * total);
      }
    }
  }
}

TEST_P(EachQuantize, GivesWhatThePortableOneDoesToTheBit) {
  constexpr std::size_t kRows = 20, kColumns = 1000;
  std::vector<float> values = random_rows(kRows, kColumns);
  std::fill_n(values.begin() + 2 * kColumns, 64, 0.0F);
  std::fill_n(values.begin() + 2 * kColumns + 64, 32, 1e-40F);
  std::fill_n(values.begin() + 2 * kColumns + 96, 32, -3e37F);
  Activations activations(kRows, kColumns), expected(kRows, kColumns);
  activations.quantize(kernels(), values, kColumns);
  expected.quantize(*available_kernels().back(), values, kColumns);
  const std::size_t groups = kRows * activations.rows().groups();
  const auto same = [&](const auto* a, const auto* b, std::size_t count) {
    return std::memcmp(a, b, count * sizeof *a) == 0;
  };
  EXPECT_TRUE(same(activations.rows().values, expected.rows().values, groups * kGroup));
  EXPECT_TRUE(same(activations.rows().scales, expected.rows().scales, groups));
  EXPECT_TRUE(same(activations.rows().corrections, expected.rows().corrections, groups));
  EXPECT_TRUE(same(activations.rows().sums, expected.rows().sums, groups));
}

TEST_P(EachQuantize, WritesARowAtAnyPlace) {
  constexpr std::size_t kColumns = 96;
  const std::vector<float> values = random_rows(4, kColumns);
  Activations all(4, kColumns), single(4, kColumns);
  all.quantize(kernels(), values, kColumns);
  for (std::size_t row = 0; row < 4; ++row) {
    single.quantize(kernels(), {values.begin() + row * kColumns, values.begin() + (row + 1) * kColumns}, kColumns, row);
  }
  EXPECT_EQ(std::memcmp(all.rows().values, single.rows().values, 4 * kColumns), 0);
  EXPECT_EQ(std::memcmp(all.rows().scales, single.rows().scales, 4 * 3 * sizeof(float)), 0);
}

TEST_P(EachQuantize, ARowThatIsNotFiniteGetsANaNScale) {
  constexpr std::size_t kRows = 4, kColumns = 104;
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity(), 3e38F}) {
    std::vector<float> values(kRows * kColumns, 3e37F);  // whose transform overflows where there is one of 3e38
    for (std::size_t i = 0; i < values.size(); i += 2) values[i] = 1.0F;
    values[2 * kColumns + 98] = values[2 * kColumns + 102] = value;
    Activations activations(kRows, kColumns);
    activations.quantize(kernels(), values, kColumns);
    const std::size_t groups = activations.rows().groups();
    for (std::size_t i = 0; i < kRows * groups; ++i) {
      EXPECT_EQ(std::isnan(activations.rows().scales[i]), i == 2 * groups + 3) << value << " " << i;
    }
  }
}

}  // namespace
}  // namespace rts::cpu
