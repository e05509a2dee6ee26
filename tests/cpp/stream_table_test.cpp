#include "rts/stream_table.hpp"

#include <gtest/gtest.h>
#include <poll.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "rts/submit_record.hpp"

namespace rts {
namespace {

constexpr std::int64_t kMs = 1'000'000;
constexpr float kNoLogprob = std::numeric_limits<float>::quiet_NaN();

bool is_signalled(int fd) {
  pollfd poll_fd{fd, POLLIN, 0};
  return ::poll(&poll_fd, 1, 0) > 0;
}

// The table, and a worker's end of the same channel played by hand.
class StreamTableTest : public testing::Test {
 protected:
  static constexpr ChannelConfig kShape{.slots = 70, .ring_records = 4, .lane_bytes = 1 << 12};

  StreamTableTest() {
    for (std::uint32_t slot = 0; slot < kShape.slots; ++slot) writers_.push_back(channel_->token_writer(slot));
  }

  static StreamSpec spec() {
    StreamSpec spec;
    spec.request_id = "req-1";
    spec.model = "m";
    spec.version = "1";
    spec.prompt = {5, 6, 7};
    return spec;
  }
  std::uint32_t submit() { return table_.submit(spec(), 0).value(); }
  void write(std::uint32_t slot, std::uint32_t index, const std::string& text, float logprob = kNoLogprob,
             std::string_view top_logprobs = {}) {
    TokenHeader header;
    header.index = index;
    header.token_id = static_cast<std::int32_t>(100 + index);
    header.logprob = logprob;
    ASSERT_TRUE(writers_[slot].write_token(header, text, top_logprobs));
    channel_->mark_ready(slot);
  }
  void write_end(std::uint32_t slot, FinishReason finish, StreamError error = StreamError::kNone) {
    TokenHeader header;
    header.finish = finish;
    header.error = error;
    ASSERT_TRUE(writers_[slot].write_last(header, EndExtension{.prompt_tokens = 3, .queue_ns = 2 * kMs}));
    channel_->mark_ready(slot);
  }
  std::vector<std::uint32_t> collect() {
    const std::span<const std::uint32_t> slots = table_.collect();
    return {slots.begin(), slots.end()};
  }
  std::uint32_t flags(std::uint32_t slot) const { return channel_->control(slot).flags.load(); }

  ManualClock clock_{1000 * kMs};
  std::shared_ptr<Channel> channel_ = Channel::create(kShape, false);
  StreamTable table_{channel_, clock_};
  std::vector<TokenWriter> writers_;
  FrameBuffer out_;
};

TEST_F(StreamTableTest, SubmitWritesTheRequestsRecord) {
  submit();
  StreamSpec given = spec();
  given.stops = {"a", "stop"};
  given.priority = Priority::kHigh;
  given.sampling.seed = 42;
  given.sampling.max_tokens = 9;
  channel_->worker_bell().arm();
  ASSERT_EQ(table_.submit(given, 0), 1U);
  EXPECT_TRUE(is_signalled(channel_->worker_bell_fd()));

  const std::span<const std::byte> record = channel_->lanes().reader(Priority::kHigh).front();
  SubmitHeader header;
  ASSERT_EQ(record.size(), sizeof header + 3 * 4 + (8 + 4) + (8 + 4));
  std::memcpy(&header, record.data(), sizeof header);
  EXPECT_EQ(header.slot, 1U);
  EXPECT_EQ(header.stream_id, 2U);
  EXPECT_EQ(header.group_id, header.stream_id);
  EXPECT_EQ(header.choice_index, 0U);
  EXPECT_EQ(header.arrival_ns, clock_.now_ns());
  EXPECT_EQ(header.prompt_tokens, 3U);
  EXPECT_EQ(header.generated_tokens, 0U);
  EXPECT_EQ(header.tail_bytes, 24U);
  EXPECT_EQ(header.priority, Priority::kHigh);
  EXPECT_EQ(header.sampling.seed, 42U);
  EXPECT_EQ(header.sampling.max_tokens, 9);
  std::int32_t ids[3];
  std::memcpy(ids, record.data() + sizeof header, sizeof ids);
  EXPECT_EQ(ids[0], 5);
  EXPECT_EQ(ids[2], 7);
  const char* tail = reinterpret_cast<const char*>(record.data()) + sizeof header + sizeof ids;
  TailHeader entry;
  std::memcpy(&entry, tail, sizeof entry);
  EXPECT_EQ(entry.type, TailHeader::kStopString);
  EXPECT_EQ(entry.bytes, 1U);
  EXPECT_EQ(tail[8], 'a');
  std::memcpy(&entry, tail + 12, sizeof entry);
  EXPECT_EQ(entry.bytes, 4U);
  EXPECT_EQ(std::string(tail + 20, 4), "stop");
}

TEST_F(StreamTableTest, SubmitSendsBiasesAndStopTokens) {
  StreamSpec given = spec();
  given.logit_bias = {{4, -1.5F}};
  given.stop_token_ids = {9, 8};
  given.sampling.min_tokens = 2;
  given.sampling.top_logprobs = 3;
  ASSERT_TRUE(table_.submit(given, 0));
  const SubmitRecord record(channel_->lanes().reader(Priority::kNormal).front());
  ASSERT_TRUE(record.valid);
  EXPECT_EQ(record.logit_bias, given.logit_bias);
  EXPECT_EQ(record.stop_token_ids, given.stop_token_ids);
  EXPECT_EQ(record.header.sampling.min_tokens, 2);
  EXPECT_EQ(record.header.sampling.top_logprobs, 3U);
}

TEST_F(StreamTableTest, TopLogprobsReachEveryKindOfReader) {
  std::string extension;
  append_top_logprob(extension, {7, -0.5F}, "alt");
  constexpr std::string_view kShown = R"("top_logprobs":[{"token":"alt","token_id":7,"logprob":-0.5}])";
  const std::uint32_t events = submit(), json = submit(), tokens = submit();
  table_.set_format(events, StreamFormat::kEvents);
  table_.set_format(json, StreamFormat::kJson);
  for (const std::uint32_t slot : {events, json, tokens}) write(slot, 0, "x", -0.25F, extension);
  write(tokens, 1, "y");
  EXPECT_EQ(table_.drain(events, out_), 1U);
  EXPECT_NE(out_.view().find(kShown), std::string_view::npos);
  table_.drain(json, out_);
  out_.clear();
  table_.finish_json(json, out_);
  EXPECT_NE(out_.view().find(kShown), std::string_view::npos);
  const std::optional<TopLogprobView> top = TopLogprobReader(table_.next(tokens)->top_logprobs).next();
  ASSERT_TRUE(top);
  EXPECT_EQ(top->text, "alt");
  EXPECT_EQ(top->token_id, 7);
  EXPECT_TRUE(table_.next(tokens)->top_logprobs.empty());
}

TEST_F(StreamTableTest, PushTakesTopLogprobs) {
  std::string extension;
  append_top_logprob(extension, {7, -0.5F}, "alt");
  const std::uint32_t slot = table_.open(0).value();
  EXPECT_TRUE(table_.push(slot, "x", 1, -0.25F, false, extension));
  EXPECT_FALSE(table_.push(slot, std::string(kMaxPushedTextBytes, 'x'), 1, -0.25F, false, extension));
  EXPECT_EQ(table_.next(slot)->top_logprobs, extension);
}

TEST_F(StreamTableTest, RefusesWhereNoSlotIsFree) {
  for (std::uint32_t slot = 0; slot < kShape.slots; ++slot) {
    ASSERT_EQ(table_.submit(spec(), 0), slot) << "the lowest first";
    channel_->lanes().reader(Priority::kNormal).front();
    channel_->lanes().reader(Priority::kNormal).pop();
    channel_->lanes().reader(Priority::kNormal).release();
  }
  EXPECT_EQ(table_.open_streams(), kShape.slots);
  EXPECT_FALSE(table_.submit(spec(), 0));
  EXPECT_FALSE(table_.open(0));
}

TEST_F(StreamTableTest, RefusesWhereTheLaneIsFullAndKeepsTheSlot) {
  std::uint32_t taken = 0;
  while (table_.submit(spec(), 0)) ++taken;
  EXPECT_GT(taken, 10U);
  EXPECT_LT(taken, kShape.slots);
  EXPECT_EQ(table_.open_streams(), taken);
  StreamSpec high = spec();
  high.priority = Priority::kHigh;
  EXPECT_EQ(table_.submit(high, 0), taken) << "another priority has its own lane";
}

TEST_F(StreamTableTest, CollectsEachSlotOnceInOrder) {
  for (int i = 0; i < 20; ++i) submit();
  for (const std::uint32_t slot : {17U, 3U, 3U, 0U}) write(slot, slot == 3 ? 0 : 1, "x");
  EXPECT_EQ(collect(), (std::vector{0U, 3U, 17U}));
  EXPECT_EQ(collect(), (std::vector<std::uint32_t>{}));
  channel_->mark_ready(69);
  EXPECT_EQ(collect(), (std::vector{69U})) << "of the second word";
}

TEST_F(StreamTableTest, NextTakesOneTokenAfterTheOther) {
  const std::uint32_t slot = submit();
  EXPECT_FALSE(table_.next(slot));
  write(slot, 0, "he", -0.25F);
  write(slot, 1, "llo");
  EXPECT_EQ(table_.buffered(slot), 2U);
  const std::optional<TokenView> token = table_.next(slot);
  ASSERT_TRUE(token);
  EXPECT_EQ(token->text, "he");
  EXPECT_EQ(token->token_id, 100);
  EXPECT_EQ(token->index, 0U);
  EXPECT_EQ(token->logprob, -0.25F);
  EXPECT_FALSE(token->special);
  EXPECT_EQ(table_.next(slot)->text, "llo");
  EXPECT_FALSE(table_.next(slot));
  EXPECT_FALSE(table_.ended(slot));
  write_end(slot, FinishReason::kLength);
  EXPECT_FALSE(table_.next(slot));
  EXPECT_TRUE(table_.ended(slot));
  EXPECT_EQ(table_.finish(slot), FinishReason::kLength);
  EXPECT_EQ(table_.generated(slot), 2U);
  EXPECT_EQ(table_.end(slot).prompt_tokens, 3U);
  EXPECT_EQ(table_.end(slot).queue_ns, 2 * kMs);
}

TEST_F(StreamTableTest, DrainFramesEventsAndTheEnd) {
  const std::uint32_t slot = submit();
  table_.set_format(slot, StreamFormat::kEvents);
  write(slot, 0, "a");
  write(slot, 1, "b");
  EXPECT_EQ(table_.drain(slot, out_), 2U);
  FrameBuffer expected;
  append_token_event(expected, 0, 100, "a", kNoLogprob);
  append_token_event(expected, 1, 101, "b", kNoLogprob);
  EXPECT_EQ(out_.view(), expected.view());
  out_.clear();
  EXPECT_EQ(table_.drain(slot, out_), 0U);
  EXPECT_TRUE(out_.empty());

  write_end(slot, FinishReason::kStop);
  EXPECT_EQ(table_.drain(slot, out_), 0U);
  expected.clear();
  append_done_event(expected, {"req-1", "m", "1", FinishReason::kStop, 2, table_.end(slot)});
  EXPECT_EQ(out_.view(), expected.view());
  out_.clear();
  EXPECT_EQ(table_.drain(slot, out_), 0U);
  EXPECT_TRUE(out_.empty()) << "the end is framed once";
}

TEST_F(StreamTableTest, AnErrorIsNotFramedAsDone) {
  const std::uint32_t slot = submit();
  table_.set_format(slot, StreamFormat::kEvents);
  write_end(slot, FinishReason::kError, StreamError::kModelFailed);
  table_.drain(slot, out_);
  EXPECT_TRUE(out_.empty());
  EXPECT_TRUE(table_.ended(slot));
  EXPECT_EQ(table_.error(slot), StreamError::kModelFailed);
}

TEST_F(StreamTableTest, JsonIsOneObjectAtTheEnd) {
  const std::uint32_t slot = submit();
  table_.set_format(slot, StreamFormat::kJson);
  write(slot, 0, "a", -1.0F);
  table_.drain(slot, out_);
  write(slot, 1, "b");
  write_end(slot, FinishReason::kStop);
  table_.drain(slot, out_);
  EXPECT_TRUE(out_.empty());
  table_.finish_json(slot, out_);
  FrameBuffer objects, expected;
  append_token_object(objects, 100, "a", -1.0F);
  append_token_object(objects, 101, "b", kNoLogprob);
  append_answer(expected, {"req-1", "m", "1", FinishReason::kStop, 2, table_.end(slot)}, objects.view(), "ab");
  EXPECT_EQ(out_.view(), expected.view());
}

TEST_F(StreamTableTest, ASlotsNextStreamStartsClean) {
  const std::uint32_t slot = submit();
  table_.set_format(slot, StreamFormat::kJson);
  table_.pause(slot, true);
  write(slot, 0, "a");
  write_end(slot, FinishReason::kError, StreamError::kModelFailed);
  table_.drain(slot, out_);
  table_.close(slot);
  ASSERT_EQ(table_.submit(spec(), 0), slot);
  EXPECT_FALSE(table_.ended(slot));
  EXPECT_EQ(table_.error(slot), StreamError::kNone);
  EXPECT_EQ(table_.finish(slot), FinishReason::kNone);
  EXPECT_EQ(table_.generated(slot), 0U);
  EXPECT_EQ(table_.end(slot).prompt_tokens, 0U);
  EXPECT_EQ(table_.format(slot), StreamFormat::kTokens);
  EXPECT_EQ(flags(slot), 0U);
  table_.set_format(slot, StreamFormat::kJson);
  write_end(slot, FinishReason::kStop);
  table_.drain(slot, out_);
  table_.finish_json(slot, out_);
  EXPECT_NE(out_.view().find(R"("tokens":[])"), std::string_view::npos) << out_.view();
}

TEST_F(StreamTableTest, AClosedStreamIsCancelledAndItsSlotComesBackWithItsLastRecord) {
  const std::uint32_t slot = submit();
  write(slot, 0, "a");
  const std::uint32_t epoch = channel_->header().control_epoch.load();
  channel_->worker_bell().arm();
  table_.close(slot);
  EXPECT_EQ(flags(slot), static_cast<std::uint32_t>(SlotControl::kCancel));
  EXPECT_NE(channel_->header().control_epoch.load(), epoch);
  EXPECT_TRUE(is_signalled(channel_->worker_bell_fd()));
  EXPECT_EQ(table_.open_streams(), 1U);
  EXPECT_NE(submit(), slot);

  for (std::uint32_t i = 1; i < 50; ++i) {  // nobody reads it any more, and it fills nothing up
    write(slot, i, "x");
    EXPECT_TRUE(collect().empty());
  }
  EXPECT_FALSE(table_.next(slot));
  write_end(slot, FinishReason::kCancelled);
  EXPECT_TRUE(collect().empty());
  EXPECT_EQ(table_.open_streams(), 1U);
  EXPECT_EQ(submit(), slot);
}

TEST_F(StreamTableTest, CloseFindsALastRecordThatLiesThere) {
  const std::uint32_t slot = submit();
  write(slot, 0, "a");
  write_end(slot, FinishReason::kStop);
  table_.close(slot);
  EXPECT_EQ(table_.open_streams(), 0U);
  EXPECT_EQ(submit(), slot);
  EXPECT_FALSE(table_.next(slot)) << "a record of the stream before";
}

TEST_F(StreamTableTest, AFailedStreamIsCancelledAndKeepsItsSlotUntilItsLastRecord) {
  const std::uint32_t slot = submit();
  table_.fail(slot, StreamError::kTimeout);
  EXPECT_TRUE(table_.ended(slot));
  EXPECT_EQ(table_.finish(slot), FinishReason::kError);
  EXPECT_EQ(table_.error(slot), StreamError::kTimeout);
  EXPECT_EQ(flags(slot), static_cast<std::uint32_t>(SlotControl::kCancel));
  table_.fail(slot, StreamError::kModelFailed);
  EXPECT_EQ(table_.error(slot), StreamError::kTimeout) << "the first error stays";
  write(slot, 0, "late");
  EXPECT_FALSE(table_.next(slot));
  EXPECT_EQ(table_.drain(slot, out_), 0U);
  table_.close(slot);
  EXPECT_EQ(table_.open_streams(), 1U);
  write_end(slot, FinishReason::kCancelled);
  collect();
  EXPECT_EQ(table_.open_streams(), 0U);
}

// What the worker had published before it died is its reader's still.
TEST_F(StreamTableTest, FailAllEndsEveryStreamBehindWhatItsRingHolds) {
  const std::uint32_t read = submit(), open = submit(), closed = submit(), empty = submit(), whole = submit();
  write_end(read, FinishReason::kStop);
  table_.next(read);
  table_.close(closed);
  write(open, 0, "a");
  write(whole, 0, "b");
  write_end(whole, FinishReason::kStop);
  EXPECT_EQ(table_.fail_all(), (std::vector{open, empty, whole}));
  EXPECT_TRUE(table_.ended(empty));
  EXPECT_EQ(table_.error(empty), StreamError::kWorkerDied);
  EXPECT_EQ(table_.finish(read), FinishReason::kStop);

  EXPECT_FALSE(table_.ended(open));
  EXPECT_EQ(table_.next(open)->text, "a");
  EXPECT_FALSE(table_.next(open));
  EXPECT_EQ(table_.error(open), StreamError::kWorkerDied);
  EXPECT_EQ(table_.finish(open), FinishReason::kError);

  table_.set_format(whole, StreamFormat::kEvents);
  EXPECT_EQ(table_.drain(whole, out_), 1U);
  EXPECT_EQ(table_.error(whole), StreamError::kNone) << "its last record was there";
  EXPECT_EQ(table_.finish(whole), FinishReason::kStop);

  EXPECT_TRUE(collect().empty());
  EXPECT_FALSE(table_.submit(spec(), 0));
  EXPECT_FALSE(table_.open(0));
  EXPECT_TRUE(table_.fail_all().empty());
  for (const std::uint32_t slot : {read, open, empty, whole}) table_.close(slot);
  EXPECT_EQ(table_.open_streams(), 0U);
}

TEST_F(StreamTableTest, LongestWaitIsForTheWorkerNotTheReader) {
  EXPECT_EQ(table_.longest_wait_ns(), 0);
  const std::uint32_t first = submit();
  clock_.advance(10 * kMs);
  const std::uint32_t second = submit();
  clock_.advance(5 * kMs);
  EXPECT_EQ(table_.longest_wait_ns(), 15 * kMs);
  write(first, 0, "a");
  EXPECT_EQ(table_.longest_wait_ns(), 5 * kMs);
  table_.close(second);
  EXPECT_EQ(table_.longest_wait_ns(), 5 * kMs) << "its last record is waited for";
  write_end(second, FinishReason::kCancelled);
  collect();
  EXPECT_EQ(table_.longest_wait_ns(), 0);
}

TEST_F(StreamTableTest, OverdueIsWithoutATokenForLongerThanAllowed) {
  const std::uint32_t bounded = table_.submit(spec(), 100 * kMs).value();
  submit();  // without a bound
  clock_.advance(100 * kMs);
  EXPECT_TRUE(table_.overdue().empty());
  clock_.advance(1);
  EXPECT_EQ(table_.overdue(), (std::vector{bounded}));
  write(bounded, 0, "a");
  EXPECT_TRUE(table_.overdue().empty()) << "a token that waits for its reader is not the model's silence";
  table_.next(bounded);
  EXPECT_EQ(table_.last_progress_ns(bounded), clock_.now_ns());
  clock_.advance(100 * kMs);
  EXPECT_TRUE(table_.overdue().empty());
  clock_.advance(1);
  EXPECT_EQ(table_.overdue(), (std::vector{bounded}));
  write_end(bounded, FinishReason::kStop);
  table_.next(bounded);
  EXPECT_TRUE(table_.overdue().empty());
}

TEST_F(StreamTableTest, ARecordThatCannotBeEndsItsStream) {
  for (const bool by_drain : {false, true}) {
    const std::uint32_t slot = submit();
    write(slot, 0, "abc");
    // A TokenWriter sets the sizes by itself, so the lie is written behind its back.
    SpscRing<>::Consumer peek = channel_->token_reader(slot);
    TokenHeader lie;
    lie.text_bytes = 1000;
    std::memcpy(const_cast<std::byte*>(peek.front().data()), &lie, sizeof lie);
    table_.set_format(slot, StreamFormat::kEvents);
    by_drain ? static_cast<void>(table_.drain(slot, out_)) : static_cast<void>(table_.next(slot));
    EXPECT_TRUE(table_.ended(slot));
    EXPECT_EQ(table_.finish(slot), FinishReason::kError);
    EXPECT_EQ(table_.error(slot), StreamError::kWorkerDied);
    EXPECT_TRUE(out_.empty());
  }
}

TEST_F(StreamTableTest, PushFeedsAStreamOfThisProcess) {
  const std::uint32_t slot = table_.open(0).value();
  channel_->front_bell().arm();
  EXPECT_TRUE(table_.push(slot, "he", 1, -0.5F, false));
  EXPECT_TRUE(is_signalled(channel_->front_bell_fd()));
  EXPECT_EQ(collect(), (std::vector{slot}));
  EXPECT_TRUE(table_.push(slot, "", 2, kNoLogprob, true));
  EXPECT_EQ(table_.next(slot)->text, "he");
  const std::optional<TokenView> special = table_.next(slot);
  EXPECT_TRUE(special->special);
  EXPECT_EQ(special->index, 1U);
  EXPECT_TRUE(table_.push_end(slot));
  EXPECT_FALSE(table_.push_end(slot));
  EXPECT_FALSE(table_.push(slot, "late", 3, 0.0F, false));
  EXPECT_FALSE(table_.next(slot));
  EXPECT_TRUE(table_.ended(slot));
  EXPECT_EQ(table_.finish(slot), FinishReason::kStop);
  table_.close(slot);
  EXPECT_EQ(table_.open_streams(), 0U);
}

TEST_F(StreamTableTest, PushIsRefusedWhereTheReaderIsBehind) {
  const std::uint32_t slot = table_.open(0).value();
  int pushed = 0;
  while (pushed < 100 && table_.push(slot, "x", 1, 0.0F, false)) ++pushed;
  EXPECT_EQ(pushed, static_cast<int>(kShape.ring_records));
  EXPECT_TRUE(table_.next(slot));
  EXPECT_TRUE(table_.push(slot, "x", 1, 0.0F, false));
  EXPECT_FALSE(table_.push(slot, "x", 1, 0.0F, false));
  EXPECT_TRUE(table_.push_end(slot)) << "the end has room of its own";
  int read = 1;
  while (table_.next(slot)) ++read;
  EXPECT_EQ(read, pushed + 1);
  EXPECT_TRUE(table_.ended(slot));
}

TEST_F(StreamTableTest, PushTakesTheLongestTextAndNoLonger) {
  const std::uint32_t slot = table_.open(0).value();
  const std::string longest(kMaxPushedTextBytes, 'x');
  for (int round = 0; round < 50; ++round) {  // wherever in the ring it falls
    EXPECT_FALSE(table_.push(slot, longest + "x", 1, 0.0F, false));
    ASSERT_TRUE(table_.push(slot, longest, 1, 0.0F, false));
    ASSERT_EQ(table_.next(slot)->text, longest);
    ASSERT_TRUE(table_.push(slot, std::string(static_cast<std::size_t>(round) * 7, 'y'), 1, 0.0F, false));
    ASSERT_TRUE(table_.next(slot));
  }
  ASSERT_TRUE(table_.push(slot, longest, 1, 0.0F, false));
  EXPECT_TRUE(table_.push_end(slot)) << "the end has room of its own";
  EXPECT_TRUE(table_.next(slot));
  EXPECT_FALSE(table_.next(slot));
  EXPECT_EQ(table_.finish(slot), FinishReason::kStop);
}

TEST_F(StreamTableTest, ClosingAPushedStreamGivesItsSlotBackAtOnce) {
  for (int round = 0; round < 3; ++round) {
    const std::uint32_t slot = table_.open(0).value();
    EXPECT_EQ(slot, 0U);
    EXPECT_TRUE(table_.push(slot, "x", 1, 0.0F, false));
    if (round == 1) table_.fail(slot, StreamError::kTimeout);
    EXPECT_EQ(table_.push(slot, "y", 1, 0.0F, false), round != 1);
    table_.close(slot);
    EXPECT_EQ(table_.open_streams(), 0U);
    EXPECT_FALSE(table_.push(slot, "z", 1, 0.0F, false));
  }
}

TEST_F(StreamTableTest, ArmsOnlyWhereNothingCameMeanwhile) {
  const std::uint32_t slot = submit();
  EXPECT_TRUE(table_.arm());
  write(slot, 0, "a");
  channel_->front_bell().ring();
  EXPECT_TRUE(is_signalled(channel_->front_bell_fd()));
  channel_->front_bell().consume();
  EXPECT_FALSE(table_.arm());
  channel_->front_bell().ring();
  EXPECT_FALSE(is_signalled(channel_->front_bell_fd()));
  collect();
  EXPECT_TRUE(table_.arm());
  table_.disarm();
  channel_->front_bell().ring();
  EXPECT_FALSE(is_signalled(channel_->front_bell_fd()));
}

TEST_F(StreamTableTest, TellsAStalledWorkerThatRingsWereRead) {
  channel_->worker_bell().arm();
  table_.rings_read();
  EXPECT_FALSE(is_signalled(channel_->worker_bell_fd())) << "nobody waits for it";
  channel_->header().worker_stalled.store(1);
  table_.rings_read();
  EXPECT_TRUE(is_signalled(channel_->worker_bell_fd()));
  EXPECT_EQ(channel_->header().worker_stalled.load(), 0U);
}

TEST_F(StreamTableTest, PauseIsAFlagOfTheSlot) {
  const std::uint32_t slot = submit();
  table_.pause(slot, true);
  EXPECT_EQ(flags(slot), static_cast<std::uint32_t>(SlotControl::kPause));
  table_.pause(slot, false);
  EXPECT_EQ(flags(slot), 0U);
}

}  // namespace
}  // namespace rts
