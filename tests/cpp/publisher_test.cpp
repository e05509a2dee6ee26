#include "rts/publisher.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "rts/cache_line.hpp"

namespace rts {
namespace {

constexpr std::int32_t kEos = 5, kSpecialToken = 6;
const std::vector<std::string> kTokens{"he", "llo", "\xE2\x82", "\xAC", " END", "</s>", "<tool>", "E", "ND!"};

struct Record {
  TokenHeader header;
  std::string text;
  EndExtension end;
  std::string top_logprobs;
};

class PublisherTest : public testing::Test {
 protected:
  PublisherTest() { sequence_.prompt_tokens = 3; }

  FinishReason publish(std::int32_t token, bool last = false, float logprob = 0.0F,
                       std::span<const TopLogprob> top = {}) {
    return publisher_.publish(sequence_, writer_, token, logprob, last, top);
  }
  void stop_at(const std::vector<std::string>& stops) { sequence_.stop_matcher = StopMatcher(stops); }

  std::vector<Record> records() {
    std::vector<Record> records;
    for (auto bytes = reader_.front(); !bytes.empty(); bytes = reader_.front()) {
      const TokenRecord record(bytes);
      EXPECT_TRUE(record.valid);
      records.push_back({record.header, std::string(record.text), record.end(), std::string(record.top_logprobs())});
      reader_.pop();
    }
    reader_.release();
    return records;
  }
  std::vector<std::string> texts() {
    std::vector<std::string> texts;
    for (const Record& record : records()) texts.push_back(record.text);
    return texts;
  }

  alignas(kCacheLine) std::byte memory_[SpscRing<>::bytes_needed({.bytes = 1 << 14, .records = 64})] = {};
  SpscRing<> ring_{memory_, {.bytes = 1 << 14, .records = 64}};
  TokenWriter writer_{ring_};
  SpscRing<>::Consumer reader_ = ring_.consumer();
  Publisher publisher_{std::make_shared<Vocabulary>(kTokens, std::vector{kEos, kSpecialToken}, std::vector{kEos})};
  Sequence sequence_;
};

TEST_F(PublisherTest, WritesARecordForEachToken) {
  EXPECT_EQ(publish(0, false, -0.5F), FinishReason::kNone);
  EXPECT_EQ(publish(1, false, std::nanf("")), FinishReason::kNone);
  const std::vector<Record> written = records();
  ASSERT_EQ(written.size(), 2U);
  EXPECT_EQ(written[0].header.index, 0U);
  EXPECT_EQ(written[0].header.token_id, 0);
  EXPECT_EQ(written[0].header.logprob, -0.5F);
  EXPECT_EQ(written[0].header.flags, 0);
  EXPECT_EQ(written[0].header.finish, FinishReason::kNone);
  EXPECT_EQ(written[0].text, "he");
  EXPECT_EQ(written[1].header.index, 1U);
  EXPECT_EQ(written[1].header.token_id, 1);
  EXPECT_TRUE(std::isnan(written[1].header.logprob));
  EXPECT_EQ(written[1].text, "llo");
  EXPECT_EQ(sequence_.published, 2U);
}

TEST_F(PublisherTest, ACharacterComesWithItsLastByte) {
  publish(2);
  publish(3);
  EXPECT_EQ(texts(), (std::vector<std::string>{"", "€"}));
}

TEST_F(PublisherTest, WhatNothingCompletesComesOutInTheLastRecord) {
  publish(2);
  publish(2, true);
  EXPECT_EQ(texts(), (std::vector<std::string>{"", "\uFFFD\uFFFD"}));
  sequence_.detokenizer = {};
  publish(2);
  publish(kEos);
  EXPECT_EQ(texts(), (std::vector<std::string>{"", "\uFFFD"}));
}

TEST_F(PublisherTest, AStopStringEndsAndIsNotShown) {
  stop_at({"END"});
  EXPECT_EQ(publish(0), FinishReason::kNone);
  EXPECT_EQ(publish(4), FinishReason::kStop);
  EXPECT_EQ(texts(), (std::vector<std::string>{"he", " "}));
}

TEST_F(PublisherTest, HoldsBackWhatMayBeAStopString) {
  stop_at({"END"});
  EXPECT_EQ(publish(7), FinishReason::kNone);
  EXPECT_EQ(publish(7), FinishReason::kNone);
  EXPECT_EQ(publish(0), FinishReason::kNone);
  EXPECT_EQ(publish(7), FinishReason::kNone);
  EXPECT_EQ(publish(8), FinishReason::kStop);
  EXPECT_EQ(texts(), (std::vector<std::string>{"", "E", "Ehe", "", ""}));
}

TEST_F(PublisherTest, TheLastTokenHoldsNothingBack) {
  stop_at({"END"});
  EXPECT_EQ(publish(7, true), FinishReason::kNone);
  EXPECT_EQ(texts(), (std::vector<std::string>{"E"}));
}

TEST_F(PublisherTest, TheLastTokenMayCompleteAStopString) {
  stop_at({"END"});
  EXPECT_EQ(publish(7), FinishReason::kNone);
  EXPECT_EQ(publish(8, true), FinishReason::kStop);
  EXPECT_EQ(texts(), (std::vector<std::string>{"", ""}));
}

TEST_F(PublisherTest, EndOfSequenceStopsAndReleasesWhatWasHeld) {
  stop_at({"END"});
  publish(7);
  EXPECT_EQ(publish(kEos), FinishReason::kStop);
  const std::vector<Record> written = records();
  EXPECT_EQ(written[1].text, "E");
  EXPECT_EQ(written[1].header.token_id, kEos);
  EXPECT_EQ(written[1].header.flags, TokenHeader::kSpecial);
}

TEST_F(PublisherTest, IgnoreEosGoesOn) {
  sequence_.sampling.flags = SamplingParams::kIgnoreEos;
  EXPECT_EQ(publish(kEos), FinishReason::kNone);
  EXPECT_EQ(publish(0), FinishReason::kNone);
  EXPECT_EQ(texts(), (std::vector<std::string>{"", "he"}));
}

TEST_F(PublisherTest, AStopTokenEndsAndIsShown) {
  sequence_.stop_token_ids = {4, 1};
  sequence_.sampling.flags = SamplingParams::kIgnoreEos;
  stop_at({"hex"});
  EXPECT_EQ(publish(kEos), FinishReason::kNone);
  EXPECT_EQ(publish(0), FinishReason::kNone);
  EXPECT_EQ(publish(1), FinishReason::kStop);
  EXPECT_EQ(texts(), (std::vector<std::string>{"", "", "hello"}));
}

TEST_F(PublisherTest, TheFirstMinTokensEndNothing) {
  sequence_.sampling.min_tokens = 3;
  sequence_.stop_token_ids = {0};
  EXPECT_EQ(publish(kEos), FinishReason::kNone);
  EXPECT_EQ(publish(0), FinishReason::kNone);
  EXPECT_EQ(publish(1), FinishReason::kNone);
  EXPECT_EQ(publish(kEos), FinishReason::kStop);
  sequence_.published = 3;
  EXPECT_EQ(publish(0), FinishReason::kStop);
}

// Not even one whose end comes later: the text of those tokens is not searched at all.
TEST_F(PublisherTest, StopStringsAreLookedForAfterMinTokens) {
  sequence_.sampling.min_tokens = 2;
  stop_at({"END", "!he"});
  EXPECT_EQ(publish(4), FinishReason::kNone);
  EXPECT_EQ(publish(7), FinishReason::kNone);
  EXPECT_EQ(publish(8), FinishReason::kNone);
  EXPECT_EQ(publish(0), FinishReason::kStop);
  EXPECT_EQ(texts(), (std::vector<std::string>{" END", "E", "ND", ""}));
}

TEST_F(PublisherTest, TopLogprobsComeWithTheirTexts) {
  const std::vector<TopLogprob> top{{1, -0.25F}, {2, -1.5F}, {kEos, -2.0F}};
  publish(0, false, -3.0F, top);
  publish(1, false, -3.0F);
  const std::vector<Record> written = records();
  TopLogprobReader reader(written[0].top_logprobs);
  const char* const texts[] = {"llo", "\uFFFD", ""};  // half a character, and a control token
  for (std::size_t i = 0; i < top.size(); ++i) {
    const std::optional<TopLogprobView> read = reader.next();
    ASSERT_TRUE(read);
    EXPECT_EQ(read->token_id, top[i].token);
    EXPECT_EQ(read->logprob, top[i].logprob);
    EXPECT_EQ(read->text, texts[i]);
  }
  EXPECT_FALSE(reader.next());
  EXPECT_EQ(written[0].text, "he");
  EXPECT_TRUE(written[1].top_logprobs.empty());
}

TEST_F(PublisherTest, ASpecialTokenHasNoTextAndEndsNothing) {
  EXPECT_EQ(publish(kSpecialToken), FinishReason::kNone);
  const std::vector<Record> written = records();
  EXPECT_EQ(written[0].header.flags, TokenHeader::kSpecial);
  EXPECT_EQ(written[0].text, "");
}

TEST_F(PublisherTest, ATokenOutsideTheVocabularyHasNoText) {
  EXPECT_EQ(publish(1000), FinishReason::kNone);
  EXPECT_EQ(texts(), (std::vector<std::string>{""}));
}

TEST_F(PublisherTest, TheEndSaysWhyAndHowLongEachPartTook) {
  publish(0);
  records();
  sequence_.finish = FinishReason::kLength;
  sequence_.arrival_ns = 1'000;
  sequence_.admitted_ns = 3'000;
  sequence_.first_token_ns = 10'000;
  sequence_.last_token_ns = 40'000;
  sequence_.stalled_ns = 7'000;
  Publisher::publish_end(sequence_, writer_, 99'000);
  const std::vector<Record> written = records();
  ASSERT_EQ(written.size(), 1U);
  EXPECT_EQ(written[0].header.flags, TokenHeader::kEnd);
  EXPECT_EQ(written[0].header.index, 1U);
  EXPECT_EQ(written[0].header.finish, FinishReason::kLength);
  EXPECT_EQ(written[0].header.error, StreamError::kNone);
  EXPECT_EQ(written[0].end.prompt_tokens, 3U);
  EXPECT_EQ(written[0].end.queue_ns, 2'000);
  EXPECT_EQ(written[0].end.prefill_ns, 7'000);
  EXPECT_EQ(written[0].end.decode_ns, 30'000);
  EXPECT_EQ(written[0].end.stalled_ns, 7'000);
}

// A part that has not begun took no time, and the one that goes on took it until now.
TEST_F(PublisherTest, TheEndOfOneThatDidNotComeFar) {
  sequence_.arrival_ns = 1'000;
  sequence_.finish = FinishReason::kError;
  sequence_.error = StreamError::kModelFailed;
  Publisher::publish_end(sequence_, writer_, 5'000);
  sequence_.admitted_ns = 3'000;
  Publisher::publish_end(sequence_, writer_, 5'000);
  const std::vector<Record> written = records();
  EXPECT_EQ(written[0].header.error, StreamError::kModelFailed);
  EXPECT_EQ(written[0].end.queue_ns, 4'000);
  EXPECT_EQ(written[0].end.prefill_ns, 0);
  EXPECT_EQ(written[0].end.decode_ns, 0);
  EXPECT_EQ(written[1].end.queue_ns, 2'000);
  EXPECT_EQ(written[1].end.prefill_ns, 2'000);
  EXPECT_EQ(written[1].end.decode_ns, 0);
}

}  // namespace
}  // namespace rts
