// What a request asks of the sampler, from its submit record to its tokens.
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "rts/engine_core.hpp"
#include "rts/stream_table.hpp"
#include "step_arrays.hpp"

namespace rts {
namespace {

// a … z, then one that ends. The model likes the letter after the last one best, and the one after that nearly as much.
constexpr std::int32_t kEos = 26, kVocabulary = 27;

std::shared_ptr<Vocabulary> alphabet(std::size_t times) {
  std::vector<std::string> tokens;
  for (char letter = 'a'; letter <= 'z'; ++letter)
    tokens.emplace_back(times - times / 128 * static_cast<std::size_t>(letter - 'a'), letter);
  tokens.emplace_back("</s>");
  return std::make_shared<Vocabulary>(tokens, std::vector{kEos}, std::vector{kEos});
}

class EngineSamplingTest : public testing::Test, protected StepArrays {
 protected:
  static constexpr SchedulerConfig kConfig{
      .max_sequences = 4, .token_budget = 16, .block_size = 16, .num_blocks = 64, .max_context = 256};

  // The first letter is said so often; where that is much, the others less and less.
  explicit EngineSamplingTest(std::size_t times = 1)
      : StepArrays(kConfig),
        channel_(Channel::create({.slots = 8, .ring_records = 100, .lane_bytes = 1 << 15}, false)),
        table_(channel_, clock_),
        core_({.scheduler = kConfig}, alphabet(times), clock_) {
    core_.bind_buffers(buffers(), sampled_.data(), logprobs_.data());
    core_.attach(channel_);
  }

  static StreamSpec request(std::int32_t prompt, std::int32_t max_tokens) {
    StreamSpec spec;
    spec.prompt = {prompt};
    spec.sampling.max_tokens = max_tokens;
    spec.sampling.temperature = 0;
    return spec;
  }
  std::uint32_t submit(StreamSpec spec) {
    const std::optional<std::uint32_t> slot = table_.submit(std::move(spec), 0);
    EXPECT_TRUE(slot.has_value());
    return slot.value_or(0);
  }
  bool step() {
    const std::optional<StepShape> shape = core_.schedule();
    if (!shape) return false;
    std::vector<float> logits(shape->samples * kVocabulary, 0.0F);
    for (std::uint32_t i = 0; i < shape->samples; ++i) {
      const std::int32_t last = tokens_[static_cast<std::size_t>(logits_at_[i])];
      logits[i * kVocabulary + static_cast<std::uint32_t>((last + 1) % kVocabulary)] = 4.0F;
      logits[i * kVocabulary + static_cast<std::uint32_t>((last + 2) % kVocabulary)] = 3.0F;
    }
    core_.sample(logits);
    core_.commit();
    return true;
  }
  std::string read(std::uint32_t slot) {
    std::string text;
    table_.collect();
    while (const std::optional<TokenView> token = table_.next(slot)) text += token->text;
    table_.rings_read();
    return text;
  }
  std::string run(StreamSpec spec, FinishReason expected) {
    const std::uint32_t slot = submit(std::move(spec));
    while (step()) {
    }
    std::string text = read(slot);
    EXPECT_EQ(table_.error(slot), StreamError::kNone);
    EXPECT_EQ(table_.finish(slot), expected);
    generated_ = table_.generated(slot);
    table_.close(slot);
    return text;
  }

  ManualClock clock_{1'000'000'000};
  std::shared_ptr<Channel> channel_;
  StreamTable table_;
  EngineCore core_;
  std::uint32_t generated_ = 0;
};

TEST_F(EngineSamplingTest, ABiasChoosesOtherTokens) {
  StreamSpec spec = request(0, 4);
  spec.logit_bias = {{2, -100.0F}, {10, 50.0F}};
  EXPECT_EQ(run(spec, FinishReason::kLength), "kkkk");
  spec.logit_bias = {{2, -100.0F}};
  EXPECT_EQ(run(spec, FinishReason::kLength), "bdef");
  EXPECT_EQ(run(request(0, 4), FinishReason::kLength), "bcde") << "a sequence that is used again keeps no bias";
}

TEST_F(EngineSamplingTest, AStopTokenEndsLikeTheEndOfSequence) {
  StreamSpec spec = request(0, 50);
  spec.stop_token_ids = {20, 4};
  EXPECT_EQ(run(spec, FinishReason::kStop), "bcde");
  spec.stop_token_ids = {3};
  spec.sampling.flags = SamplingParams::kIgnoreEos;
  EXPECT_EQ(run(spec, FinishReason::kStop), "bcd");
  spec = request(24, 5);
  spec.sampling.flags = SamplingParams::kIgnoreEos;
  spec.stop_token_ids = {2};
  EXPECT_EQ(run(spec, FinishReason::kStop), "zabc");
  EXPECT_EQ(generated_, 5U);
}

TEST_F(EngineSamplingTest, TheFirstMinTokensEndNothing) {
  StreamSpec spec = request(24, 50);
  EXPECT_EQ(run(spec, FinishReason::kStop), "z");
  spec.sampling.min_tokens = 3;
  EXPECT_EQ(run(spec, FinishReason::kStop), "zabcdefghijklmnopqrstuvwxyz");
  spec = request(23, 50);
  spec.sampling.min_tokens = 2;
  EXPECT_EQ(run(spec, FinishReason::kStop), "yz");
  EXPECT_EQ(generated_, 3U);
  spec = request(0, 50);
  spec.sampling.min_tokens = 3;
  spec.stop_token_ids = {2, 6};
  spec.stops = {"bd", "h"};
  EXPECT_EQ(run(spec, FinishReason::kStop), "bdefg");
}

TEST_F(EngineSamplingTest, TopLogprobsReachTheReaderOfThoseWhoAsked) {
  StreamSpec spec = request(0, 2);
  spec.sampling.flags = SamplingParams::kLogprobs;
  const std::uint32_t silent = submit(spec);
  spec.sampling.top_logprobs = 2;
  spec.logit_bias = {{5, 50.0F}};
  const std::uint32_t asked = submit(spec);
  while (step()) {
  }
  table_.collect();
  EXPECT_TRUE(table_.next(silent)->top_logprobs.empty());
  for (const char* const expected : {"bc", "gh"}) {
    const std::optional<TokenView> token = table_.next(asked);
    ASSERT_TRUE(token);
    EXPECT_EQ(token->token_id, 5);
    TopLogprobReader reader(token->top_logprobs);
    const std::optional<TopLogprobView> best = reader.next(), second = reader.next();
    ASSERT_TRUE(best && second);
    EXPECT_EQ(std::string(best->text) + std::string(second->text), expected);
    EXPECT_NEAR(best->logprob, second->logprob + 1.0F, 1e-5);
    EXPECT_LT(token->logprob, second->logprob);
    EXPECT_FALSE(reader.next());
  }
}

// What a step's model has not sampled from logits has none, whatever the step before it left.
TEST_F(EngineSamplingTest, AModelThatSamplesByItselfTellsNone) {
  StreamSpec spec = request(0, 3);
  spec.sampling.flags = SamplingParams::kLogprobs;
  spec.sampling.top_logprobs = 5;
  const std::uint32_t slot = submit(spec);
  step();
  core_.schedule();
  sampled_[0] = 7;
  core_.commit();
  EXPECT_FALSE(table_.next(slot)->top_logprobs.empty());
  EXPECT_TRUE(table_.next(slot)->top_logprobs.empty());
  core_.schedule();
  const std::vector<float> logits(kVocabulary, 0.0F);
  core_.sample(logits);
  core_.abort();
  const std::uint32_t next = submit(spec);
  core_.schedule();
  core_.commit();
  EXPECT_TRUE(table_.next(next)->top_logprobs.empty());
}

struct LongTokensTest : EngineSamplingTest {
  LongTokensTest() : EngineSamplingTest(kMaxTokenBytes) {}
};

// The ring is full of few such records; it says so before one finds no room, and no token is lost.
TEST_F(LongTokensTest, AReaderMayBeSlowWithTopLogprobs) {
  StreamSpec spec = request(0, 200);
  spec.sampling.flags = SamplingParams::kLogprobs | SamplingParams::kIgnoreEos;
  spec.sampling.top_logprobs = kMaxTopLogprobs;
  const std::uint32_t slot = submit(spec);
  std::string text;
  int pauses = 0;
  for (int round = 0; round < 1000 && !table_.ended(slot); ++round) {
    while (step()) {
    }
    const std::uint32_t held = table_.buffered(slot);
    if (!table_.ended(slot)) pauses += held < 100 ? 1 : 0;
    // What may still be in flight has room.
    constexpr std::size_t kLargest = kMaxTokenRecordBytes + max_top_logprobs_bytes(kMaxTopLogprobs);
    ASSERT_TRUE(table_.ended(slot) || channel_->token_writer(slot).has_room_for(kLargest - sizeof(TokenHeader)));
    table_.collect();
    for (int i = 0; i < 1 + round % 3; ++i) {
      const std::optional<TokenView> token = table_.next(slot);
      if (!token) break;
      text += token->token_id == kEos ? '.' : token->text[0];
      TopLogprobReader reader(token->top_logprobs);
      std::uint32_t count = 0;
      while (reader.next()) ++count;
      ASSERT_EQ(count, kMaxTopLogprobs);
    }
    table_.rings_read();
  }
  EXPECT_GT(pauses, 1);
  ASSERT_EQ(text.size(), 200U);
  EXPECT_EQ(text.substr(0, 30), "bcdefghijklmnopqrstuvwxyz.abcd");
}

TEST_F(EngineSamplingTest, RefusesWhatItCannotSampleWith) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
  using Bias = std::vector<TokenBias>;
  const std::vector<std::function<void(StreamSpec&)>> wrongs{
      [](StreamSpec& spec) { spec.logit_bias = Bias{{kVocabulary, 1.0F}}; },
      [](StreamSpec& spec) { spec.logit_bias = Bias{{0, 1.0F}, {-1, 1.0F}}; },
      [](StreamSpec& spec) { spec.logit_bias = Bias{{0, kNan}}; },
      [](StreamSpec& spec) { spec.logit_bias = Bias{{0, kInfinity}}; },
      [](StreamSpec& spec) { spec.logit_bias = Bias{{0, -100.5F}}; },
      [](StreamSpec& spec) { spec.logit_bias = Bias(kMaxBiasedTokens + 1); },
      [](StreamSpec& spec) { spec.stop_token_ids = {0, kVocabulary}; },
      [](StreamSpec& spec) { spec.stop_token_ids = {-1}; },
      [](StreamSpec& spec) { spec.stop_token_ids.assign(kMaxStopTokenIds + 1, 0); },
      [](StreamSpec& spec) { spec.sampling.min_tokens = -1; },
      [](StreamSpec& spec) { spec.sampling.min_tokens = spec.sampling.max_tokens + 1; },
      [](StreamSpec& spec) { spec.sampling.top_logprobs = kMaxTopLogprobs + 1; },
  };
  for (std::size_t i = 0; i < wrongs.size(); ++i) {
    StreamSpec bad = request(0, 3);
    wrongs[i](bad);
    const std::uint32_t slot = submit(bad);
    EXPECT_EQ(run(request(0, 3), FinishReason::kLength), "bcd") << "beside wrong " << i;
    EXPECT_EQ(read(slot), "");
    EXPECT_EQ(table_.error(slot), StreamError::kInvalidRequest) << i;
    table_.close(slot);
  }
  StreamSpec most = request(0, 3);
  most.logit_bias = Bias(kMaxBiasedTokens);
  most.stop_token_ids.assign(kMaxStopTokenIds, 20);
  most.sampling.min_tokens = 3;
  most.sampling.top_logprobs = kMaxTopLogprobs;
  EXPECT_EQ(run(most, FinishReason::kLength), "bcd");
}

}  // namespace
}  // namespace rts
