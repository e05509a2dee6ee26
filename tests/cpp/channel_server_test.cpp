#include "rts/channel_server.hpp"

#include <gtest/gtest.h>
#include <poll.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "rts/stream_table.hpp"

namespace rts {
namespace {

constexpr std::int64_t kMs = 1'000'000;

bool is_signalled(int fd) {
  pollfd poll_fd{fd, POLLIN, 0};
  return ::poll(&poll_fd, 1, 0) > 0;
}

// Both sides of a channel: the front end's table and the worker's server.
class ChannelServerTest : public testing::Test {
 protected:
  static constexpr ChannelConfig kShape{.slots = 8, .ring_records = 100, .ring_bytes = 1 << 15, .lane_bytes = 1 << 16};

  static StreamSpec spec(const std::string& payload, Priority priority = Priority::kNormal) {
    StreamSpec spec;
    spec.request_id = "req-1";
    spec.priority = priority;
    spec.payload_kind = PayloadKind::kJson;
    spec.answer_kind = PayloadKind::kJson;
    spec.payload = payload;
    return spec;
  }
  std::uint32_t submit(const std::string& payload, Priority priority = Priority::kNormal, std::int64_t timeout_ns = 0) {
    const std::uint32_t slot = table_.submit(spec(payload, priority), timeout_ns).value();
    table_.set_format(slot, StreamFormat::kWhole);
    return slot;
  }
  std::vector<std::pair<std::uint32_t, std::string>> take() {
    std::vector<std::pair<std::uint32_t, std::string>> taken;
    server_.take([&](std::uint32_t slot, const SubmitRecord& record) { taken.emplace_back(slot, record.payload); });
    return taken;
  }
  // Reads what has come for a slot.
  void drain(std::uint32_t slot) {
    table_.collect();
    table_.drain(slot, unused_);
    table_.rings_read();
  }

  ManualClock clock_{1000 * kMs};
  std::shared_ptr<Channel> channel_ = Channel::create(kShape, false);
  StreamTable table_{channel_, clock_};
  ChannelServer server_{channel_, clock_};
  FrameBuffer unused_;
};

TEST_F(ChannelServerTest, ARequestGoesInAndItsAnswerComesOut) {
  const std::uint32_t slot = submit("[1,2]", Priority::kHigh, 50 * kMs);
  std::optional<SubmitHeader> header;
  server_.take([&](std::uint32_t, const SubmitRecord& record) {
    header = record.header;
    EXPECT_EQ(record.request_id, "req-1");
    EXPECT_EQ(record.payload, "[1,2]");
  });
  ASSERT_TRUE(header);
  EXPECT_EQ(header->slot, slot);
  EXPECT_EQ(header->priority, Priority::kHigh);
  EXPECT_EQ(header->payload_kind, PayloadKind::kJson);
  EXPECT_EQ(header->arrival_ns, clock_.now_ns());
  EXPECT_EQ(header->deadline_ns, clock_.now_ns() + 50 * kMs) << "when its first answer would be too late";

  clock_.advance(3 * kMs);
  server_.start(slot);
  clock_.advance(2 * kMs);
  EXPECT_TRUE(server_.write_payload(slot, PayloadKind::kNumpy, "ab"));
  clock_.advance(1 * kMs);
  EXPECT_TRUE(server_.write_payload(slot, PayloadKind::kNumpy, "cd"));
  server_.end(slot, FinishReason::kStop);
  drain(slot);
  EXPECT_TRUE(table_.ended(slot));
  EXPECT_EQ(table_.whole(slot), "abcd");
  EXPECT_EQ(table_.whole_kind(slot), PayloadKind::kNumpy);
  EXPECT_EQ(table_.generated(slot), 0U) << "a payload's pieces are no tokens";
  EXPECT_EQ(table_.end(slot).queue_ns, 3 * kMs);
  EXPECT_EQ(table_.end(slot).prefill_ns, 2 * kMs);
  EXPECT_EQ(table_.end(slot).decode_ns, 1 * kMs);
}

TEST_F(ChannelServerTest, TokensAreCounted) {
  const std::uint32_t slot = submit("x");
  table_.set_format(slot, StreamFormat::kTokens);
  take();
  EXPECT_TRUE(server_.write_token(slot, "a", 7, 0.5F, false));
  EXPECT_TRUE(server_.write_token(slot, "b", 8, 0.5F, true));
  server_.end(slot, FinishReason::kLength);
  table_.collect();
  std::optional<TokenView> token = table_.next(slot);
  ASSERT_TRUE(token);
  EXPECT_EQ(token->text, "a");
  EXPECT_EQ(token->index, 0U);
  token = table_.next(slot);
  ASSERT_TRUE(token);
  EXPECT_EQ(token->index, 1U);
  EXPECT_TRUE(token->special);
  EXPECT_FALSE(table_.next(slot));
  EXPECT_EQ(table_.finish(slot), FinishReason::kLength);
}

TEST_F(ChannelServerTest, ATokenMayHaveTopLogprobs) {
  const std::uint32_t slot = submit("x");
  take();
  std::string extension;
  append_top_logprob(extension, {7, -0.5F}, "alt");
  const std::string too_many(max_top_logprobs_bytes(kMaxTopLogprobs) + 1, 't');
  EXPECT_TRUE(server_.write_token(slot, std::string(ChannelServer::kMaxPieceBytes, 'a'), 7, 0.5F, false, extension));
  EXPECT_FALSE(server_.write_token(slot, "b", 7, 0.5F, false, too_many));
  table_.collect();
  EXPECT_EQ(table_.next(slot)->top_logprobs, extension);
}

TEST_F(ChannelServerTest, HighPriorityIsTakenFirst) {
  submit("low", Priority::kLow);
  submit("normal", Priority::kNormal);
  submit("high", Priority::kHigh);
  std::vector<std::string> order;
  for (const auto& [slot, payload] : take()) order.push_back(payload);
  EXPECT_EQ(order, (std::vector<std::string>{"high", "normal", "low"}));
}

TEST_F(ChannelServerTest, AnErrorSaysMore) {
  const std::uint32_t slot = submit("x");
  take();
  server_.end(slot, FinishReason::kError, StreamError::kModelFailed, std::string(2000, 'e'));
  drain(slot);
  EXPECT_EQ(table_.error(slot), StreamError::kModelFailed);
  EXPECT_EQ(table_.error_detail(slot), std::string(kMaxErrorDetailBytes, 'e'));
}

TEST_F(ChannelServerTest, ARequestWithoutAPayloadIsRefused) {
  StreamSpec bare = spec("x");
  bare.payload_kind = PayloadKind::kNone;
  const std::uint32_t slot = table_.submit(std::move(bare), 0).value();
  table_.set_format(slot, StreamFormat::kWhole);
  EXPECT_TRUE(take().empty());
  drain(slot);
  EXPECT_EQ(table_.error(slot), StreamError::kInvalidRequest);
  EXPECT_EQ(server_.open_slots(), 0U);
}

TEST_F(ChannelServerTest, WhatWasGivenUpIsToldOnce) {
  const std::uint32_t kept = submit("kept"), given_up = submit("given up");
  table_.close(given_up);
  take();
  EXPECT_EQ(server_.cancelled(), std::vector{given_up});
  EXPECT_TRUE(server_.cancelled().empty());
  take();
  EXPECT_TRUE(server_.cancelled().empty());
  table_.close(kept);
  take();
  EXPECT_EQ(server_.cancelled(), std::vector{kept}) << "the first one is not told again while it is open";
  server_.end(given_up, FinishReason::kCancelled);
  server_.end(kept, FinishReason::kCancelled);
  table_.collect();
  EXPECT_EQ(table_.open_streams(), 0U) << "both slots are given back";
}

TEST_F(ChannelServerTest, ASlotIsUsedAgainAfterItsEnd) {
  const std::uint32_t slot = submit("first");
  take();
  table_.close(slot);
  take();
  ASSERT_EQ(server_.cancelled().size(), 1U);
  server_.end(slot, FinishReason::kCancelled);
  table_.collect();
  ASSERT_EQ(submit("second"), slot);
  EXPECT_EQ(take().size(), 1U);
  EXPECT_TRUE(server_.cancelled().empty()) << "the flag was the first one's";
  EXPECT_TRUE(server_.write_payload(slot, PayloadKind::kJson, "2"));
  server_.end(slot, FinishReason::kStop);
  drain(slot);
  EXPECT_EQ(table_.whole(slot), "2");
}

TEST_F(ChannelServerTest, AFullRingRefusesAndTellsOfRoom) {
  const std::uint32_t slot = submit("x");
  take();
  const std::string piece(ChannelServer::kMaxPieceBytes, 'p');
  std::size_t written = 0;
  while (server_.write_payload(slot, PayloadKind::kBytes, piece)) ++written;
  EXPECT_GE(written, 3U);
  EXPECT_EQ(channel_->header().stats.stalls.load(), 1U);
  EXPECT_TRUE(server_.with_room().empty());
  ASSERT_TRUE(server_.arm());
  EXPECT_FALSE(is_signalled(channel_->worker_bell_fd()));

  clock_.advance(5 * kMs);
  drain(slot);
  EXPECT_TRUE(is_signalled(channel_->worker_bell_fd())) << "the reader has made room and said so";
  server_.wake();
  EXPECT_EQ(server_.with_room(), std::vector{slot});
  EXPECT_TRUE(server_.with_room().empty());
  EXPECT_TRUE(server_.write_payload(slot, PayloadKind::kBytes, piece));
  server_.end(slot, FinishReason::kStop);
  drain(slot);
  EXPECT_EQ(table_.whole(slot).size(), (written + 1) * piece.size());
  EXPECT_EQ(table_.end(slot).stalled_ns, 5 * kMs);
}

TEST_F(ChannelServerTest, AFullRingHasRoomForAnError) {
  const std::uint32_t slot = submit("x");
  take();
  const std::string piece(ChannelServer::kMaxPieceBytes, 'p');
  while (server_.write_payload(slot, PayloadKind::kBytes, piece)) {
  }
  server_.end(slot, FinishReason::kError, StreamError::kModelFailed, std::string(kMaxErrorDetailBytes, 'e'));
  drain(slot);
  EXPECT_TRUE(table_.ended(slot));
  EXPECT_EQ(table_.error_detail(slot).size(), kMaxErrorDetailBytes);
}

TEST_F(ChannelServerTest, APieceThatIsTooLongIsNeverTaken) {
  const std::uint32_t slot = submit("x");
  take();
  EXPECT_FALSE(server_.write_payload(slot, PayloadKind::kBytes, std::string(ChannelServer::kMaxPieceBytes + 1, 'p')));
  EXPECT_TRUE(server_.with_room().empty()) << "it does not wait for room";
}

TEST_F(ChannelServerTest, TheBellIsNotArmedWhereThereIsNews) {
  EXPECT_TRUE(server_.arm());
  const std::uint32_t slot = submit("x");
  EXPECT_TRUE(is_signalled(channel_->worker_bell_fd()));
  server_.wake();
  EXPECT_FALSE(server_.arm()) << "a request waits";
  take();
  EXPECT_TRUE(server_.arm());
  table_.close(slot);
  server_.wake();
  EXPECT_FALSE(server_.arm()) << "a stream was given up";
  take();
  EXPECT_TRUE(server_.arm());
}

TEST_F(ChannelServerTest, OneRingForAllThatWasWritten) {
  const std::uint32_t first = submit("1"), second = submit("2");
  take();
  table_.collect();
  ASSERT_TRUE(table_.arm());
  server_.write_payload(first, PayloadKind::kJson, "1");
  server_.end(second, FinishReason::kStop);
  EXPECT_FALSE(is_signalled(channel_->front_bell_fd()));
  server_.flush();
  EXPECT_TRUE(is_signalled(channel_->front_bell_fd()));
}

TEST_F(ChannelServerTest, BatchesAreCounted) {
  server_.count_batch(3, BatchRelease::kFull);
  server_.count_step(2 * kMs);
  server_.count_batch(1, BatchRelease::kDeadline);
  const WorkerStats& stats = channel_->header().stats;
  EXPECT_EQ(stats.batch_sequences.sum(), 4U);
  EXPECT_EQ(stats.step_us.sum(), 2000U);
  EXPECT_EQ(channel_->header().steps.load(), 1U);
  EXPECT_EQ(stats.batch_releases[0].load(), 1U);
  EXPECT_EQ(stats.batch_releases[3].load(), 1U);
}

// Whatever a broken front end writes into a lane, what cannot be answered is dropped and what can is refused.
TEST_F(ChannelServerTest, ABrokenFrontEndHarmsItselfAlone) {
  SubmitHeader header;
  header.slot = 99;
  header.payload_kind = PayloadKind::kJson;
  ASSERT_TRUE(channel_->lanes().push(Priority::kNormal, std::span(&header, 1)));
  header.slot = 5;
  header.payload_kind = static_cast<PayloadKind>(77);
  ASSERT_TRUE(channel_->lanes().push(Priority::kNormal, std::span(&header, 1)));
  header.slot = 6;
  header.payload_kind = PayloadKind::kJson;
  header.priority = Priority::kHigh;  // in another lane
  ASSERT_TRUE(channel_->lanes().push(Priority::kNormal, std::span(&header, 1)));
  const char byte = 'x';
  ASSERT_TRUE(channel_->lanes().push(Priority::kNormal, std::span(&byte, 1)));
  EXPECT_TRUE(take().empty());
  EXPECT_EQ(server_.open_slots(), 0U);
  const std::uint32_t good = submit("good");
  EXPECT_EQ(take(), (std::vector<std::pair<std::uint32_t, std::string>>{{good, "good"}}));
}

}  // namespace
}  // namespace rts
