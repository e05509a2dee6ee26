#include "rts/null_model.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <vector>

namespace rts {
namespace {

constexpr std::int64_t kMs = 1'000'000;

// A step's arrays, and a model whose sleeps move the clock.
class NullModelTest : public testing::Test {
 protected:
  void step(NullModel& model) {
    StepBuffers batch;
    batch.positions = positions_.data();
    batch.logits_at = logits_at_.data();
    sampled_.assign(logits_at_.size(), -7);
    logprobs_.assign(logits_at_.size(), -7);
    const StepShape shape{static_cast<std::uint32_t>(positions_.size()), 1,
                          static_cast<std::uint32_t>(logits_at_.size())};
    const std::function<void(std::span<const float>)> sample;
    model.step({shape, batch, sampled_, logprobs_, sample});
  }
  NullModel paced(std::int64_t step_ns) {
    return {0, 1, step_ns, clock_, [this](std::int64_t due_ns) {
              slept_until_.push_back(due_ns);
              if (due_ns > clock_.now_ns()) clock_.advance(due_ns - clock_.now_ns());
              clock_.advance(late_ns_);
            }};
  }

  std::vector<std::int32_t> positions_{0}, sampled_;
  std::vector<std::int64_t> logits_at_{0};
  std::vector<float> logprobs_;
  ManualClock clock_{1000 * kMs};
  std::int64_t late_ns_ = 0;
  std::vector<std::int64_t> slept_until_;
};

TEST_F(NullModelTest, SaysWhatThePositionDecides) {
  positions_ = {3, 4, 5, 9, 100};
  logits_at_ = {2, 3, 4};
  NullModel model(256, 10, 0, clock_);
  step(model);
  EXPECT_EQ(sampled_, (std::vector<std::int32_t>{261, 265, 256}));
  EXPECT_EQ(logprobs_, (std::vector<float>{0, 0, 0}));
}

TEST_F(NullModelTest, AChunkOfAPromptSamplesNothing) {
  logits_at_.clear();
  NullModel model(256, 10, 0, clock_);
  step(model);
  EXPECT_TRUE(sampled_.empty());
}

TEST_F(NullModelTest, NeedsATokenToSay) {
  EXPECT_THROW(NullModel(256, 0, 0, clock_), std::invalid_argument);
}

TEST_F(NullModelTest, UnpacedItNeverSleeps) {
  NullModel model = paced(0);
  step(model);
  EXPECT_TRUE(slept_until_.empty());
}

TEST_F(NullModelTest, KeepsItsPaceWhereSleepsAreLate) {
  late_ns_ = kMs;
  NullModel model = paced(5 * kMs);
  for (int i = 0; i < 4; ++i) step(model);
  EXPECT_EQ(slept_until_, (std::vector<std::int64_t>{1000 * kMs, 1005 * kMs, 1010 * kMs, 1015 * kMs}));
}

TEST_F(NullModelTest, AnIdleTimeIsNotCaughtUpWith) {
  NullModel model = paced(5 * kMs);
  step(model);
  clock_.advance(500 * kMs);
  for (int i = 0; i < 3; ++i) step(model);
  EXPECT_EQ(slept_until_, (std::vector<std::int64_t>{1000 * kMs, 1500 * kMs, 1505 * kMs, 1510 * kMs}));
}

TEST_F(NullModelTest, TheLongestStepOverflowsNothing) {
  NullModel model = paced(std::int64_t{1} << 61);
  for (int i = 0; i < 3; ++i) step(model);
  EXPECT_GT(slept_until_[2], slept_until_[1]);
}

TEST_F(NullModelTest, SleepsUntilTheSteadyClockIsThere) {
  const SteadyClock steady;
  const std::int64_t due = steady.now_ns() + 3 * kMs;
  NullModel::sleep_until(due);
  EXPECT_GE(steady.now_ns(), due);
  NullModel::sleep_until(due);  // over: returns
}

}  // namespace
}  // namespace rts
