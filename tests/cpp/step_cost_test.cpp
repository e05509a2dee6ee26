#include "rts/step_cost.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>

namespace rts {
namespace {

constexpr double kMs = 1e6;

// A machine whose steps take a constant, so much a sequence, and so much a prompt's position and each that it attends
// to, give or take.
struct Machine {
  double constant_ns = 6e6, sequence_ns = 0.3e6, position_ns = 0.1e6, pair_ns = 0.0, noise = 0.0;
  std::mt19937_64 random{7};

  double alone(std::uint32_t decoding) const { return constant_ns + sequence_ns * decoding; }
  std::int64_t step(std::uint32_t decoding, const PromptWork& prompts) {
    const double exact =
        alone(decoding) + position_ns * prompts.positions + pair_ns * static_cast<double>(prompts.pairs);
    return static_cast<std::int64_t>(exact * (1 + noise * std::normal_distribution<>{}(random)));
  }
};

// A machine, and what is learned of it.
struct Learner {
  StepCost cost{};
  Machine machine;
  std::mt19937_64 random{3};

  void step(std::uint32_t decoding, const PromptWork& prompts = {}) {
    cost.observe(decoding, prompts, machine.step(decoding, prompts));
  }
  void step_at_random() {
    step(static_cast<std::uint32_t>(random() % 32),
         {0, random() % 2 == 0 ? static_cast<std::uint32_t>(random() % 256) : 0});
  }
  // A prompt's chunk as a scheduler takes it, of what is within the time beside the streams.
  std::uint32_t read(std::uint32_t decoding, std::uint32_t start, double share) {
    if (cost.needs_decoding_alone()) {
      step(decoding);
      return 0;
    }
    const double ns = share * cost.decode_ns(decoding);
    const std::uint32_t most = std::min(512U, cost.most_beside_decoding());
    const std::uint32_t positions = std::max(1U, cost.positions_within(ns, start, most));
    step(decoding, {start, positions});
    return positions;
  }
};

TEST(PromptWork, CountsWhatEachPositionAttendsTo) {
  PromptWork work(0, 3);  // 1 + 2 + 3
  EXPECT_EQ(work.pairs, 6U);
  work += PromptWork(10, 2);  // 11 + 12
  EXPECT_EQ(work.positions, 5U);
  EXPECT_EQ(work.pairs, 29U);
}

TEST(StepCost, UntilItKnowsNothingIsHeldBack) {
  const StepCost cost;
  EXPECT_EQ(cost.positions_within(1, 0, 512), 512U);
  EXPECT_GE(cost.most_beside_decoding(), 512U);
  EXPECT_FALSE(cost.needs_decoding_alone());
}

// A short prompt that is read quicker than was foreseen tells nothing of what long contexts take.
TEST(StepCost, AQuickShortPromptLeavesWhatIsKnownOfLongOnes) {
  Learner learner;
  learner.machine = {.constant_ns = 20e6, .position_ns = 0.3e6, .pair_ns = 400};
  for (int i = 0; i < 50; ++i) learner.step(8);
  for (std::uint32_t start = 0; start < 2000; start += 40) learner.step(8, {start, 40});
  const PromptWork deep(1900, 32);
  const double before = learner.cost.prompts_ns(deep);
  for (int i = 0; i < 200; ++i) learner.step(8);
  learner.cost.observe(8, {0, 8}, learner.machine.step(8, {0, 8}) - 12'000'000);
  EXPECT_GT(learner.cost.prompts_ns(deep), before / 2);
  EXPECT_LT(learner.cost.positions_within(5e6, 1900, 512), 40U);
}

// However noisy the steps of seven and eight are, from which nothing can be told of a single one's.
TEST(StepCost, FewSequencesAreNeverThoughtToTakeLongerThanMany) {
  Learner learner;
  learner.machine.noise = 0.3;
  for (int i = 0; i < 2000; ++i) {
    learner.step(i % 3 == 0 ? 7 : 8);
    ASSERT_LE(learner.cost.decode_ns(1), learner.cost.decode_ns(8)) << i;
    ASSERT_GE(learner.cost.decode_ns(1), 0.0) << i;
  }
  EXPECT_NEAR(learner.cost.decode_ns(8) / learner.machine.alone(8), 1, 0.15);
}

TEST(StepCost, LearnsWhatStepsTake) {
  Learner learner{.machine = {.pair_ns = 400}};
  for (int i = 0; i < 200; ++i) learner.step_at_random();
  const StepCost& cost = learner.cost;
  EXPECT_NEAR(cost.decode_ns(16), 10.8 * kMs, 0.1 * kMs);
  EXPECT_NEAR(cost.prompts_ns({1000, 50}), 50 * 0.1 * kMs + (50'000 + 1'275) * 400.0, 0.5 * kMs);
  // 0.5 ms each at 1,000
  EXPECT_NEAR(cost.positions_within(10 * kMs, 1000, 512), 20, 1);
  EXPECT_NEAR(cost.positions_within(10 * kMs, 0, 512), 85, 3);  // 85 × 0.1 ms + 85² / 2 × 400 ns
  EXPECT_EQ(cost.positions_within(0, 0, 512), 0U);
  EXPECT_EQ(cost.positions_within(-1 * kMs, 0, 512), 0U);
  EXPECT_EQ(cost.positions_within(1'000 * kMs, 0, 512), 512U);
}

// Where there is always a prompt to read, it is known all the same what a step of streams alone takes: now and then
// there is one.
TEST(StepCost, FollowsTheLoadWhereThereAreAlwaysPrompts) {
  Learner learner{.machine = {.noise = 0.05}};
  learner.step(0, {0, 64});
  for (int i = 0; i < 20; ++i) learner.step(1);
  int with_prompts = 0;
  for (std::uint32_t i = 0; i < 1200; ++i) with_prompts += learner.read(1 + i / 40, 0, 0.8) > 0 ? 1 : 0;
  const double alone = learner.machine.alone(30);
  EXPECT_NEAR(learner.cost.decode_ns(30), alone, 0.1 * alone);
  EXPECT_NEAR(learner.cost.positions_within(0.8 * alone, 0, 512), 0.8 * alone / 0.1e6, 0.15 * 0.8 * alone / 0.1e6);
  EXPECT_GT(with_prompts, 1150);
}

// A position costs the more the further in the prompt it is, and that is not taken for what decoding costs: steps stay
// within their time from the first to the last.
TEST(StepCost, ALongPromptDoesNotSlowStreamsDownMoreAndMore) {
  Learner learner{.machine = {.constant_ns = 8e6, .position_ns = 0.45e6, .pair_ns = 450, .noise = 0.1}};
  const double alone = learner.machine.alone(8);
  double all = 0;
  int chunks = 0;
  for (int prompt = 0; prompt < 20; ++prompt) {
    for (int i = 0; i < 100; ++i) learner.step(8);
    for (std::uint32_t start = 0; start < 2000;) {
      const std::uint32_t positions = learner.read(8, start, 0.8);
      if (prompt > 1) {
        const PromptWork work(start, positions);
        const double taken = learner.machine.position_ns * work.positions + 450.0 * static_cast<double>(work.pairs);
        ASSERT_LT(taken, 1.4 * alone) << "from " << start;
        all += taken;
        ++chunks;
      }
      start += positions;
    }
  }
  EXPECT_NEAR(all / chunks, 0.75 * alone, 0.05 * alone);
}

TEST(StepCost, FollowsAMachineThatGetsSlower) {
  Learner learner;
  for (int i = 0; i < 300; ++i) learner.step_at_random();
  learner.machine = {.constant_ns = 12e6, .sequence_ns = 0.6e6, .position_ns = 0.2e6};
  for (int i = 0; i < 300; ++i) learner.step_at_random();
  EXPECT_NEAR(learner.cost.decode_ns(10), 18 * kMs, 1 * kMs);
  EXPECT_NEAR(learner.cost.prompts_ns({0, 100}), 20 * kMs, 2 * kMs);
}

TEST(StepCost, OneStepThatTookForeverChangesLittle) {
  for (const PromptWork& prompts : {PromptWork(), PromptWork(0, 100)}) {
    Learner learner;
    for (int i = 0; i < 200; ++i) learner.step_at_random();
    learner.cost.observe(10, prompts, 60'000'000'000);
    for (int i = 0; i < 50; ++i) learner.step_at_random();
    EXPECT_NEAR(learner.cost.decode_ns(10), 9 * kMs, 1 * kMs);
    EXPECT_NEAR(learner.cost.prompts_ns({0, 100}), 10 * kMs, 2 * kMs);
  }
}

// Nothing changes for a long time, then a prompt comes: the estimate of what was not seen must not have drifted away.
TEST(StepCost, IsStableWhereNothingChanges) {
  Learner learner{.machine = {.noise = 0.05}};
  for (int i = 0; i < 50; ++i) learner.step(8, i % 2 == 0 ? PromptWork(0, 100) : PromptWork());
  const double before = learner.cost.prompts_ns({0, 100});
  for (int i = 0; i < 100'000; ++i) learner.step(8);
  EXPECT_NEAR(learner.cost.decode_ns(8), 8.4 * kMs, 0.5 * kMs);
  EXPECT_EQ(learner.cost.prompts_ns({0, 100}), before);
  EXPECT_NEAR(before, 10 * kMs, 1 * kMs);
}

// The same prompt for ever, which cannot tell a position's cost from a pair's: together they stay what it takes.
TEST(StepCost, IsStableWhereNothingCanBeToldApart) {
  Learner learner{.machine = {.pair_ns = 400, .noise = 0.05}};
  for (int i = 0; i < 8; ++i) learner.step(8);
  const PromptWork same(1000, 16);
  for (int i = 0; i < 100'000; ++i) {
    learner.step(8, same);
    if (i % 32 == 0) learner.step(8);
    ASSERT_TRUE(std::isfinite(learner.cost.prompts_ns(same)));
  }
  EXPECT_NEAR(learner.cost.prompts_ns(same), 1.6 * kMs + 16'136 * 400.0, 1 * kMs);
}

// Eight streams for hours, and now and then for a step seven: what so few steps tell of a stream's cost is mostly
// noise, and must not be carried on to two.
TEST(StepCost, RareStepsTellLittle) {
  Learner learner{.machine = {.noise = 0.2}};
  learner.step(0, {0, 64});
  for (int i = 0; i < 200; ++i) learner.step(static_cast<std::uint32_t>(1 + i % 8));
  for (int i = 0; i < 20'000; ++i) {
    learner.step(i % 60 == 0 ? 7 : 8);
    for (const std::uint32_t streams : {2U, 7U, 12U}) {
      const double alone = learner.machine.alone(streams);
      ASSERT_NEAR(learner.cost.decode_ns(streams), alone, 0.7 * alone) << streams << " streams at " << i;
    }
  }
}

// Streams alone for hours, and then prompts that take ten times as long as they did (another load): that must be seen
// within a few of them, for until then they hold up all streams.
TEST(StepCost, LearnsAnewWhatPromptsTake) {
  Learner learner{.machine = {.noise = 0.05}};
  for (int i = 0; i < 50; ++i) learner.step(8, i % 2 == 0 ? PromptWork(0, 100) : PromptWork());
  for (int i = 0; i < 20'000; ++i) learner.step(static_cast<std::uint32_t>(1 + learner.random() % 8));
  learner.machine.position_ns *= 10;
  std::uint32_t positions = 0;
  for (int i = 0; i < 8; ++i) positions = learner.read(8, 0, 1.0);
  EXPECT_NEAR(positions, 8, 4);  // 8.4 ms, at 1 ms
}

// What a prompt's position costs is not told by steps without one, however they vary.
TEST(StepCost, StepsWithoutPromptsTellNothingOfThem) {
  Learner learner{.machine = {.noise = 0.05}};
  for (int i = 0; i < 50; ++i) learner.step(8, i % 2 == 0 ? PromptWork(0, 100) : PromptWork());
  const double before = learner.cost.prompts_ns({0, 80});
  for (int i = 0; i < 5'000; ++i) {
    if (i % 100 == 0) learner.machine.constant_ns = i % 200 == 0 ? 15e6 : 6e6;  // another program comes and goes
    learner.step(static_cast<std::uint32_t>(1 + learner.random() % 8));
  }
  EXPECT_NEAR(before, 8 * kMs, 1 * kMs);
  EXPECT_EQ(learner.cost.prompts_ns({0, 80}), before);
}

// Where a chunk's cost is foreseen too small, the next is no more than twice as large.
TEST(StepCost, ChunksBesideStreamsGrowByDoubling) {
  Learner learner{.machine = {.position_ns = 1}};
  learner.step(0, {0, 512});
  for (int i = 0; i < 8; ++i) learner.step(8);
  std::uint32_t before = 16;
  for (int i = 0; i < 5; ++i) {
    const std::uint32_t positions = learner.read(8, 0, 1.0);
    EXPECT_LE(positions, 2 * before);
    EXPECT_GE(positions, before);
    before = positions;
  }
  EXPECT_GE(before, 256U);
}

}  // namespace
}  // namespace rts
