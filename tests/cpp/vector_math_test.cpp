#include "rts/vector_math.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace rts {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Every length modulo the sixteen lanes and find_first's stride of eight of them, and both sides of a weight block.
std::vector<std::size_t> lengths() {
  std::vector<std::size_t> lengths;
  for (std::size_t length = 1; length <= 160; ++length) lengths.push_back(length);
  for (std::size_t length = kWeightBlock - 17; length <= kWeightBlock + 17; ++length) lengths.push_back(length);
  lengths.push_back(3 * kWeightBlock);
  lengths.push_back(49152 + 7);
  return lengths;
}

std::vector<float> normal(std::size_t length, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> values(-2.0F, 4.0F);
  std::vector<float> row(length);
  for (float& value : row) value = values(random);
  return row;
}

struct Weights {
  std::vector<float> weights;
  std::vector<double> block_sums;
  double total = 0;
};

// Guards behind each output's end show whether anything is written there.
Weights weigh(const std::vector<float>& values, float shift, float scale) {
  constexpr float kGuard = 12345.0F;
  const std::size_t blocks = (values.size() + kWeightBlock - 1) / kWeightBlock;
  std::vector<float> weights(values.size() + 16, kGuard);
  std::vector<double> sums(blocks + 1, kGuard);
  Weights result;
  result.total = exp_weights(values, shift, scale, {weights.data(), values.size()}, {sums.data(), blocks});
  EXPECT_TRUE(std::all_of(weights.begin() + static_cast<std::ptrdiff_t>(values.size()), weights.end(),
                          [](float value) { return value == kGuard; }));
  EXPECT_EQ(sums.back(), kGuard);
  result.weights.assign(weights.begin(), weights.begin() + static_cast<std::ptrdiff_t>(values.size()));
  result.block_sums.assign(sums.begin(), sums.end() - 1);
  return result;
}

TEST(MaxOrNan, IsTheLargestAtEveryLengthAndPlace) {
  for (const std::size_t length : lengths()) {
    std::vector<float> row = normal(length, 1);
    ASSERT_EQ(max_or_nan(row), *std::max_element(row.begin(), row.end())) << length;
    for (const std::size_t at : {std::size_t{0}, length / 2, length - 1}) {
      const float before = row[at];
      row[at] = 1000.0F;
      ASSERT_EQ(max_or_nan(row), 1000.0F) << length << " at " << at;
      row[at] = before;
    }
  }
}

TEST(MaxOrNan, SeesOneNanOrInfinityWhereverItIs) {
  for (const std::size_t length : {1, 15, 16, 17, 100, 129}) {
    for (std::size_t at = 0; at < length; ++at) {
      for (const float bad : {kNan, -kNan, kInfinity}) {
        std::vector<float> row = normal(length, 2);
        row[at] = bad;
        ASSERT_TRUE(std::isnan(max_or_nan(row))) << bad << " at " << at << " of " << length;
      }
    }
  }
}

TEST(MaxOrNan, MinusInfinityIsAValueLikeOthers) {
  for (const std::size_t length : {1, 16, 17, 100}) {
    std::vector<float> row(length, -kInfinity);
    EXPECT_EQ(max_or_nan(row), -kInfinity);
    row.back() = -std::numeric_limits<float>::max();
    EXPECT_EQ(max_or_nan(row), -std::numeric_limits<float>::max());
  }
  EXPECT_EQ(max_or_nan({}), -kInfinity);
}

TEST(MaxOrNan, KeepsTheLargestFiniteAndTheDenormal) {
  std::vector<float> row(33, -1.0F);
  row[20] = std::numeric_limits<float>::denorm_min();
  EXPECT_EQ(max_or_nan(row), std::numeric_limits<float>::denorm_min());
  row[7] = std::numeric_limits<float>::max();
  EXPECT_EQ(max_or_nan(row), std::numeric_limits<float>::max());
}

TEST(FindFirst, IsWhereItStandsFirstAtEveryLength) {
  for (const std::size_t length : lengths()) {
    std::vector<float> row = normal(length, 3);
    ASSERT_EQ(find_first(row, 1000.0F), length);
    for (const std::size_t at : {length - 1, length / 2, std::size_t{0}}) {
      row[at] = 1000.0F;  // those behind it stay: the first is asked for
      ASSERT_EQ(find_first(row, 1000.0F), at) << length;
    }
  }
  for (std::size_t at = 0; at < 300; ++at) {
    std::vector<float> row(300, 0.0F);
    row[at] = 1.0F;
    row.back() = 1.0F;
    ASSERT_EQ(find_first(row, 1.0F), at);
  }
}

TEST(FindFirst, FindsWhatComparesEqual) {
  EXPECT_EQ(find_first(std::vector<float>{1.0F, -0.0F}, 0.0F), 1U);
  EXPECT_EQ(find_first(std::vector<float>{1.0F, -kInfinity}, -kInfinity), 1U);
  EXPECT_EQ(find_first(std::vector<float>(200, kNan), kNan), 200U);
  EXPECT_EQ(find_first({}, 0.0F), 0U);
}

TEST(CopyAllowed, RulesOutWhereABitIsMissing) {
  std::mt19937 random(8);
  for (const std::size_t length : lengths()) {
    const std::vector<float> row = normal(length, 7);
    std::vector<std::uint32_t> allowed((length + 31) / 32);
    for (std::uint32_t& word : allowed) word = static_cast<std::uint32_t>(random());
    std::vector<float> out(length);
    copy_allowed(row, allowed, out);
    for (std::size_t i = 0; i < length; ++i) {
      ASSERT_EQ(out[i], (allowed[i / 32] >> (i % 32) & 1) != 0 ? row[i] : -kInfinity) << i << " of " << length;
    }
  }
}

TEST(SumAbove, IsOfThoseThatAreAsLargeOrLarger) {
  for (const std::size_t length : lengths()) {
    std::vector<float> row = normal(length, 9);
    std::ranges::for_each(row, [](float& value) { value = std::abs(value); });
    for (const float least : {0.0F, row[length / 2], 1.0F, 100.0F}) {
      double exact = 0;
      for (const float value : row) exact += value >= least ? value : 0;
      ASSERT_NEAR(sum_above(row, least), exact, 5e-6 * exact) << length << " above " << least;
    }
  }
}

TEST(FindAbove, IsWhereTheyAreInOrder) {
  for (const std::size_t length : lengths()) {
    std::vector<float> row = normal(length, 10);
    std::vector<std::int32_t> found(length);
    for (const float least : {-kInfinity, row[length / 2], 1.0F, 100.0F}) {
      std::vector<std::int32_t> expected;
      for (std::size_t i = 0; i < length; ++i) {
        if (row[i] >= least) expected.push_back(static_cast<std::int32_t>(i));
      }
      const std::size_t count = find_above(row, least, found);
      ASSERT_EQ(std::vector(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(count)), expected)
          << length << " above " << least;
    }
  }
}

// In steps of every 97th float of (-87, 0], which takes in every binade and every reduced argument's neighbourhood.
TEST(ExpWeights, RelativeErrorIsUnderTheBoundOverTheWholeRange) {
  std::vector<float> row;
  double worst = 0;
  float worst_at = 0;
  const auto check = [&] {
    const Weights result = weigh(row, 0.0F, 1.0F);
    for (std::size_t i = 0; i < row.size(); ++i) {
      const double exact = std::exp(static_cast<double>(row[i]));
      const double error = std::abs(result.weights[i] - exact) / exact;
      if (error > worst) worst = error, worst_at = row[i];
    }
    row.clear();
  };
  const auto last = std::bit_cast<std::uint32_t>(-87.0F);
  for (std::uint32_t bits = std::bit_cast<std::uint32_t>(-1e-30F); bits <= last; bits += 97) {
    row.push_back(std::bit_cast<float>(bits));
    if (row.size() == 1 << 16) check();
  }
  row.push_back(-87.0F);
  row.push_back(0.0F);
  check();
  RecordProperty("worst_relative_error", std::to_string(worst));
  EXPECT_LT(worst, 2e-7) << "at " << worst_at;
}

TEST(ExpWeights, OfNothingIsOneAndFarBelowIsZero) {
  const std::vector<float> row{
      0.0F,   -0.0F,  -std::numeric_limits<float>::denorm_min(), std::nextafter(-87.0F, -88.0F),
      -88.0F, -1e30F, -std::numeric_limits<float>::max(),        -kInfinity};
  const Weights result = weigh(row, 0.0F, 1.0F);
  EXPECT_EQ(result.weights, (std::vector<float>{1, 1, 1, 0, 0, 0, 0, 0}));
  EXPECT_EQ(result.total, 3.0);
}

TEST(ExpWeights, ShiftAndScaleApplyInFloat) {
  const std::vector<float> row = normal(1000, 4);
  const float shift = max_or_nan(row);
  for (const float scale : {0.01F, 0.5F, 1.0F, 3.0F, 1e5F}) {
    const Weights result = weigh(row, shift, scale);
    for (std::size_t i = 0; i < row.size(); ++i) {
      const float exponent = (row[i] - shift) * scale;
      const double exact = exponent < -87.0F ? 0.0 : std::exp(static_cast<double>(exponent));
      ASSERT_NEAR(result.weights[i], exact, 2e-7 * exact) << scale << " at " << i;
    }
  }
}

// The order in which the lanes are added up is part of the result: all vector widths must agree on it to the bit.
TEST(ExpWeights, SumsAreThoseOfSixteenLanes) {
  for (const std::size_t length : lengths()) {
    const std::vector<float> row = normal(length, 5);
    const Weights result = weigh(row, max_or_nan(row), 0.7F);
    double total = 0;
    for (std::size_t block = 0; block < result.block_sums.size(); ++block) {
      float lanes[16] = {};
      const std::size_t end = std::min(length, (block + 1) * kWeightBlock);
      for (std::size_t i = block * kWeightBlock; i < end; ++i) lanes[i % 16] += result.weights[i];
      double sum = 0;
      for (const float lane : lanes) sum += lane;
      ASSERT_EQ(result.block_sums[block], sum) << length << ", block " << block;
      total += sum;
    }
    ASSERT_EQ(result.total, total) << length;
  }
}

TEST(ExpWeights, ARowsWeightsDoNotDependOnWhereTheyStand) {
  const std::vector<float> row = normal(kWeightBlock + 100, 6);
  const Weights whole = weigh(row, 20.0F, 1.0F);
  for (std::size_t i = 0; i < row.size(); ++i) {
    ASSERT_EQ(weigh({row[i]}, 20.0F, 1.0F).weights[0], whole.weights[i]) << i;
  }
}

// What any processor and any build gave, as a hash of every bit: a clone for other vectors, or a fused multiplication,
// would not give it.
TEST(ExpWeights, BitsAreTheSameOnEveryProcessor) {
  std::vector<float> row(3 * kWeightBlock + 5);
  for (std::size_t i = 0; i < row.size(); ++i) row[i] = static_cast<float>(i * 7919 % 9001) * -0.003F;
  const Weights result = weigh(row, 0.0F, 1.1F);
  std::uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&hash](std::uint64_t bits) { hash = (hash ^ bits) * 0x100000001b3; };
  for (const float weight : result.weights) add(std::bit_cast<std::uint32_t>(weight));
  for (const double sum : result.block_sums) add(std::bit_cast<std::uint64_t>(sum));
  add(std::bit_cast<std::uint64_t>(result.total));
  EXPECT_EQ(hash, 1899959294453077663U);
}

}  // namespace
}  // namespace rts
