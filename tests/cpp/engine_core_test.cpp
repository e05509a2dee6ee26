#include "rts/engine_core.hpp"

#include <gtest/gtest.h>
#include <poll.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "rts/stream_table.hpp"
#include "step_arrays.hpp"

namespace {

std::size_t allocations = 0;
std::size_t sequences_made = 0;

void* allocate(std::size_t bytes) {
  ++allocations;
  if (bytes == sizeof(rts::Sequence)) ++sequences_made;
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
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace rts {
namespace {

constexpr std::int64_t kMs = 1'000'000;

// a … z, then one that ends and one that only is special. The fake model says the token after the last one.
constexpr std::int32_t kEos = 26, kSpecialToken = 27, kVocabulary = 28;

std::shared_ptr<Vocabulary> alphabet() {
  std::vector<std::string> tokens;
  for (char letter = 'a'; letter <= 'z'; ++letter) tokens.emplace_back(1, letter);
  tokens.insert(tokens.end(), {"</s>", "<tool>"});
  return std::make_shared<Vocabulary>(tokens, std::vector{kEos, kSpecialToken}, std::vector{kEos});
}

EngineConfig small() {
  return {.scheduler = {.max_sequences = 4, .token_budget = 16, .block_size = 4, .num_blocks = 64, .max_context = 64},
          .max_queue = 32};
}
ChannelConfig channel_config() {
  return {.slots = 8, .ring_records = 6, .lane_bytes = 1 << 14};
}

StreamSpec request(std::vector<std::int32_t> prompt, std::int32_t max_tokens) {
  StreamSpec spec;
  spec.prompt = std::move(prompt);
  spec.sampling.max_tokens = max_tokens;
  spec.sampling.temperature = 0;
  return spec;
}

// Both ends of a channel, and a model, in one thread.
class EngineCoreTest : public testing::Test, protected StepArrays {
 protected:
  explicit EngineCoreTest(const EngineConfig& config = small(), const ChannelConfig& shape = channel_config())
      : StepArrays(config.scheduler),
        channel_(Channel::create(shape, false)),
        table_(channel_, clock_),
        core_(config, alphabet(), clock_) {
    core_.bind_buffers(buffers(), sampled_.data(), logprobs_.data());
    core_.attach(channel_);
  }

  std::uint32_t submit(StreamSpec spec) {
    const std::optional<std::uint32_t> slot = table_.submit(std::move(spec), 0);
    EXPECT_TRUE(slot.has_value());
    return slot.value_or(0);
  }

  std::int32_t next_of(std::int32_t token) const { return (token + 1) % kVocabulary; }
  void run_model(const StepShape& shape) {
    for (std::uint32_t i = 0; i < shape.samples; ++i) {
      sampled_[i] = next_of(tokens_[static_cast<std::size_t>(logits_at_[i])]);
      logprobs_[i] = -0.5F;
    }
  }
  bool step() {
    const std::optional<StepShape> shape = core_.schedule();
    if (!shape) return false;
    run_model(*shape);
    clock_.advance(kMs);
    core_.commit();
    return true;
  }
  int steps(int most = 1000) {
    int count = 0;
    while (count < most && step()) ++count;
    return count;
  }

  // All that there is for a slot's reader at the moment.
  std::string read(std::uint32_t slot) {
    std::string text;
    table_.collect();
    while (const std::optional<TokenView> token = table_.next(slot)) {
      EXPECT_EQ(token->index, table_.generated(slot) - 1);
      text += token->text;
    }
    table_.rings_read();
    return text;
  }
  std::string run(StreamSpec spec, FinishReason expected) {
    const std::uint32_t slot = submit(std::move(spec));
    std::string text;
    for (int i = 0; i < 200 && !table_.ended(slot); ++i) {
      steps();
      text += read(slot);
    }
    EXPECT_EQ(table_.finish(slot), expected);
    EXPECT_EQ(table_.error(slot), StreamError::kNone);
    last_end_ = table_.end(slot);
    last_tokens_ = table_.generated(slot);
    table_.close(slot);
    return text;
  }

  // Every row, block and slot is free again: requests that need them all run at once.
  void expect_nothing_leaked(const EngineConfig& config = small()) {
    table_.collect();
    EXPECT_EQ(table_.open_streams(), 0U);
    const auto context = static_cast<std::int32_t>(config.scheduler.max_context);
    ASSERT_EQ(config.scheduler.num_blocks * config.scheduler.block_size,
              config.scheduler.max_sequences * config.scheduler.max_context);
    std::vector<std::uint32_t> slots;
    for (std::uint32_t i = 0; i < channel_->config().slots; ++i) slots.push_back(submit(request({1}, context)));
    EXPECT_FALSE(table_.submit(request({1}, 1), 0));
    const std::optional<StepShape> shape = core_.schedule();
    ASSERT_TRUE(shape);
    EXPECT_EQ(shape->sequences, config.scheduler.max_sequences);
    run_model(*shape);
    core_.commit();
    for (const std::uint32_t slot : slots) table_.close(slot);
    core_.schedule();
    table_.collect();
    EXPECT_EQ(table_.open_streams(), 0U);
  }

  static bool is_signalled(int fd) {
    pollfd poll_fd{fd, POLLIN, 0};
    return ::poll(&poll_fd, 1, 0) > 0;
  }

  ManualClock clock_{1000 * kMs};
  std::shared_ptr<Channel> channel_;
  StreamTable table_;
  EngineCore core_;
  EndExtension last_end_;
  std::uint32_t last_tokens_ = 0;
};

TEST_F(EngineCoreTest, NothingToDoIsNoStep) {
  EXPECT_FALSE(core_.schedule());
}

TEST_F(EngineCoreTest, RunsARequestToItsLength) {
  EXPECT_EQ(run(request({0, 1, 2}, 5), FinishReason::kLength), "defgh");
  EXPECT_EQ(last_tokens_, 5U);
  EXPECT_EQ(last_end_.prompt_tokens, 3U);
  expect_nothing_leaked();
}

TEST_F(EngineCoreTest, StopsAtTheEndToken) {
  EXPECT_EQ(run(request({22}, 50), FinishReason::kStop), "xyz");
  EXPECT_EQ(last_tokens_, 4U);
}

TEST_F(EngineCoreTest, IgnoreEosGoesOn) {
  StreamSpec spec = request({22}, 8);
  spec.sampling.flags = SamplingParams::kIgnoreEos;
  EXPECT_EQ(run(std::move(spec), FinishReason::kLength), "xyzabc");
}

TEST_F(EngineCoreTest, StopsAtAStopString) {
  StreamSpec spec = request({0}, 50);
  spec.stops = {"nope", "fg"};
  EXPECT_EQ(run(std::move(spec), FinishReason::kStop), "bcde");
  EXPECT_EQ(last_tokens_, 6U);
}

TEST_F(EngineCoreTest, HeldBackTextComesOutAtTheEnd) {
  StreamSpec spec = request({0}, 4);
  spec.stops = {"defgh"};
  EXPECT_EQ(run(std::move(spec), FinishReason::kLength), "bcde");
}

// The last token that is allowed may also be the end, or complete a stop string.
TEST_F(EngineCoreTest, AStopOnTheLastTokenIsAStop) {
  EXPECT_EQ(run(request({22}, 4), FinishReason::kStop), "xyz");
  StreamSpec spec = request({0}, 3);
  spec.stops = {"cd"};
  EXPECT_EQ(run(std::move(spec), FinishReason::kStop), "b");
  EXPECT_EQ(run(request({22}, 3), FinishReason::kLength), "xyz");
  std::vector<std::int32_t> prompt(60, 0);
  prompt.back() = 22;
  EXPECT_EQ(run(request(std::move(prompt), 50), FinishReason::kStop), "xyz");  // and on the context's last
  expect_nothing_leaked();
}

TEST_F(EngineCoreTest, TheContextEndsAsLength) {
  EXPECT_EQ(run(request(std::vector<std::int32_t>(60, 0), 50), FinishReason::kLength), "bcde");
}

TEST_F(EngineCoreTest, TimingsAreTheClocks) {
  const std::uint32_t slot = submit(request(std::vector<std::int32_t>(40, 0), 5));
  clock_.advance(7 * kMs);
  steps();
  read(slot);
  EXPECT_EQ(table_.end(slot).queue_ns, 7 * kMs);
  EXPECT_EQ(table_.end(slot).prefill_ns, 3 * kMs);  // 40 positions at 16 a step
  EXPECT_EQ(table_.end(slot).decode_ns, 4 * kMs);
  EXPECT_EQ(table_.end(slot).stalled_ns, 0);
}

TEST_F(EngineCoreTest, LogprobsGoToThoseWhoAsked) {
  StreamSpec spec = request({0}, 1);
  const std::uint32_t silent = submit(spec);
  spec.sampling.flags = SamplingParams::kLogprobs;
  const std::uint32_t asked = submit(spec);
  steps();
  table_.collect();
  EXPECT_TRUE(std::isnan(table_.next(silent)->logprob));
  EXPECT_EQ(table_.next(asked)->logprob, -0.5F);
}

TEST_F(EngineCoreTest, SamplesFromLogits) {
  const std::uint32_t one = submit(request({0}, 2)), two = submit(request({5}, 2));
  const std::optional<StepShape> shape = core_.schedule();
  ASSERT_EQ(shape->samples, 2U);
  std::vector<float> logits(2 * kVocabulary, 0.0F);
  EXPECT_THROW(core_.sample({logits.data(), kVocabulary}), std::invalid_argument);
  logits[10] = 1.0F;
  logits[kVocabulary + 20] = 1.0F;
  core_.sample(logits);
  core_.commit();
  EXPECT_EQ(read(one), "k");
  EXPECT_EQ(read(two), "u");
}

TEST_F(EngineCoreTest, InvalidLogitsEndTheirSequenceOnly) {
  const std::uint32_t one = submit(request({0}, 3)), two = submit(request({5}, 3));
  step();
  const std::optional<StepShape> shape = core_.schedule();
  run_model(*shape);
  sampled_[0] = -1;
  core_.commit();
  steps();
  EXPECT_EQ(read(one), "b");
  EXPECT_EQ(table_.error(one), StreamError::kInvalidLogits);
  EXPECT_EQ(table_.finish(one), FinishReason::kError);
  EXPECT_EQ(read(two), "ghi");
  EXPECT_EQ(table_.finish(two), FinishReason::kLength);
  table_.close(one);
  table_.close(two);
  expect_nothing_leaked();
}

TEST_F(EngineCoreTest, AFailedStepEndsItsSequencesOnly) {
  std::vector<std::uint32_t> slots;
  for (int i = 0; i < 4; ++i) slots.push_back(submit(request({0}, 20)));
  step();
  table_.pause(slots[3], true);
  const std::uint32_t waiting = submit(request({5}, 2));
  ASSERT_EQ(core_.schedule()->sequences, 3U);
  core_.abort();
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(read(slots[static_cast<std::size_t>(i)]), "b");
    EXPECT_EQ(table_.error(slots[static_cast<std::size_t>(i)]), StreamError::kModelFailed);
  }
  table_.pause(slots[3], false);
  step();  // the first of those that decode is alone, so that it is known what one takes
  step();
  step();
  EXPECT_EQ(read(slots[3]), "bcde");
  EXPECT_EQ(read(waiting), "gh");
  EXPECT_EQ(table_.finish(waiting), FinishReason::kLength);
  slots.push_back(waiting);
  for (const std::uint32_t slot : slots) table_.close(slot);
  steps();
  expect_nothing_leaked();
}

TEST_F(EngineCoreTest, CancelsWhileWaitingRunningAndAfter) {
  std::vector<std::uint32_t> running;
  for (int i = 0; i < 4; ++i) running.push_back(submit(request({0}, 50)));
  step();
  const std::uint32_t waiting = submit(request({0}, 5)), in_lane = submit(request({0}, 5));
  step();
  EXPECT_EQ(table_.open_streams(), 6U);
  for (const std::uint32_t slot : {waiting, in_lane, running[1]}) table_.close(slot);
  const std::uint32_t never_seen = submit(request({0}, 5));
  table_.close(never_seen);
  EXPECT_EQ(core_.schedule()->sequences, 3U);
  run_model({0, 3, 3});
  core_.commit();
  table_.collect();
  EXPECT_EQ(table_.open_streams(), 3U);
  table_.close(running[0]);
  table_.close(running[2]);
  table_.close(running[3]);
  EXPECT_FALSE(step());
  const std::uint32_t done = submit(request({0}, 1));
  steps();
  table_.close(done);  // its last record lies in the ring already
  EXPECT_FALSE(step());
  expect_nothing_leaked();
}

TEST_F(EngineCoreTest, PausesAndResumes) {
  const std::uint32_t one = submit(request({0}, 5)), two = submit(request({0}, 5));
  step();
  table_.pause(one, true);
  step();
  step();
  EXPECT_EQ(read(one), "b");
  EXPECT_EQ(read(two), "bcd");
  table_.pause(one, false);
  steps();
  EXPECT_EQ(read(one), "cdef");
  EXPECT_EQ(read(two), "ef");
  EXPECT_EQ(table_.finish(one), FinishReason::kLength);
}

TEST_F(EngineCoreTest, ARequestMayComePaused) {
  const std::uint32_t slot = submit(request({0}, 3));
  table_.pause(slot, true);
  EXPECT_FALSE(step());
  table_.pause(slot, false);
  EXPECT_EQ(steps(), 3);
  EXPECT_EQ(read(slot), "bcd");
}

TEST_F(EngineCoreTest, ASlowReaderStallsItsSequenceOnly) {
  const std::uint32_t slow = submit(request({0}, 20)), fast = submit(request({0}, 20));
  std::string fast_text;
  for (int i = 0; i < 15; ++i) {
    step();
    fast_text += read(fast);
  }
  EXPECT_EQ(fast_text, "bcdefghijklmnop");
  EXPECT_GE(table_.buffered(slow), channel_config().ring_records);
  const std::uint32_t buffered = table_.buffered(slow);
  while (step()) fast_text += read(fast);
  EXPECT_EQ(fast_text, "bcdefghijklmnopqrstu");
  EXPECT_EQ(table_.buffered(slow), buffered) << "a full ring takes no more";
  EXPECT_FALSE(table_.ended(slow));

  std::string slow_text = read(slow);
  EXPECT_LT(slow_text.size(), 20U);
  clock_.advance(1000 * kMs);
  for (int i = 0; i < 10; ++i) {
    steps();
    slow_text += read(slow);
  }
  EXPECT_EQ(slow_text, "bcdefghijklmnopqrstu");
  EXPECT_EQ(table_.finish(slow), FinishReason::kLength);
  EXPECT_GT(table_.end(slow).stalled_ns, 1000 * kMs);
  EXPECT_EQ(table_.end(fast).stalled_ns, 0);
  table_.close(slow);
  table_.close(fast);
  expect_nothing_leaked();
}

// The worker sleeps with a stalled sequence; reading its ring wakes it, whatever a front end did just before it slept.
TEST_F(EngineCoreTest, ReadingAStalledRingWakesTheSleepingWorker) {
  const std::uint32_t slot = submit(request({0}, 20));
  steps();
  EXPECT_FALSE(table_.ended(slot));
  core_.schedule();
  table_.rings_read();  // its bell is not armed yet: nobody is woken by this
  std::thread worker([this] { core_.wait(); });
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (channel_->header().worker_stalled.load() == 0 && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
  EXPECT_EQ(channel_->header().worker_stalled.load(), 1U) << "it sleeps without asking for room";
  table_.collect();
  EXPECT_TRUE(table_.next(slot));
  table_.rings_read();
  if (HasFailure()) core_.interrupt();
  worker.join();
  channel_->worker_bell().arm();
  table_.rings_read();
  EXPECT_FALSE(is_signalled(channel_->worker_bell_fd())) << "once is enough";
  EXPECT_TRUE(step());
}

TEST_F(EngineCoreTest, AStalledOneCanBeCancelledAndPaused) {
  const std::uint32_t one = submit(request({0}, 20)), two = submit(request({0}, 20));
  steps();
  table_.pause(one, true);
  EXPECT_FALSE(step());
  const std::string first = read(one);
  EXPECT_FALSE(step()) << "its ring has room, but it is paused";
  table_.pause(one, false);
  EXPECT_TRUE(step());
  table_.close(two);
  steps();
  table_.close(one);
  steps();
  expect_nothing_leaked();
}

// Its memory may be another sequence's by the time that its ring has room.
TEST_F(EngineCoreTest, AStalledOneThatEndsIsForgotten) {
  const std::uint32_t slow = submit(request({0}, 20));
  steps();
  table_.fail(slow, StreamError::kTimeout);  // its ring stays full
  EXPECT_FALSE(step());
  const std::uint32_t next = submit(request({5}, 4));
  step();
  table_.close(slow);  // now it has room
  steps();
  EXPECT_EQ(read(next), "ghij");
  EXPECT_EQ(table_.end(next).stalled_ns, 0);
}

TEST_F(EngineCoreTest, WaitReturnsAtOnceForWhatIsThere) {
  core_.interrupt();
  core_.wait();
  const std::uint32_t slot = submit(request({0}, 20));
  core_.wait();
  step();
  table_.pause(slot, true);
  core_.wait();
  table_.pause(slot, false);
  core_.wait();
  steps();
  table_.collect();
  table_.next(slot);
  core_.wait();  // a stalled one has room
  EXPECT_TRUE(step());
}

// Else the next sleep would be none, and the one after it: a worker without work would spin.
TEST_F(EngineCoreTest, WaitLeavesNothingThatWouldWakeTheNextSleep) {
  channel_->worker_bell().arm();
  const std::uint32_t slot = submit(request({0}, 2));
  ASSERT_TRUE(is_signalled(channel_->worker_bell_fd()));
  core_.wait();
  EXPECT_FALSE(is_signalled(channel_->worker_bell_fd()));
  steps();
  EXPECT_EQ(read(slot), "bc");
}

TEST_F(EngineCoreTest, RingsTheFrontEndOnceAStep) {
  submit(request({0}, 5));
  submit(request({1}, 5));
  channel_->front_bell().arm();
  step();
  EXPECT_TRUE(is_signalled(channel_->front_bell_fd()));
  channel_->front_bell().consume();
  step();
  EXPECT_FALSE(is_signalled(channel_->front_bell_fd())) << "nobody sleeps";
  EXPECT_EQ(channel_->header().steps.load(), 2U);
}

TEST_F(EngineCoreTest, ASilentStreamIsOverdueAndCancelled) {
  const std::uint32_t slot = table_.submit(request({0}, 50), 100 * kMs).value();
  step();
  clock_.advance(101 * kMs);
  EXPECT_TRUE(table_.overdue().empty()) << "a token waits for its reader";
  EXPECT_EQ(read(slot), "b");
  clock_.advance(100 * kMs);
  EXPECT_TRUE(table_.overdue().empty());
  clock_.advance(1);
  ASSERT_EQ(table_.overdue(), (std::vector{slot}));
  table_.fail(slot, StreamError::kTimeout);
  EXPECT_TRUE(table_.ended(slot));
  EXPECT_EQ(table_.error(slot), StreamError::kTimeout);
  EXPECT_TRUE(table_.overdue().empty());
  EXPECT_FALSE(step()) << "the worker is told to stop";
  table_.close(slot);
  expect_nothing_leaked();
}

TEST_F(EngineCoreTest, ASlotIsReusedOnlyAfterItsLastRecordWasRead) {
  std::vector<std::uint32_t> slots;
  for (std::uint32_t i = 0; i < channel_config().slots; ++i) slots.push_back(submit(request({0}, 50)));
  step();
  table_.close(slots[2]);
  EXPECT_FALSE(table_.submit(request({0}, 1), 0)) << "the worker has not let go of it";
  step();
  EXPECT_FALSE(table_.submit(request({0}, 1), 0)) << "its last record is not read";
  table_.collect();
  const std::optional<std::uint32_t> again = table_.submit(request({7}, 1), 0);
  ASSERT_EQ(again, slots[2]);
  for (const std::uint32_t slot : slots) {
    if (slot != *again) table_.close(slot);
  }
  step();
  EXPECT_EQ(read(*again), "i") << "and nothing of the one before";
}

TEST_F(EngineCoreTest, DetachEndsItsStreamsInWhateverState) {
  std::vector<std::uint32_t> slots;
  for (int i = 0; i < 6; ++i) slots.push_back(submit(request({0}, 50)));
  step();
  slots.push_back(submit(request({0}, 50)));  // in its lane still
  core_.detach(*channel_);
  for (const std::uint32_t slot : slots) {
    read(slot);
    EXPECT_TRUE(table_.ended(slot));
    EXPECT_EQ(table_.finish(slot), FinishReason::kCancelled);
    table_.close(slot);
  }
  EXPECT_EQ(table_.open_streams(), 0U);
  EXPECT_FALSE(step());
  core_.attach(channel_);
  expect_nothing_leaked();
}

TEST_F(EngineCoreTest, DetachInTheMiddleOfAStep) {
  for (const bool fails : {false, true}) {
    const std::uint32_t slot = submit(request({0}, 50));
    const std::optional<StepShape> shape = core_.schedule();
    ASSERT_TRUE(shape);
    core_.detach(*channel_);
    run_model(*shape);
    fails ? core_.abort() : core_.commit();
    EXPECT_EQ(read(slot), "");
    EXPECT_EQ(table_.finish(slot), FinishReason::kCancelled);
    table_.close(slot);
    core_.attach(channel_);
    expect_nothing_leaked();
  }
}

TEST_F(EngineCoreTest, ServesSeveralChannels) {
  const std::shared_ptr<Channel> other = Channel::create(channel_config(), false);
  StreamTable other_table(other, clock_);
  core_.attach(other);
  const std::uint32_t here = submit(request({0}, 5));
  const std::uint32_t there = other_table.submit(request({10}, 5), 0).value();
  step();
  core_.detach(*channel_);
  steps();
  EXPECT_EQ(read(here), "b");
  EXPECT_EQ(table_.finish(here), FinishReason::kCancelled);
  other_table.collect();
  std::string text;
  while (const auto token = other_table.next(there)) text += token->text;
  EXPECT_EQ(text, "lmnop");
  EXPECT_EQ(other_table.finish(there), FinishReason::kLength);
  core_.close();
  EXPECT_FALSE(step());
}

// One runs, and two may wait.
class FullQueueTest : public EngineCoreTest {
 protected:
  FullQueueTest()
      : EngineCoreTest(
            {.scheduler = {.max_sequences = 1, .token_budget = 4, .block_size = 4, .num_blocks = 4, .max_context = 16},
             .max_queue = 1}) {}
};

// It leaves requests in their lanes. Their flags are orders, and hold once they are taken in.
TEST_F(FullQueueTest, FlagsHoldForRequestsThatHadToWaitOutside) {
  const std::uint32_t running = submit(request({0}, 6));
  step();
  const std::uint32_t first = submit(request({0}, 6)), second = submit(request({0}, 6));
  const std::uint32_t outside = submit(request({0}, 6));
  step();
  ASSERT_FALSE(channel_->lanes().empty());
  table_.close(outside);
  step();
  ASSERT_FALSE(channel_->lanes().empty()) << "its flag was seen before it was";
  int count = 3;
  for (int i = 0; i < 40; ++i) {
    for (const std::uint32_t slot : {running, first, second}) read(slot);
    count += step() ? 1 : 0;
  }
  for (const std::uint32_t slot : {running, first, second}) EXPECT_EQ(table_.finish(slot), FinishReason::kLength);
  EXPECT_EQ(count, 3 * 6) << "the cancelled one was run";
  EXPECT_EQ(table_.open_streams(), 3U);
}

// Submit records as another process could write them.
class SubmitRecordTest : public EngineCoreTest {
 protected:
  struct Record {
    SubmitHeader header;
    std::vector<std::int32_t> ids{0, 1};
    std::vector<std::byte> tail;
  };

  Record record(std::uint32_t slot) {
    Record record;
    record.header.slot = slot;
    record.header.prompt_tokens = 2;
    record.header.sampling.max_tokens = 2;
    record.header.sampling.temperature = 0;
    record.header.arrival_ns = clock_.now_ns();
    return record;
  }
  static void add_stop(Record& record, const std::string& stop) {
    const TailHeader header{TailHeader::kStopString, 0, static_cast<std::uint32_t>(stop.size())};
    const std::span<const std::byte> bytes = std::as_bytes(std::span(&header, 1));
    record.tail.insert(record.tail.end(), bytes.begin(), bytes.end());
    for (const char letter : stop) record.tail.push_back(static_cast<std::byte>(letter));
    record.tail.resize(align_up(record.tail.size(), 4));
    record.header.tail_bytes = static_cast<std::uint32_t>(record.tail.size());
  }
  void push(const Record& record) {
    ASSERT_TRUE(channel_->lanes().push(Priority::kNormal, std::span(&record.header, 1), record.ids, record.tail));
  }

  // What the reader of a slot finds.
  std::vector<TokenHeader> answer(std::uint32_t slot) {
    SpscRing<>::Consumer reader = channel_->token_reader(slot);
    std::vector<TokenHeader> headers;
    for (auto bytes = reader.front(); !bytes.empty(); bytes = reader.front()) {
      headers.push_back(TokenRecord(bytes).header);
      reader.pop();
    }
    reader.release();
    return headers;
  }
  // A neighbour runs to its end, whatever is refused beside it.
  void expect_refused(const Record& bad) {
    constexpr std::uint32_t kNeighbour = 7;
    push(record(kNeighbour));
    push(bad);
    steps();
    const std::vector<TokenHeader> refused = answer(bad.header.slot);
    ASSERT_EQ(refused.size(), 1U);
    EXPECT_EQ(refused[0].flags, TokenHeader::kEnd);
    EXPECT_EQ(refused[0].finish, FinishReason::kError);
    EXPECT_EQ(refused[0].error, StreamError::kInvalidRequest);
    const std::vector<TokenHeader> neighbour = answer(kNeighbour);
    ASSERT_EQ(neighbour.size(), 3U);
    EXPECT_EQ(neighbour[2].finish, FinishReason::kLength);
  }
};

TEST_F(SubmitRecordTest, AGoodOneRuns) {
  Record good = record(3);
  add_stop(good, "zz");
  push(good);
  steps();
  EXPECT_EQ(answer(3).size(), 3U);
}

TEST_F(SubmitRecordTest, RefusesBadTokens) {
  for (const std::vector<std::int32_t>& ids : {std::vector{0, kVocabulary}, {-1, 0}, {0, 0x7FFFFFFF}}) {
    Record bad = record(3);
    bad.ids = ids;
    expect_refused(bad);
  }
}

TEST_F(SubmitRecordTest, RefusesSizesThatLie) {
  const std::vector<std::function<void(SubmitHeader&)>> lies{
      [](SubmitHeader& header) { header.prompt_tokens = 0; },
      [](SubmitHeader& header) { header.prompt_tokens = 3; },
      [](SubmitHeader& header) { header.prompt_tokens = 64; },
      [](SubmitHeader& header) { header.prompt_tokens = 0xFFFFFFFF; },
      [](SubmitHeader& header) { header.generated_tokens = 1; },
      [](SubmitHeader& header) { header.generated_tokens = 0xFFFFFFFF; },
      [](SubmitHeader& header) { header.tail_bytes = 4; },
      [](SubmitHeader& header) { header.tail_bytes = 0xFFFFFFFF; },
      [](SubmitHeader& header) { header.priority = static_cast<Priority>(3); },
      [](SubmitHeader& header) { header.priority = static_cast<Priority>(255); },
  };
  for (const auto& lie : lies) {
    Record bad = record(3);
    lie(bad.header);
    expect_refused(bad);
  }
}

TEST_F(SubmitRecordTest, RefusesATailThatLies) {
  Record bad = record(3);
  add_stop(bad, "stop");
  reinterpret_cast<TailHeader*>(bad.tail.data())->bytes = 5;
  expect_refused(bad);
  reinterpret_cast<TailHeader*>(bad.tail.data())->bytes = 0xFFFF;
  expect_refused(bad);
}

TEST_F(SubmitRecordTest, RefusesBadStopStrings) {
  Record bad = record(3);
  add_stop(bad, "");
  expect_refused(bad);
  bad = record(3);
  add_stop(bad, std::string(kMaxStopBytes + 1, 'x'));
  expect_refused(bad);
  bad = record(3);
  for (std::size_t i = 0; i <= kMaxStopStrings; ++i) add_stop(bad, "x");
  expect_refused(bad);
}

TEST_F(SubmitRecordTest, RefusesSamplingThatIsNone) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<std::pair<float SamplingParams::*, std::vector<float>>> wrong{
      {&SamplingParams::temperature, {kNan, -1.0F, kInfinity}},
      {&SamplingParams::top_p, {kNan, -0.1F, 1.1F}},
      {&SamplingParams::min_p, {kNan, -0.1F, 1.1F}},
      {&SamplingParams::repetition_penalty, {kNan, 0.0F, -1.0F, kInfinity}},
      {&SamplingParams::presence_penalty, {kNan, kInfinity}},
      {&SamplingParams::frequency_penalty, {kNan, -kInfinity}},
  };
  for (const auto& [field, values] : wrong) {
    for (const float value : values) {
      Record bad = record(3);
      bad.header.sampling.*field = value;
      expect_refused(bad);
    }
  }
  for (const std::int32_t max_tokens : {0, -1}) {
    Record bad = record(3);
    bad.header.sampling.max_tokens = max_tokens;
    expect_refused(bad);
  }
}

// One that is taken over with more than it may generate would need more blocks than were reserved for it.
TEST_F(SubmitRecordTest, RefusesMoreGeneratedTokensThanAskedFor) {
  Record bad = record(3);
  bad.ids.assign(40, 1);
  bad.header.generated_tokens = 38;
  expect_refused(bad);
  bad.header.sampling.max_tokens = 38;
  expect_refused(bad);
  Record good = record(3);
  good.ids.assign(40, 1);
  good.header.generated_tokens = 38;
  good.header.sampling.max_tokens = 39;
  push(good);
  steps();
  const std::vector<TokenHeader> headers = answer(3);
  ASSERT_EQ(headers.size(), 2U);
  EXPECT_EQ(headers[0].index, 38U);
}

TEST_F(SubmitRecordTest, DropsWhatHasNoStreamToAnswer) {
  Record bad = record(8);
  push(bad);
  bad.header.slot = 0xFFFFFFFF;
  push(bad);
  ASSERT_TRUE(channel_->lanes().push(Priority::kHigh, std::string("short")));
  Record first = record(3), second = record(3);
  second.ids = {10, 11};
  push(first);
  push(second);  // the slot is taken
  steps();
  const std::vector<TokenHeader> headers = answer(3);
  ASSERT_EQ(headers.size(), 3U);
  EXPECT_EQ(headers[0].token_id, 2);
}

TEST_F(SubmitRecordTest, SkipsTailEntriesOfUnknownType) {
  Record good = record(3);
  add_stop(good, "unknown!");
  reinterpret_cast<TailHeader*>(good.tail.data())->type = 99;
  add_stop(good, "c");
  push(good);
  steps();
  const std::vector<TokenHeader> headers = answer(3);
  ASSERT_EQ(headers.size(), 2U);
  EXPECT_EQ(headers[1].finish, FinishReason::kStop);
}

TEST_F(SubmitRecordTest, TakesAnyArrivalAndDeadline) {
  constexpr std::int64_t kLowest = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t kHighest = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t time : {kLowest, kHighest, std::int64_t{-1}}) {
    Record odd = record(3);
    odd.header.arrival_ns = odd.header.deadline_ns = time;
    push(odd);
    steps();
    EXPECT_EQ(answer(3).size(), 3U);
  }
}

TEST_F(EngineCoreTest, AllocatesNothingPerTokenOnceWarm) {
  std::vector<std::uint32_t> slots;
  const auto submit_all = [&](std::int32_t max_tokens) {
    slots.clear();
    for (std::uint32_t i = 0; i < 4; ++i) {
      StreamSpec spec = request({static_cast<std::int32_t>(i)}, max_tokens);
      spec.sampling.flags = SamplingParams::kIgnoreEos;
      spec.stops = {"never, never", "ever"};
      slots.push_back(submit(std::move(spec)));
      table_.set_format(slots.back(), StreamFormat::kEvents);
    }
  };
  FrameBuffer out;
  const auto round = [&] {
    step();
    for (const std::uint32_t slot : table_.collect()) table_.drain(slot, out);
    out.clear();
    table_.rings_read();
  };
  // Warm, but by sequences much shorter than those that are counted.
  submit_all(4);
  for (int i = 0; i < 10; ++i) round();
  for (const std::uint32_t slot : slots) table_.close(slot);
  submit_all(60);
  round();  // takes them in: a request may allocate, a token not
  const std::size_t before = allocations;
  for (int i = 0; i < 55; ++i) round();
  EXPECT_EQ(allocations, before);
  for (const std::uint32_t slot : slots) EXPECT_EQ(table_.generated(slot), 56U);
}

// Whatever ends a stream, everything that it held is back.
TEST_F(EngineCoreTest, NothingLeaksWhateverEndsAStream) {
  const char* const given = std::getenv("RTS_SEED");
  const std::uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  SCOPED_TRACE("RTS_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto one_in = [&](std::uint64_t n) { return random() % n == 0; };
  const std::size_t made_before = sequences_made;
  std::map<FinishReason, int> ends;
  std::map<StreamError, int> errors;
  struct Open {
    std::int32_t last;
    bool may_end_early;
  };
  std::map<std::uint32_t, Open> open;
  const auto close = [&](std::uint32_t slot) {
    if (table_.ended(slot)) {
      ++ends[table_.finish(slot)];
      ++errors[table_.error(slot)];
    }
    table_.close(slot);
    open.erase(slot);
  };
  for (int round = 0; round < 20'000; ++round) {
    if (one_in(3)) {
      StreamSpec spec = request(std::vector<std::int32_t>(1 + random() % 30, static_cast<std::int32_t>(random() % 26)),
                                static_cast<std::int32_t>(1 + random() % 20));
      if (one_in(20)) spec.prompt[0] = 1000;  // refused by the worker
      if (one_in(3)) spec.stops = {"xy", "d"};
      if (one_in(2)) spec.sampling.flags = SamplingParams::kIgnoreEos;
      spec.priority = static_cast<Priority>(random() % 3);
      const std::int32_t last = spec.prompt.back();
      if (const auto slot = table_.submit(std::move(spec), 50 * kMs)) open[*slot] = {last, false};
    }
    if (const std::optional<StepShape> shape = core_.schedule()) {
      run_model(*shape);
      if (shape->samples > 0 && one_in(40)) sampled_[random() % shape->samples] = -1;
      one_in(60) ? core_.abort() : core_.commit();
    }
    clock_.advance(static_cast<std::int64_t>(random() % 3) * kMs);
    table_.collect();
    for (auto at = open.begin(); at != open.end();) {
      const std::uint32_t slot = (at++)->first;
      Open& stream = open[slot];
      if (one_in(3)) continue;  // a slow reader
      if (one_in(30)) table_.pause(slot, one_in(2));
      while (const std::optional<TokenView> token = table_.next(slot)) {
        ASSERT_EQ(token->token_id, next_of(stream.last)) << "a token was lost, doubled or another's";
        stream.last = token->token_id;
      }
      if (table_.ended(slot) || one_in(60)) close(slot);
    }
    if (one_in(10)) {
      for (const std::uint32_t slot : table_.overdue()) table_.fail(slot, StreamError::kTimeout);
    }
    table_.rings_read();
  }
  for (const FinishReason reason : {FinishReason::kStop, FinishReason::kLength, FinishReason::kError}) {
    EXPECT_GT(ends[reason], 20) << static_cast<int>(reason);
  }
  for (const StreamError error :
       {StreamError::kInvalidLogits, StreamError::kModelFailed, StreamError::kInvalidRequest, StreamError::kTimeout}) {
    EXPECT_GT(errors[error], 5) << static_cast<int>(error);
  }
  while (!open.empty()) close(open.begin()->first);
  core_.schedule();
  table_.collect();
  // As many as were ever alive at once, a slot each: one that is not given back would be made anew.
  EXPECT_LE(sequences_made - made_before, channel_config().slots + 1);
  expect_nothing_leaked();
}

}  // namespace
}  // namespace rts
