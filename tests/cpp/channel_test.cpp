#include "rts/channel.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "test_memory.hpp"

namespace rts {
namespace {

constexpr int kLong = 60'000;  // only a lost wake-up lasts as long

ChannelConfig small(std::uint32_t slots = 4) {
  return {.slots = slots, .ring_records = 8, .ring_bytes = 1 << 14, .lane_bytes = 1 << 12, .generation = 3};
}

std::shared_ptr<Channel> attach_to(const Channel& channel) {
  return Channel::attach(::dup(channel.memory_fd()), ::dup(channel.worker_bell_fd()), ::dup(channel.front_bell_fd()));
}

std::string error_of(const std::function<void()>& attach) {
  try {
    attach();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

// Both sides of a channel. In private memory these are one object, as where the worker is a thread; in shared memory
// each has a mapping of its own, as where it is a process.
class ChannelOf : public testing::TestWithParam<bool> {
 protected:
  void make(const ChannelConfig& config) {
    front_ = Channel::create(config, GetParam());
    worker_ = GetParam() ? attach_to(*front_) : front_;
  }
  std::shared_ptr<Channel> front_, worker_;
};
INSTANTIATE_TEST_SUITE_P(Memory, ChannelOf, testing::Bool(),
                         [](const auto& test) { return test.param ? "shared" : "private"; });

TEST_P(ChannelOf, BothSidesKnowItsShape) {
  make(small(5));
  for (const auto& side : {front_, worker_}) {
    EXPECT_EQ(side->config().slots, 5U);
    EXPECT_EQ(side->config().ring_records, 8U);
    EXPECT_EQ(side->config().ring_bytes, 1U << 14);
    EXPECT_EQ(side->config().lane_bytes, 1U << 12);
    EXPECT_EQ(side->config().generation, 3U);
    EXPECT_EQ(side->header().layout_version, kLayoutVersion);
  }
  EXPECT_EQ(front_->memory_fd() >= 0, GetParam());
}

TEST_P(ChannelOf, IsEmptyAtFirst) {
  make(small(100));
  EXPECT_TRUE(worker_->lanes().empty());
  EXPECT_FALSE(front_->any_ready());
  for (std::uint32_t slot = 0; slot < 100; ++slot) {
    EXPECT_EQ(worker_->control(slot).flags.load(), 0U);
    EXPECT_TRUE(front_->token_reader(slot).empty());
  }
  EXPECT_EQ(front_->header().steps.load(), 0U);
  EXPECT_EQ(front_->header().worker_stalled.load(), 0U);
  worker_->front_bell().ring();
  EXPECT_FALSE(front_->front_bell().wait(0)) << "no one had armed it";
}

TEST_P(ChannelOf, SubmitsGoTheOneWayAndTokensTheOther) {
  make(small());
  for (const Priority priority : {Priority::kLow, Priority::kNormal, Priority::kHigh}) {
    EXPECT_TRUE(front_->lanes().push(priority, std::string_view("submit")));
    EXPECT_EQ(worker_->lanes().reader(priority).front().size(), 6U);
  }
  for (std::uint32_t slot = 0; slot < 4; ++slot) {
    EXPECT_TRUE(worker_->token_writer(slot).write_token({.index = slot}, std::string(slot + 1, 'x')));
  }
  for (std::uint32_t slot = 0; slot < 4; ++slot) {
    auto reader = front_->token_reader(slot);
    const TokenRecord record(reader.front());
    EXPECT_EQ(record.header.index, slot);
    EXPECT_EQ(record.text, std::string(slot + 1, 'x'));
  }
}

TEST_P(ChannelOf, EachBellWakesItsOwnSide) {
  make(small());
  worker_->worker_bell().arm();
  front_->front_bell().arm();
  front_->worker_bell().ring();
  EXPECT_TRUE(worker_->worker_bell().wait(0));
  EXPECT_FALSE(eventfd::wait(front_->front_bell_fd(), 0));
  worker_->front_bell().ring();
  EXPECT_TRUE(front_->front_bell().wait(0));
}

TEST_P(ChannelOf, AFlagIsItsSlotsAloneAndTellsTheWorker) {
  make(small());
  std::uint32_t epoch = worker_->header().control_epoch.load();
  const auto set = [&](std::uint32_t slot, SlotControl::Flag flag, bool on) {
    worker_->worker_bell().arm();
    front_->set_flag(slot, flag, on);
    EXPECT_TRUE(worker_->worker_bell().wait(0));
    EXPECT_NE(worker_->header().control_epoch.load(), epoch);
    epoch = worker_->header().control_epoch.load();
  };
  const auto flags = [&](std::uint32_t slot) { return worker_->control(slot).flags.load(); };
  set(1, SlotControl::kPause, true);
  EXPECT_EQ(flags(1), SlotControl::kPause);
  set(1, SlotControl::kCancel, true);
  EXPECT_EQ(flags(1), SlotControl::kPause | SlotControl::kCancel);
  set(1, SlotControl::kPause, false);
  EXPECT_EQ(flags(1), SlotControl::kCancel);
  set(1, SlotControl::kCancel, true);
  EXPECT_EQ(flags(1), SlotControl::kCancel);
  for (const std::uint32_t slot : {0U, 2U, 3U}) EXPECT_EQ(flags(slot), 0U);
}

TEST_P(ChannelOf, ReadyBitsAreTakenOnceAWordAtATime) {
  for (const std::uint32_t slots : {1U, 63U, 64U, 65U, 130U}) {
    SCOPED_TRACE(slots);
    make(small(slots));
    EXPECT_EQ(front_->ready_words(), (slots + 63) / 64);
    for (std::uint32_t slot = 0; slot < slots; ++slot) {
      worker_->mark_ready(slot);
      worker_->mark_ready(slot);
      EXPECT_TRUE(front_->any_ready());
      for (std::uint32_t word = 0; word < front_->ready_words(); ++word) {
        EXPECT_EQ(front_->take_ready(word), word == slot / 64 ? std::uint64_t{1} << slot % 64 : 0) << slot;
      }
      EXPECT_FALSE(front_->any_ready());
    }
    for (std::uint32_t slot = 0; slot < slots; ++slot) worker_->mark_ready(slot);
    std::uint32_t taken = 0;
    for (std::uint32_t word = 0; word < front_->ready_words(); ++word) {
      taken += static_cast<std::uint32_t>(std::popcount(front_->take_ready(word)));
    }
    EXPECT_EQ(taken, slots);
  }
}

// Everything is filled to the brim, so that what lay over another would show.
TEST_P(ChannelOf, NoPartLiesOverAnother) {
  for (const std::uint32_t slots : {1U, 3U, 64U, 67U}) {
    SCOPED_TRACE(slots);
    ChannelConfig config = small(slots);
    config.ring_records = 1'000;  // so that bytes are what fills a ring
    make(config);
    const auto text = [](std::uint32_t slot, std::uint32_t i) { return std::string((slot * 7 + i * 13) % 300, 't'); };
    std::vector<std::uint32_t> tokens(slots), textless(slots), pushed(kPriorities);
    for (std::uint32_t slot = 0; slot < slots; ++slot) {
      TokenWriter writer = worker_->token_writer(slot);
      const auto write = [&](const std::string& with) {
        return writer.write_token({.index = slot, .token_id = static_cast<std::int32_t>(tokens[slot])}, with);
      };
      while (write(text(slot, tokens[slot]))) ++tokens[slot];
      std::uint32_t empty = 0;
      while (write("")) ++tokens[slot], ++empty;
      textless[slot] = empty;
      worker_->mark_ready(slot);
      front_->set_flag(slot, slot % 2 == 0 ? SlotControl::kCancel : SlotControl::kPause, true);
    }
    for (int lane = 0; lane < kPriorities; ++lane) {
      while (front_->lanes().push(static_cast<Priority>(lane), std::string(50, static_cast<char>('0' + lane)))) {
        ++pushed[lane];
      }
      EXPECT_GT(pushed[lane], 60U);
    }
    worker_->header().steps.store(~std::uint64_t{0});
    worker_->header().worker_stalled.store(~0U);

    for (std::uint32_t slot = 0; slot < slots; ++slot) {
      EXPECT_GE(tokens[slot], 80U);
      auto reader = front_->token_reader(slot);
      for (std::uint32_t i = 0; i < tokens[slot]; ++i) {
        const TokenRecord record(reader.front());
        ASSERT_TRUE(record.valid);
        EXPECT_EQ(record.header.index, slot);
        EXPECT_EQ(record.header.token_id, static_cast<std::int32_t>(i));
        EXPECT_EQ(record.text, i < tokens[slot] - textless[slot] ? text(slot, i) : "");
        reader.pop();
      }
      EXPECT_TRUE(reader.empty());
      EXPECT_EQ(worker_->control(slot).flags.load(), slot % 2 == 0 ? SlotControl::kCancel : SlotControl::kPause);
    }
    for (int lane = 0; lane < kPriorities; ++lane) {
      auto& reader = worker_->lanes().reader(static_cast<Priority>(lane));
      for (std::uint32_t i = 0; i < pushed[lane]; ++i) {
        const auto record = reader.front();
        ASSERT_EQ(record.size(), 50U);
        EXPECT_TRUE(std::ranges::all_of(record, [&](std::byte b) { return b == static_cast<std::byte>('0' + lane); }));
        reader.pop();
      }
      EXPECT_TRUE(reader.empty());
    }
    EXPECT_EQ(front_->config().generation, 3U);
    EXPECT_EQ(front_->header().control_epoch.load(), slots);
  }
}

TEST(Channel, RefusesShapesThatNoChannelCanHave) {
  const auto create = [](auto change) {
    ChannelConfig config = small();
    change(config);
    Channel::create(config, false);
  };
  for (const std::uint32_t slots : {0U, (1U << 20) + 1, ~0U}) {
    EXPECT_THROW(create([&](ChannelConfig& config) { config.slots = slots; }), std::invalid_argument) << slots;
  }
  for (const std::uint32_t records : {0U, (1U << 30) + 1, ~0U - TokenWriter::kReservedRecords + 1, ~0U}) {
    EXPECT_THROW(create([&](ChannelConfig& config) { config.ring_records = records; }), std::invalid_argument)
        << records;
  }
  for (const std::uint32_t bytes : {0U, 64U, 1U << 13, (1U << 14) + 8, ~0U}) {
    EXPECT_THROW(create([&](ChannelConfig& config) { config.ring_bytes = bytes; }), std::invalid_argument) << bytes;
  }
  for (const std::uint32_t bytes : {0U, 32U, 100U, ~0U}) {
    EXPECT_THROW(create([&](ChannelConfig& config) { config.lane_bytes = bytes; }), std::invalid_argument) << bytes;
  }
  EXPECT_NO_THROW(create([](ChannelConfig& config) { config.slots = 1, config.lane_bytes = 64; }));
}

TEST(Channel, AttachesOnlyToWhatIsOne) {
  const auto attach_after = [](auto damage) {
    const auto channel = Channel::create(small(), true);
    damage(*channel);
    return error_of([&] { attach_to(*channel); });
  };
  EXPECT_EQ(attach_after([](Channel&) {}), "no error");
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().magic ^= 1; }),
            "not a channel: its memory has another content");
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().layout_version += 1; }),
            "a channel of layout " + std::to_string(kLayoutVersion + 1) + "; this worker knows " +
                std::to_string(kLayoutVersion));
  const std::string another_size = "not a channel: its memory has another size";
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().config.slots += 1; }), another_size);
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().config.slots = 1 << 20; }), another_size);
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().config.ring_bytes *= 2; }), another_size);
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().config.lane_bytes = 1U << 31; }), another_size);
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().bytes += 64; }), another_size);
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().config.slots = 0; }),
            "not a channel: a channel has 1 to 2^20 slots");
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().config.slots = ~0U; }),
            "not a channel: a channel has 1 to 2^20 slots");
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().config.ring_records = ~0U; }),
            "not a channel: a token ring holds 1 to 2^30 tokens");
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().config.ring_bytes = 96; }),
            "not a channel: ring_bytes must be a power of two with room for the longest tokens");
  EXPECT_EQ(attach_after([](Channel& channel) { channel.header().config.lane_bytes = 32; }),
            "not a channel: lane_bytes must be a power of two of 64 or more");
  const auto attach_with_a_size_of = [](off_t bytes) {
    const auto channel = Channel::create(small(), true);
    const int memory = ::memfd_create("test", MFD_CLOEXEC);
    EXPECT_EQ(::pwrite(memory, &channel->header(), sizeof(ChannelHeader), 0), ssize_t{sizeof(ChannelHeader)});
    EXPECT_EQ(::ftruncate(memory, bytes), 0);
    return error_of(
        [&] { Channel::attach(memory, ::dup(channel->worker_bell_fd()), ::dup(channel->front_bell_fd())); });
  };
  EXPECT_EQ(attach_with_a_size_of(1 << 20), another_size);
  EXPECT_EQ(attach_with_a_size_of(16), "not a channel: its memory is too small");
  EXPECT_EQ(attach_with_a_size_of(0), "not a channel: its memory is too small");
}

TEST(Channel, AttachTakesTheDescriptorsOverAlsoWhereItFails) {
  const auto channel = Channel::create(small(), true);
  const auto is_open = [](int fd) { return ::fcntl(fd, F_GETFD) >= 0; };
  for (const bool damaged : {false, true}) {
    if (damaged) channel->header().magic = 0;
    const std::vector fds{::dup(channel->memory_fd()), ::dup(channel->worker_bell_fd()),
                          ::dup(channel->front_bell_fd())};
    {
      std::shared_ptr<Channel> attached;
      EXPECT_EQ(error_of([&] { attached = Channel::attach(fds[0], fds[1], fds[2]); }) == "no error", !damaged);
      EXPECT_TRUE(std::ranges::all_of(fds, [&](int fd) { return is_open(fd) == !damaged; }));
    }
    EXPECT_TRUE(std::ranges::none_of(fds, is_open));
  }
  EXPECT_TRUE(is_open(channel->memory_fd()));
  EXPECT_NE(error_of([] { Channel::attach(-1, -1, -1); }), "no error");
}

TEST(Channel, NeitherSideCanTakeTheOthersMemoryAway) {
  const auto channel = Channel::create(small(), true);
  EXPECT_EQ(::ftruncate(channel->memory_fd(), 0), -1);
  EXPECT_EQ(errno, EPERM);
}

TEST(Channel, OutlivesTheSideThatMadeIt) {
  auto front = Channel::create(small(), true);
  const auto worker = attach_to(*front);
  front->lanes().push(Priority::kHigh, std::string_view("submit"));
  front.reset();
  EXPECT_EQ(worker->lanes().reader(Priority::kHigh).front().size(), 6U);
}

TEST(Channel, AShapeThatABrokenPeerRewritesIsNotBelieved) {
  const auto front = Channel::create(small(), true);
  const auto worker = attach_to(*front);
  worker->header().config = {.slots = ~0U, .ring_records = ~0U, .ring_bytes = 1U << 31, .lane_bytes = 1U << 31};
  EXPECT_EQ(front->config().slots, 4U);
  EXPECT_EQ(front->ready_words(), 1U);
  TokenWriter writer = front->token_writer(3);  // at the memory's end
  std::uint32_t written = 0;
  while (writer.write_token({.index = written}, std::string(kMaxTokenBytes, 'x'))) ++written;
  EXPECT_EQ(front->token_reader(3).records(), written);
  EXPECT_EQ(written, 8U + TokenWriter::kReservedRecords);
}

// A front end and a worker as they work: submit, ring, sleep; echo tokens, mark, ring, sleep.
TEST_P(ChannelOf, TwoThreadsTalkWithoutLosingARecordOrAWakeUp) {
  constexpr std::uint32_t kSlots = 70;
  constexpr std::uint32_t kTokens = 12;  // more than a stream may be ahead by
  const auto streams = static_cast<std::uint32_t>(test::soak(1'500));
  make({.slots = kSlots, .ring_records = 4, .ring_bytes = 1 << 14, .lane_bytes = 1 << 10, .generation = 1});
  std::atomic<bool> lost = false;

  std::thread worker([&] {
    struct Sequence {
      std::uint32_t slot, stream, tokens;
      TokenWriter writer;
    };
    std::vector<Sequence> running;
    std::uint32_t ended = 0;
    while (ended < streams && !lost) {
      bool progress = false;
      for (const Priority priority : {Priority::kHigh, Priority::kNormal, Priority::kLow}) {
        auto& lane = worker_->lanes().reader(priority);
        for (auto record = lane.front(); !record.empty(); record = lane.front()) {
          SubmitHeader header;
          std::memcpy(&header, record.data(), sizeof header);
          lane.pop();
          const auto stream = static_cast<std::uint32_t>(header.stream_id);
          running.push_back({header.slot, stream, 0, worker_->token_writer(header.slot)});
          progress = true;
        }
        lane.release();
      }
      for (Sequence& sequence : running) {
        if (!sequence.writer.has_room()) continue;
        const TokenHeader header{.index = sequence.tokens, .token_id = static_cast<std::int32_t>(sequence.stream)};
        if (sequence.tokens++ < kTokens) {
          sequence.writer.write_token(header, std::string(1 + sequence.stream % 100, 'x'));
        } else {
          sequence.writer.write_last(header, {});
          ++ended;
        }
        worker_->mark_ready(sequence.slot);
        progress = true;
      }
      std::erase_if(running, [&](const Sequence& sequence) { return sequence.tokens > kTokens; });
      worker_->front_bell().ring();
      if (progress) continue;
      const Doorbell bell = worker_->worker_bell();
      bell.arm();
      if (!worker_->lanes().empty() ||
          std::ranges::any_of(running, [](Sequence& sequence) { return sequence.writer.has_room(); })) {
        bell.disarm();
      } else if (!bell.wait(kLong)) {
        lost = true;
      }
    }
  });

  struct Stream {
    std::uint32_t number = 0;
    std::uint32_t read = 0;
    SpscRing<>::Consumer reader;
  };
  std::vector<std::optional<Stream>> open(kSlots);
  std::uint32_t submitted = 0, ended = 0, wrong = 0;
  while (ended < streams && !lost) {
    bool progress = false;
    for (std::uint32_t slot = 0; slot < kSlots && submitted < streams; ++slot) {
      if (open[slot]) continue;
      SubmitHeader header;
      header.stream_id = submitted;
      header.slot = slot;
      if (!front_->lanes().push(static_cast<Priority>(submitted % 3), std::span(&header, 1))) break;
      open[slot] = Stream{submitted++, 0, front_->token_reader(slot)};
      progress = true;
    }
    for (std::uint32_t word = 0; word < front_->ready_words(); ++word) {
      for (std::uint64_t bits = front_->take_ready(word); bits != 0; bits &= bits - 1) {
        const std::uint32_t slot = word * 64 + static_cast<std::uint32_t>(std::countr_zero(bits));
        progress = true;
        if (!open[slot]) continue;  // marked again after its last record was read
        Stream& stream = *open[slot];
        for (auto bytes = stream.reader.front(); !bytes.empty(); bytes = stream.reader.front()) {
          const TokenRecord record(bytes);
          const bool expected = record.valid && record.header.index == stream.read &&
                                record.header.token_id == static_cast<std::int32_t>(stream.number) &&
                                record.is_last() == (stream.read == kTokens) &&
                                record.text.size() == (record.is_last() ? 0 : 1 + stream.number % 100);
          wrong += !expected;
          const bool last = record.is_last();
          ++stream.read;
          stream.reader.pop();
          stream.reader.release();
          if (!last) continue;
          ++ended;
          open[slot].reset();
          break;
        }
      }
    }
    front_->worker_bell().ring();
    if (progress || ended == streams) continue;
    const Doorbell bell = front_->front_bell();
    bell.arm();
    if (front_->any_ready()) {
      bell.disarm();
    } else if (!bell.wait(kLong)) {
      lost = true;
    }
  }
  front_->worker_bell().ring();
  worker.join();
  EXPECT_FALSE(lost) << "a wake-up was lost";
  EXPECT_EQ(wrong, 0U);
  EXPECT_EQ(ended, streams);
}

// Each slot is marked once a round, while the words are taken all the time.
TEST(Channel, NoReadyBitIsLostBetweenMarkingAndTaking) {
  const auto channel = Channel::create(small(128), false);
  const std::uint64_t rounds = test::soak(2'000);
  std::atomic<std::uint64_t> begun = 0, ended = 0;
  std::thread worker([&] {
    for (std::uint64_t round = 1; round <= rounds; ++round) {
      while (begun.load() < round) std::this_thread::yield();
      for (std::uint32_t slot = 0; slot < 128; ++slot) channel->mark_ready(slot);
      ended.store(round);
    }
  });
  std::uint64_t lost = 0;
  for (std::uint64_t round = 1; round <= rounds; ++round) {
    begun.store(round);
    std::uint64_t seen[2] = {};
    const auto take = [&] {
      for (std::uint32_t word = 0; word < 2; ++word) seen[word] |= channel->take_ready(word);
    };
    while (ended.load() < round) take();
    take();
    lost += 128 - static_cast<std::uint64_t>(std::popcount(seen[0]) + std::popcount(seen[1]));
  }
  worker.join();
  EXPECT_EQ(lost, 0U);
}

// ThreadSanitizer sees nothing between these threads but the bit: (1) and (2) must order the plain variable.
TEST(Channel, WhatWasPublishedBeforeAReadyBitIsVisibleToWhoeverTakesIt) {
  const auto channel = Channel::create(small(), false);
  int data = 0;
  for (int round = 1; round <= 200; ++round) {
    std::atomic<bool> read = false;
    std::thread worker([&] {
      data = round;
      channel->mark_ready(0);
      while (!read.load(std::memory_order_relaxed)) std::this_thread::yield();
    });
    while (channel->take_ready(0) == 0) std::this_thread::yield();
    EXPECT_EQ(data, round);
    read.store(true, std::memory_order_relaxed);
    worker.join();
  }
}

}  // namespace
}  // namespace rts
