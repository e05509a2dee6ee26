#include "cpu/packed_matrix.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "stored_matrix.hpp"

namespace rts::cpu {
namespace {

using testing::PackedWeights;
using testing::random_matrix;
using testing::StoredMatrix;
using testing::type_of;

constexpr GgufTypeId kFourBitTypes[] = {GgufTypeId::kQ4_0, GgufTypeId::kQ4_1, GgufTypeId::kQ4_K};
constexpr GgufTypeId kOtherTypes[] = {GgufTypeId::kF32,  GgufTypeId::kF16,  GgufTypeId::kBF16, GgufTypeId::kQ8_0,
                                      GgufTypeId::kQ5_0, GgufTypeId::kQ5_1, GgufTypeId::kQ2_K, GgufTypeId::kQ3_K,
                                      GgufTypeId::kQ5_K, GgufTypeId::kQ6_K};
constexpr double kHalfPrecision = 0x1p-11;  // the relative error of rounding to it

class EveryType : public ::testing::TestWithParam<GgufTypeId> {
 protected:
  // Of any type's blocks a whole number.
  static constexpr std::size_t kOutputs = 35, kInputs = 512;

  const GgufTensorType& type() const { return type_of(GetParam()); }
};
class FourBitType : public EveryType {};
class OtherType : public EveryType {};

std::string name_of(const ::testing::TestParamInfo<GgufTypeId>& info) {
  return std::string(type_of(info.param).name);
}
INSTANTIATE_TEST_SUITE_P(All, FourBitType, ::testing::ValuesIn(kFourBitTypes), name_of);
INSTANTIATE_TEST_SUITE_P(All, OtherType, ::testing::ValuesIn(kOtherTypes), name_of);

TEST_P(FourBitType, KeepsItsIntegers) {
  const StoredMatrix matrix = random_matrix(GetParam(), kOutputs, kInputs);
  const PackedWeights packed(matrix);
  EXPECT_TRUE(packs_exactly(type()));
  for (std::size_t output = 0; output < kOutputs; ++output) {
    const std::vector<float> row = matrix.row(output);
    for (std::size_t input = 0; input < kInputs; ++input) {
      // The transform is its own inverse, but for the factor.
      int turned_back = 0;
      const std::size_t first = input / kGroup * kGroup, own = input % kGroup;
      for (std::size_t i = own % kRotationStride; i < kGroup; i += kRotationStride) {
        const int value = packed.value(output, first + i);
        turned_back += testing::is_negative(own, i) ? -value : value;
      }
      ASSERT_EQ(turned_back % 8, 0);
      ASSERT_GE(turned_back / 8, -8);
      ASSERT_LE(turned_back / 8, 7);
      const double scaled = packed.scale(output, input / kGroup) * turned_back / 8;
      const double minimum = packed.minimum(output, input / kGroup);
      const double bound = packed.shape.has_minimums ? kHalfPrecision * (std::fabs(scaled) + std::fabs(minimum)) : 0;
      // float's own rounding of the stored value
      ASSERT_NEAR(scaled + minimum, row[input], bound + 1e-7 * std::fabs(row[input]));
    }
  }
}

TEST_P(OtherType, LiesWithinHalfAStep) {
  const StoredMatrix matrix = random_matrix(GetParam(), kOutputs, kInputs);
  const PackedWeights packed(matrix);
  EXPECT_FALSE(packs_exactly(type()));
  EXPECT_FALSE(packed.shape.has_minimums);
  for (std::size_t output = 0; output < kOutputs; ++output) {
    const std::vector<double> row = testing::rotated(matrix.row(output));
    for (std::size_t group = 0; group < kInputs / kGroup; ++group) {
      const double scale = packed.scale(output, group);
      double largest = 0;
      for (std::size_t i = 0; i < kGroup; ++i) largest = std::max(largest, std::fabs(row[group * kGroup + i]));
      ASSERT_NEAR(scale, largest / 127, 2 * kHalfPrecision * scale);
      for (std::size_t i = 0; i < kGroup; ++i) {
        ASSERT_NEAR(packed.value(output, group * kGroup + i) * scale, row[group * kGroup + i], 0.57 * scale);
        ASSERT_LE(std::abs(packed.value(output, group * kGroup + i)), 127);
      }
    }
  }
}

// The values as 4 bits have them, turned back.
std::vector<double> four_bits_of(const PackedWeights& packed, std::size_t output, std::size_t inputs) {
  std::vector<double> values(inputs);
  for (std::size_t input = 0; input < inputs; ++input) {
    int turned_back = 0;
    const std::size_t first = input / kGroup * kGroup, own = input % kGroup;
    for (std::size_t i = own % kRotationStride; i < kGroup; i += kRotationStride) {
      const int value = packed.value(output, first + i);
      turned_back += testing::is_negative(own, i) ? -value : value;
    }
    const std::size_t group = input / kGroup;
    values[input] = packed.scale(output, group) * turned_back / 8 + packed.minimum(output, group);
  }
  return values;
}

// A sixteenth of a group's range to each integer, and no worse than that on the whole.
TEST_P(OtherType, CanBeQuantizedToFourBits) {
  const StoredMatrix matrix = random_matrix(GetParam(), kOutputs, kInputs);
  const PackedWeights packed(matrix, 4);
  ASSERT_EQ(packed.shape.value_bits, 4U);
  ASSERT_TRUE(packed.shape.has_minimums);
  double all_squares = 0, all_evenly = 0;
  for (std::size_t output = 0; output < kOutputs; ++output) {
    const std::vector<float> row = matrix.row(output);
    const std::vector<double> values = four_bits_of(packed, output, kInputs);
    for (std::size_t first = 0; first < kInputs; first += kGroup) {
      const auto [least, most] = std::minmax_element(row.begin() + first, row.begin() + first + kGroup);
      const double range = double{*most} - double{*least}, step = range / 15;
      const double rounding = 4 * kHalfPrecision * (range + std::fabs(double{*least}) + std::fabs(double{*most}));
      double squares = 0, evenly = 0;
      for (std::size_t i = first; i < first + kGroup; ++i) {
        const double error = values[i] - double{row[i]}, from_least = (double{row[i]} - double{*least}) / step;
        ASSERT_LE(std::fabs(error), 1.5 * step + rounding);
        squares += error * error;
        if (step > 0) evenly += std::pow((from_least - std::nearbyint(from_least)) * step, 2);
      }
      ASSERT_LE(std::sqrt(squares), std::sqrt(evenly) + rounding * std::sqrt(double{kGroup}));
      all_squares += squares;
      all_evenly += evenly;
    }
  }
  if (GetParam() == GgufTypeId::kF32) {
    EXPECT_LT(all_squares, 0.95 * all_evenly);
  }
}

TEST(PackedMatrix, FourBitsOfWhatFitsThemAreExact) {
  StoredMatrix matrix = random_matrix(GgufTypeId::kF32, 3, 40);  // a group and a part of one
  for (std::size_t i = 0; i < 3 * 40; ++i) {
    const float value = -3.0F + 0.5F * static_cast<float>(i % 40 % kGroup * 15 % 16);
    std::memcpy(matrix.bytes.data() + i * sizeof value, &value, sizeof value);
  }
  const PackedWeights packed(matrix, 4);
  for (std::size_t output = 0; output < 3; ++output) {
    const std::vector<float> row = matrix.row(output);
    const std::vector<double> values = four_bits_of(packed, output, 40);
    for (std::size_t i = 0; i < 40; ++i) EXPECT_NEAR(values[i], row[i], 2e-3) << i;
  }
}

TEST(PackedMatrix, FourBitsOfOneNumberAreThatNumber) {
  StoredMatrix matrix = random_matrix(GgufTypeId::kF32, 1, 32);
  for (std::size_t i = 0; i < 32; ++i) {
    const float value = 0.25F;
    std::memcpy(matrix.bytes.data() + i * sizeof value, &value, sizeof value);
  }
  for (const double value : four_bits_of(PackedWeights(matrix, 4), 0, 32)) EXPECT_EQ(value, 0.25);
}

TEST(PackedMatrix, TheMultiplierKeepsScalesNormal) {
  for (const float largest : {1e-33F, 1e-20F, 3e-5F, 1.0F, 1000.0F, 65504.0F, 1e20F, 3e38F}) {
    const float multiplier = multiplier_for(largest);
    int exponent;
    EXPECT_EQ(std::frexp(multiplier, &exponent), 0.5F) << largest;
    EXPECT_LE(largest / multiplier, 0x1p15F) << largest;
    EXPECT_GE(largest / multiplier, 0x1p14F) << largest;
  }
  // Nothing smaller is a normal float.
  EXPECT_EQ(multiplier_for(1e-44F), std::numeric_limits<float>::min());
  EXPECT_EQ(multiplier_for(0.0F), 1.0F);
}

TEST(PackedMatrix, TinyAndLargeWeightsKeepTheirPrecision) {
  for (const float factor : {1e-30F, 1e-10F, 1e10F, 1e37F}) {
    StoredMatrix matrix = random_matrix(GgufTypeId::kF32, 32, 64);
    for (std::size_t i = 0; i < 32 * 64; ++i) {
      float value;
      std::memcpy(&value, matrix.bytes.data() + i * sizeof value, sizeof value);
      value *= factor;
      std::memcpy(matrix.bytes.data() + i * sizeof value, &value, sizeof value);
    }
    const PackedWeights packed(matrix);
    const std::vector<double> row = testing::rotated(matrix.row(5));
    for (std::size_t i = 0; i < 64; ++i) {
      const double scale = packed.scale(5, i / kGroup);
      EXPECT_NEAR(packed.value(5, i) * scale, row[i], 0.57 * scale) << factor;
      EXPECT_GT(scale, 0) << factor;
    }
  }
}

TEST(PackedMatrix, WhatIsPastTheEndIsZero) {
  const StoredMatrix matrix = random_matrix(GgufTypeId::kF16, 7, 40);
  const PackedWeights packed(matrix);
  EXPECT_EQ(packed.shape.groups(), 2U);
  EXPECT_EQ(packed.shape.panels(), 1U);
  EXPECT_EQ(packed.shape.bytes(), 2U * 32 * 34);
  for (std::size_t output = 0; output < kPanelOutputs; ++output) {
    for (std::size_t input = 0; input < 64; ++input) {
      // Inputs that are rotated together with others need not be zero.
      if (output >= 7) {
        EXPECT_EQ(packed.value(output, input), 0);
      }
    }
    EXPECT_EQ(packed.scale(output, 1) == 0, output >= 7);
  }
  const std::vector<double> row = testing::rotated(matrix.row(6));
  for (std::size_t i = 0; i < 64; ++i)
    EXPECT_NEAR(packed.value(6, i) * packed.scale(6, i / kGroup), row[i], 0.57 * packed.scale(6, i / kGroup));

  const PackedWeights with_minimums(random_matrix(GgufTypeId::kQ4_1, 7, 64));
  EXPECT_EQ(with_minimums.shape.bytes(), 2U * 32 * 20);
  for (std::size_t input = 0; input < 64; ++input) EXPECT_EQ(with_minimums.value(7, input), 0);
  EXPECT_EQ(with_minimums.minimum(7, 0), 0);
  EXPECT_EQ(with_minimums.scale(31, 1), 0);
}

TEST(PackedMatrix, APanelHasTheRowsInTheOrderAskedFor) {
  const StoredMatrix matrix = random_matrix(GgufTypeId::kQ8_0, 40, 32);
  const PackedWeights packed(matrix);
  const std::array<std::size_t, 3> numbers = {39, 2, 2};
  const MatrixShape shape{.outputs = 3, .inputs = 32, .has_minimums = false, .value_bits = 8};
  std::vector<std::byte> panel(shape.panel_bytes());
  std::vector<float> scratch(32);
  pack_panel(matrix.stored(), numbers, shape, packed.multiplier, scratch, panel.data());
  for (std::size_t output = 0; output < numbers.size(); ++output) {
    for (std::size_t input = 0; input < 32; ++input) {
      const int value = static_cast<int>(panel[input / 4 * 4 * kPanelOutputs + output * 4 + input % 4]) - 128;
      EXPECT_EQ(value, packed.value(numbers[output], input));
    }
  }
}

TEST(PackedMatrix, LargestScaleBoundsThoseOfTheRowsAskedFor) {
  const StoredMatrix matrix = random_matrix(GgufTypeId::kQ4_1, 40, 64);
  const PackedWeights packed(matrix);
  for (const std::size_t row : {std::size_t{0}, std::size_t{39}}) {
    double largest = 0;
    for (std::size_t group = 0; group < 2; ++group) {
      largest = std::max({largest, std::fabs(packed.scale(row, group)), std::fabs(packed.minimum(row, group))});
    }
    EXPECT_NEAR(largest_scale(matrix.stored(), {&row, 1}, 8), largest, 2 * kHalfPrecision * largest);
  }
}

TEST(PackedMatrix, WeightsThatAreNotFiniteAreTold) {
  const auto is_told = [](const StoredMatrix& matrix) {
    const std::size_t row = matrix.rows - 1;
    return std::isnan(largest_scale(matrix.stored(), {&row, 1}, 8));
  };
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -2e38F}) {
    StoredMatrix matrix = random_matrix(GgufTypeId::kF32, 2, 64);
    EXPECT_FALSE(is_told(matrix));
    std::memcpy(matrix.bytes.data() + matrix.bytes.size() - sizeof value, &value, sizeof value);
    EXPECT_TRUE(is_told(matrix)) << value;
  }
  for (const GgufTypeId id : {GgufTypeId::kQ4_0, GgufTypeId::kQ4_1, GgufTypeId::kQ4_K, GgufTypeId::kQ8_0}) {
    for (const std::size_t at : testing::halves_in(id)) {
      for (const std::uint16_t half : {std::uint16_t{0x7C00}, std::uint16_t{0xFC00}, std::uint16_t{0x7E00}}) {
        StoredMatrix matrix = random_matrix(id, 2, 256);
        EXPECT_FALSE(is_told(matrix));
        const std::size_t last_block = matrix.bytes.size() - matrix.type->block_bytes;
        std::memcpy(matrix.bytes.data() + last_block + at, &half, sizeof half);
        EXPECT_TRUE(is_told(matrix)) << matrix.type->name << " at " << at;
      }
    }
  }
}

}  // namespace
}  // namespace rts::cpu
