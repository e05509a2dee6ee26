#include "rts/native_model.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "rts/engine_core.hpp"
#include "rts/stream_table.hpp"
#include "step_arrays.hpp"

namespace {

std::atomic<std::size_t> allocations{0};

void* allocate(std::size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  void* const memory = std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(std::size_t bytes) {
  return allocate(bytes);
}
void* operator new[](std::size_t bytes) {
  return allocate(bytes);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace rts {
namespace {

constexpr std::int32_t kVocabulary = 26;

std::shared_ptr<Vocabulary> alphabet() {
  std::vector<std::string> tokens;
  for (char letter = 'a'; letter <= 'z'; ++letter) tokens.emplace_back(1, letter);
  return std::make_shared<Vocabulary>(tokens, std::vector<std::int32_t>{}, std::vector<std::int32_t>{});
}

// Says the token after the last one, and does in each step what a test wants, before or after that.
class Letters final : public NativeModel {
 public:
  void step(const NativeStep& step) override {
    ++steps;
    for (std::size_t i = 0; i < step.sampled.size(); ++i) {
      step.sampled[i] = (step.batch.tokens[step.batch.logits_at[i]] + 1) % kVocabulary;
      step.logprobs[i] = -0.5F;
    }
    then(step);
  }

  int steps = 0;
  std::function<void(const NativeStep&)> then = [](const NativeStep&) {};
};

class NativeModelTest : public testing::Test, protected StepArrays {
 protected:
  static constexpr SchedulerConfig kConfig{
      .max_sequences = 4, .token_budget = 16, .block_size = 16, .num_blocks = 256, .max_context = 1024};

  NativeModelTest()
      : StepArrays(kConfig),
        channel_(Channel::create({.slots = 8, .ring_records = 100, .lane_bytes = 1 << 14}, false)),
        table_(channel_, clock_),
        core_({.scheduler = kConfig}, alphabet(), clock_) {
    core_.bind_buffers(buffers(), sampled_.data(), logprobs_.data());
    core_.attach(channel_);
  }

  std::uint32_t submit(std::vector<std::int32_t> prompt, std::int32_t max_tokens, std::uint32_t flags = 0) {
    StreamSpec spec;
    spec.prompt = std::move(prompt);
    spec.sampling.max_tokens = max_tokens;
    spec.sampling.temperature = 0;
    spec.sampling.flags = flags;
    const std::optional<std::uint32_t> slot = table_.submit(std::move(spec), 0);
    EXPECT_TRUE(slot.has_value());
    return slot.value_or(0);
  }
  std::string read(std::uint32_t slot) {
    std::string text;
    table_.collect();
    while (const std::optional<TokenView> token = table_.next(slot)) text += token->text;
    table_.rings_read();
    return text;
  }
  // Runs that many steps.
  void run(int steps) {
    const int last = model_.steps + steps;
    model_.then = [this, last](const NativeStep&) {
      if (model_.steps == last) core_.interrupt();
    };
    EXPECT_FALSE(core_.run(model_));
    EXPECT_EQ(model_.steps, last);
  }

  SteadyClock clock_;
  std::shared_ptr<Channel> channel_;
  StreamTable table_;
  EngineCore core_;
  Letters model_;
};

TEST_F(NativeModelTest, RunsStreamsToTheirEnds) {
  const std::uint32_t one = submit({0}, 3), two = submit({5, 6}, 5);
  run(5);
  EXPECT_EQ(read(one), "bcd");
  EXPECT_EQ(read(two), "hijkl");
  EXPECT_EQ(table_.finish(one), FinishReason::kLength);
  EXPECT_EQ(table_.finish(two), FinishReason::kLength);
}

TEST_F(NativeModelTest, AStepIsWhatWasAssembled) {
  submit({0}, 9);
  submit({3, 4, 5}, 9);
  std::vector<std::int32_t> positions;
  model_.then = [&](const NativeStep& step) {
    EXPECT_EQ(step.shape.tokens, 4U);
    EXPECT_EQ(step.shape.sequences, 2U);
    EXPECT_EQ(step.shape.samples, 2U);
    EXPECT_EQ(step.sampled.size(), 2U);
    EXPECT_EQ(step.logprobs.size(), 2U);
    EXPECT_EQ(step.sampled.data(), sampled_.data());
    positions.assign(step.batch.positions, step.batch.positions + step.shape.tokens);
    core_.interrupt();
  };
  core_.run(model_);
  EXPECT_EQ(positions, (std::vector<std::int32_t>{0, 0, 1, 2}));
}

TEST_F(NativeModelTest, AModelMayLeaveTheChoiceToTheSampler) {
  const std::uint32_t good = submit({0}, 1, SamplingParams::kLogprobs), bad = submit({1}, 1);
  model_.then = [&](const NativeStep& step) {
    std::vector<float> logits(step.sampled.size() * kVocabulary, 0.0F);
    logits[7] = 100.0F;
    logits[kVocabulary + 3] = std::nanf("");
    step.sample(logits);
    core_.interrupt();
  };
  core_.run(model_);
  table_.collect();
  const std::optional<TokenView> token = table_.next(good);
  ASSERT_TRUE(token);
  EXPECT_EQ(token->text, "h");
  EXPECT_NEAR(token->logprob, 0.0F, 1e-6F);
  EXPECT_EQ(read(bad), "");
  EXPECT_EQ(table_.error(bad), StreamError::kInvalidLogits);
}

TEST_F(NativeModelTest, AnInterruptBeforeRunEndsItBeforeAnyStep) {
  submit({0}, 50);
  core_.interrupt();
  core_.interrupt();
  EXPECT_FALSE(core_.run(model_));
  EXPECT_EQ(model_.steps, 0);
  run(3);  // two that come before it returns are one
}

TEST_F(NativeModelTest, AnInterruptLeavesTheStepThatRunsCommitted) {
  const std::uint32_t slot = submit({0}, 50);
  run(2);
  EXPECT_EQ(read(slot), "bc");
  run(1);
  EXPECT_EQ(read(slot), "d");
}

TEST_F(NativeModelTest, AnInterruptThatCameInTheLastStepBeforeASleepEndsTheRun) {
  submit({0}, 2);
  run(2);  // no work is left: it would sleep
}

TEST_F(NativeModelTest, AModelThatThrowsEndsItsStepsSequencesOnly) {
  const std::uint32_t one = submit({0}, 50), two = submit({5}, 50), paused = submit({9}, 2);
  run(1);
  table_.pause(paused, true);
  model_.then = [](const NativeStep&) { throw std::runtime_error("out of everything"); };
  const std::optional<ModelFailure> failure = core_.run(model_);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->sequences, 2U);
  EXPECT_EQ(failure->message, "out of everything");
  EXPECT_EQ(read(one), "b");
  EXPECT_EQ(table_.error(one), StreamError::kModelFailed);
  EXPECT_EQ(read(two), "g");
  EXPECT_EQ(table_.error(two), StreamError::kModelFailed);
  table_.pause(paused, false);
  const std::uint32_t next = submit({1}, 3);
  run(4);  // the first step is of who decodes alone, so that it is known what one takes
  EXPECT_EQ(read(paused), "kl");
  EXPECT_EQ(read(next), "cde");
  EXPECT_EQ(table_.finish(next), FinishReason::kLength);
}

TEST_F(NativeModelTest, AModelMayThrowAnything) {
  const std::uint32_t slot = submit({0}, 50);
  model_.then = [](const NativeStep&) { throw 7; };
  const std::optional<ModelFailure> failure = core_.run(model_);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->message, "something that is no std::exception");
  EXPECT_EQ(read(slot), "");
  EXPECT_EQ(table_.error(slot), StreamError::kModelFailed);
}

TEST_F(NativeModelTest, AFailureDoesNotTakeTheInterruptWithIt) {
  submit({0}, 50);
  model_.then = [&](const NativeStep&) {
    core_.interrupt();
    throw std::runtime_error("and interrupted");
  };
  EXPECT_TRUE(core_.run(model_));
  submit({0}, 50);
  EXPECT_FALSE(core_.run(model_));
  EXPECT_EQ(model_.steps, 1);
}

// The protocol of the worker's loop, whose commands come from another thread: run() returns for every one, whether it
// sleeps, is about to, works or was not entered yet.
TEST_F(NativeModelTest, NoInterruptIsLost) {
  constexpr int kCommands = 20'000;
  std::atomic<int> asked{0}, done{0};
  std::atomic<bool> lost{false};
  std::thread worker([&] {
    while (done.load() < kCommands && !lost.load()) {
      core_.run(model_);
      done.store(asked.load());
    }
  });
  std::uint32_t slot = submit({0}, 1);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(120);
  for (int command = 1; command <= kCommands && !lost.load(); ++command) {
    if (command % 3 == 0) {  // now and then there is work: one step, then the loop is about to sleep
      table_.collect();
      while (table_.next(slot)) {
      }
      if (table_.ended(slot)) {
        table_.close(slot);
        slot = submit({0}, 1);
      }
    }
    asked.store(command);
    core_.interrupt();
    while (done.load() < command && !lost.load()) {
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() > deadline) lost.store(true);
    }
  }
  EXPECT_FALSE(lost.load()) << "after " << done.load() << " commands";
  core_.interrupt();
  worker.join();
  EXPECT_GT(model_.steps, 0);
}

TEST_F(NativeModelTest, AllocatesNothingPerStepOnceWarm) {
  for (int i = 0; i < 3; ++i) submit({i}, 90);
  std::size_t before = 0, after = 0;
  model_.then = [&](const NativeStep&) {
    if (model_.steps == 2) before = allocations.load();
    if (model_.steps == 80) {
      after = allocations.load();
      core_.interrupt();
    }
  };
  core_.run(model_);
  EXPECT_GT(before, 0U);
  EXPECT_EQ(after, before);
}

}  // namespace
}  // namespace rts
