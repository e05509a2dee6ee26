#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "cpu/kernels.hpp"

namespace rts::cpu {
namespace {

constexpr float kGuard = 12345.0F;
constexpr float kEpsilon = 1e-5F;
constexpr std::size_t kGuards = 32;

// Every length modulo the sixteen lanes and the four sums, and models' own.
std::vector<std::size_t> sizes() {
  std::vector<std::size_t> sizes;
  for (std::size_t size = 1; size <= 130; ++size) sizes.push_back(size);
  sizes.insert(sizes.end(), {576, 768, 960, 2048, 4100});
  return sizes;
}

// Guards behind the row's end, which none of the functions may read into its result or write.
std::vector<float> row_of(std::size_t size, std::uint32_t seed, float mean = 0.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, 2.0F);
  std::vector<float> row(size + kGuards, kGuard);
  for (std::size_t i = 0; i < size; ++i) row[i] = normal(random);
  return row;
}

void expect_row(const std::vector<float>& found, const std::vector<double>& expected, double tolerance) {
  ASSERT_EQ(found.size(), expected.size() + kGuards);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    ASSERT_NEAR(found[i], expected[i], tolerance * (1.0 + std::abs(expected[i]))) << "element " << i;
  }
  for (std::size_t i = expected.size(); i < found.size(); ++i) ASSERT_EQ(found[i], kGuard) << "guard " << i;
}

class VectorOpsTest : public testing::TestWithParam<std::size_t> {};

TEST_P(VectorOpsTest, RmsNormDividesByTheRootOfTheMeanSquare) {
  const std::size_t size = GetParam();
  const std::vector<float> x = row_of(size, 1), weight = row_of(size, 2);
  double squares = 0;
  for (std::size_t i = 0; i < size; ++i) squares += double{x[i]} * x[i];
  std::vector<double> expected;
  for (std::size_t i = 0; i < size; ++i) {
    expected.push_back(x[i] / std::sqrt(squares / static_cast<double>(size) + kEpsilon) * weight[i]);
  }
  for (const Kernels* const kernels : available_kernels()) {
    SCOPED_TRACE(kernels->name);
    std::vector<float> out(size + kGuards, kGuard), in_place = x;
    kernels->rms_norm(x.data(), weight.data(), size, kEpsilon, out.data());
    expect_row(out, expected, 1e-6);
    kernels->rms_norm(in_place.data(), weight.data(), size, kEpsilon, in_place.data());
    EXPECT_EQ(in_place, out);
  }
}

TEST_P(VectorOpsTest, LayerNormCentresAndDividesByTheDeviation) {
  const std::size_t size = GetParam();
  const std::vector<float> x = row_of(size, 3, 5.0F), weight = row_of(size, 4), bias = row_of(size, 5);
  double mean = 0, variance = 0;
  for (std::size_t i = 0; i < size; ++i) mean += x[i] / static_cast<double>(size);
  for (std::size_t i = 0; i < size; ++i) variance += (x[i] - mean) * (x[i] - mean) / static_cast<double>(size);
  std::vector<double> expected;
  for (std::size_t i = 0; i < size; ++i) {
    expected.push_back((x[i] - mean) / std::sqrt(variance + kEpsilon) * weight[i] + bias[i]);
  }
  for (const Kernels* const kernels : available_kernels()) {
    SCOPED_TRACE(kernels->name);
    std::vector<float> out(size + kGuards, kGuard), in_place = x;
    kernels->layer_norm(x.data(), weight.data(), bias.data(), size, kEpsilon, out.data());
    expect_row(out, expected, 1e-5);
    kernels->layer_norm(in_place.data(), weight.data(), bias.data(), size, kEpsilon, in_place.data());
    EXPECT_EQ(in_place, out);
  }
}

TEST_P(VectorOpsTest, PositionsTurnThePairsAHalfApart) {
  const std::size_t half = GetParam();
  const std::vector<float> x = row_of(2 * half, 6), angles = row_of(half, 7);
  std::vector<float> cosines(half), sines(half);
  std::vector<double> expected(2 * half);
  for (std::size_t i = 0; i < half; ++i) {
    cosines[i] = std::cos(angles[i]);
    sines[i] = std::sin(angles[i]);
    expected[i] = double{x[i]} * cosines[i] - double{x[half + i]} * sines[i];
    expected[half + i] = double{x[half + i]} * cosines[i] + double{x[i]} * sines[i];
  }
  for (const Kernels* const kernels : available_kernels()) {
    SCOPED_TRACE(kernels->name);
    std::vector<float> turned = x;
    kernels->rotate_positions(turned.data(), 2 * half, cosines.data(), sines.data());
    expect_row(turned, expected, 1e-6);
  }
}

TEST_P(VectorOpsTest, AddAdds) {
  const std::size_t size = GetParam();
  const std::vector<float> x = row_of(size, 8), y = row_of(size, 9);
  std::vector<float> expected = x;
  for (std::size_t i = 0; i < size; ++i) expected[i] += y[i];
  for (const Kernels* const kernels : available_kernels()) {
    std::vector<float> sum = x;
    kernels->add(sum.data(), y.data(), size);
    EXPECT_EQ(sum, expected) << kernels->name;
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, VectorOpsTest, testing::ValuesIn(sizes()));

}  // namespace
}  // namespace rts::cpu
