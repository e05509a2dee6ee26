#include "rts/step_cost.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>

namespace rts {
namespace {

// A machine whose steps take a constant, so much a sequence and so much a prompt's position, give or take.
struct Machine {
  double constant_ns = 6e6, sequence_ns = 0.3e6, position_ns = 0.1e6, noise = 0.0;
  std::mt19937_64 random{7};

  std::int64_t step(std::uint32_t decoding, std::uint32_t positions) {
    const double exact = constant_ns + sequence_ns * decoding + position_ns * positions;
    return static_cast<std::int64_t>(exact * (1 + noise * std::normal_distribution<>{}(random)));
  }
};

TEST(StepCost, UntilItKnowsNothingIsHeldBack) {
  StepCost cost;
  EXPECT_EQ(cost.prompt_positions_within(1, 4, 512), 512U);
}

TEST(StepCost, LearnsWhatStepsTake) {
  StepCost cost;
  Machine machine;
  std::mt19937_64 random(3);
  for (int i = 0; i < 200; ++i) {
    const auto decoding = static_cast<std::uint32_t>(random() % 32),
               positions = static_cast<std::uint32_t>(random() % 256);
    cost.observe(decoding, positions, machine.step(decoding, positions));
  }
  EXPECT_NEAR(cost.decode_ns(16), 6e6 + 16 * 0.3e6, 1e5);
  // (20 ms - 10.8 ms) / 0.1 ms
  EXPECT_NEAR(cost.prompt_positions_within(20'000'000, 16, 512), 92, 3);
  EXPECT_EQ(cost.prompt_positions_within(1'000'000, 16, 512), 0U);
  EXPECT_EQ(cost.prompt_positions_within(1'000'000'000, 16, 512), 512U);
}

// Prompts in every step, as on a server that is never idle, and ever more streams: what a step of streams alone takes
// is still known.
TEST(StepCost, FollowsTheLoadWhereEveryStepHasPrompts) {
  StepCost cost;
  Machine machine{.noise = 0.05};
  std::uint32_t positions = 64;
  for (int i = 0; i < 600; ++i) {
    const auto decoding = static_cast<std::uint32_t>(1 + i / 20);
    cost.observe(decoding, positions, machine.step(decoding, positions));
    const auto target = static_cast<std::int64_t>(1.8 * cost.decode_ns(decoding));
    positions = std::max(16U, cost.prompt_positions_within(target, decoding, 512));
  }
  const double alone = 6e6 + 30 * 0.3e6;
  EXPECT_NEAR(cost.decode_ns(30), alone, 0.2 * alone);
  EXPECT_NEAR(positions, 0.8 * alone / 0.1e6, 0.35 * 0.8 * alone / 0.1e6);
}

TEST(StepCost, FollowsAMachineThatGetsSlower) {
  StepCost cost;
  Machine machine;
  std::mt19937_64 random(3);
  for (int i = 0; i < 600; ++i) {
    if (i == 300) machine = {.constant_ns = 12e6, .sequence_ns = 0.6e6, .position_ns = 0.2e6};
    const auto decoding = static_cast<std::uint32_t>(random() % 32),
               positions = static_cast<std::uint32_t>(random() % 256);
    cost.observe(decoding, positions, machine.step(decoding, positions));
  }
  EXPECT_NEAR(cost.decode_ns(10), 18e6, 1e6);
}

TEST(StepCost, OneStepThatTookForeverChangesLittle) {
  StepCost cost;
  Machine machine;
  std::mt19937_64 random(3);
  for (int i = 0; i < 200; ++i) {
    const auto decoding = static_cast<std::uint32_t>(random() % 32),
               positions = static_cast<std::uint32_t>(random() % 256);
    cost.observe(decoding, positions, i == 150 ? 60'000'000'000 : machine.step(decoding, positions));
  }
  EXPECT_NEAR(cost.decode_ns(10), 9e6, 2e6);
}

// Nothing changes for a long time, then a prompt comes: the estimate of what was not seen must not have drifted away.
TEST(StepCost, IsStableWhereNothingChanges) {
  StepCost cost;
  Machine machine{.noise = 0.05};
  for (int i = 0; i < 50; ++i) cost.observe(8, i % 2 == 0 ? 100 : 0, machine.step(8, i % 2 == 0 ? 100 : 0));
  for (int i = 0; i < 100'000; ++i) cost.observe(8, 0, machine.step(8, 0));
  EXPECT_NEAR(cost.decode_ns(8), 8.4e6, 1e6);
  const std::uint32_t positions = cost.prompt_positions_within(16'800'000, 8, 512);
  EXPECT_GT(positions, 40U);
  EXPECT_LT(positions, 170U);
}

// Streams alone for hours, and then prompts that take ten times as long as they did (a longer context, another load):
// that must be seen within a few of them, for until then they hold up all streams.
TEST(StepCost, LearnsAnewWhatPromptsTake) {
  StepCost cost;
  Machine machine{.noise = 0.05};
  std::mt19937_64 random(3);
  for (int i = 0; i < 50; ++i) cost.observe(8, i % 2 == 0 ? 100 : 0, machine.step(8, i % 2 == 0 ? 100 : 0));
  for (int i = 0; i < 20'000; ++i) {
    const auto decoding = static_cast<std::uint32_t>(1 + random() % 8);
    cost.observe(decoding, 0, machine.step(decoding, 0));
  }
  machine.position_ns *= 10;
  std::uint32_t positions = 0;
  for (int i = 0; i < 8; ++i) {
    positions = std::max(4U, cost.prompt_positions_within(16'800'000, 8, 512));
    cost.observe(8, positions, machine.step(8, positions));
  }
  // (16.8 ms - 8.4 ms) / 1 ms
  EXPECT_NEAR(positions, 8, 4);
}

// What a prompt's position costs is not told by steps without one, however they vary.
TEST(StepCost, StepsWithoutPromptsTellNothingOfThem) {
  StepCost cost;
  Machine machine{.noise = 0.05};
  std::mt19937_64 random(3);
  const auto within_8_ms = [&] {
    return cost.prompt_positions_within(static_cast<std::int64_t>(cost.decode_ns(8)) + 8'000'000, 8, 512);
  };
  for (int i = 0; i < 50; ++i) cost.observe(8, i % 2 == 0 ? 100 : 0, machine.step(8, i % 2 == 0 ? 100 : 0));
  const std::uint32_t before = within_8_ms();
  for (int i = 0; i < 5'000; ++i) {
    if (i % 100 == 0) machine.constant_ns = i % 200 == 0 ? 15e6 : 6e6;  // another program comes and goes
    const auto decoding = static_cast<std::uint32_t>(1 + random() % 8);
    cost.observe(decoding, 0, machine.step(decoding, 0));
  }
  EXPECT_NEAR(before, 80, 10);
  EXPECT_NEAR(within_8_ms(), before, 1);
}

}  // namespace
}  // namespace rts
