#include "rts/doorbell.hpp"

#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "interleave.hpp"
#include "rts/file_descriptor.hpp"
#include "rts/priority_queue.hpp"
#include "rts/spsc_ring.hpp"
#include "test_memory.hpp"

namespace rts {
namespace {

using test::InterleavedAtomics;

constexpr int kLong = 60'000;  // only a lost wake-up lasts as long

class DoorbellTest : public testing::Test {
 protected:
  static FileDescriptor new_event() { return FileDescriptor(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)); }

  // How often it was signalled, which is forgotten then.
  std::uint64_t signals() {
    std::uint64_t count = 0;
    return ::read(event_.get(), &count, sizeof count) == sizeof count ? count : 0;
  }

  FileDescriptor event_ = new_event();
  DoorbellFlag flag_;
  Doorbell bell_{&flag_, event_.get()};
};

TEST_F(DoorbellTest, IsNotArmedAtFirstNorInZeroedMemory) {
  bell_.ring();
  EXPECT_EQ(signals(), 0U);
  alignas(DoorbellFlag) std::array<std::byte, sizeof(DoorbellFlag)> zeroed{};
  const Doorbell bell(reinterpret_cast<DoorbellFlag*>(zeroed.data()), event_.get());
  bell.ring();
  EXPECT_EQ(signals(), 0U);
}

TEST_F(DoorbellTest, OneSignalHoweverManyRing) {
  bell_.arm();
  for (int i = 0; i < 5; ++i) bell_.ring();
  EXPECT_EQ(signals(), 1U);
  bell_.ring();
  EXPECT_EQ(signals(), 0U) << "no one armed it again";
  bell_.arm();
  bell_.ring();
  EXPECT_EQ(signals(), 1U);
}

TEST_F(DoorbellTest, DisarmedItIsSilent) {
  bell_.arm();
  bell_.disarm();
  bell_.ring();
  EXPECT_EQ(signals(), 0U);
}

TEST_F(DoorbellTest, WaitSaysWhetherItWasRung) {
  bell_.arm();
  EXPECT_FALSE(bell_.wait(0));
  bell_.ring();
  EXPECT_EQ(signals(), 0U) << "wait() disarms";
  bell_.arm();
  bell_.ring();
  EXPECT_TRUE(bell_.wait(kLong));
  EXPECT_FALSE(bell_.wait(0)) << "wait() consumes";
}

TEST_F(DoorbellTest, ConsumeEndsTheWakeUp) {
  bell_.arm();
  bell_.ring();
  EXPECT_TRUE(eventfd::wait(event_.get(), 0));
  EXPECT_TRUE(eventfd::wait(event_.get(), 0));
  bell_.consume();
  EXPECT_FALSE(eventfd::wait(event_.get(), 0));
  bell_.ring();
  EXPECT_FALSE(eventfd::wait(event_.get(), 0));
}

TEST_F(DoorbellTest, ARingBeforeDisarmWakesTheNextSleepAndNoFurtherOne) {
  bell_.arm();
  bell_.ring();
  bell_.disarm();
  bell_.arm();
  EXPECT_TRUE(bell_.wait(0));
  bell_.arm();
  EXPECT_FALSE(bell_.wait(0));
}

TEST_F(DoorbellTest, FlagsThatShareAnEventWakeTheOneSleep) {
  DoorbellFlag other_flag;
  const Doorbell other(&other_flag, event_.get());
  bell_.arm();
  other.arm();
  other.ring();
  EXPECT_TRUE(bell_.wait(0));
  other.disarm();
  bell_.arm();
  other.arm();
  bell_.ring();
  other.ring();
  EXPECT_EQ(signals(), 2U);
}

TEST_F(DoorbellTest, AFullEventStillWakes) {
  const std::uint64_t full = ~std::uint64_t{0} - 1;
  ASSERT_EQ(::write(event_.get(), &full, sizeof full), static_cast<ssize_t>(sizeof full));
  bell_.arm();
  bell_.ring();  // does not block
  EXPECT_TRUE(bell_.wait(0));
  EXPECT_FALSE(bell_.wait(0));
}

// ThreadSanitizer sees nothing between these threads but the flag: (1) and (2) must order the plain variable.
TEST_F(DoorbellTest, WhatWasWrittenBeforeARingIsVisibleAfterTheArmThatFollowsIt) {
  for (std::uint64_t round = 0; round < test::soak(200); ++round) {
    int data = 0;
    std::atomic<bool> rung = false;
    std::thread producer([&] {
      data = 1;
      bell_.ring();
      rung.store(true, std::memory_order_relaxed);
    });
    while (!rung.load(std::memory_order_relaxed)) std::this_thread::yield();
    if (round % 2 == 0) {
      bell_.arm();
    } else {
      bell_.disarm();
    }
    EXPECT_EQ(data, 1);
    producer.join();
    bell_.consume();
  }
}

// Producers that publish and ring, each with a flag of its own on one eventfd, and a consumer that sleeps where nothing
// is published. A wake-up that is lost leaves it asleep with records to read: a deadlock, which the scheduler reports.
test::Scenario publish_and_ring(std::uint32_t producers, std::uint32_t records_each, bool sleeps_by_wait) {
  return [=](test::Interleaver& threads) {
    using Ring = SpscRing<InterleavedAtomics>;
    using Bell = BasicDoorbell<InterleavedAtomics>;
    struct Side {
      Side() : ring(memory, SpscRingShape{.bytes = 256}) {
        ring.clear();
        producer = ring.producer();
        consumer = ring.consumer();
      }
      alignas(kCacheLine) std::byte memory[2 * kCacheLine + 256];
      Ring ring;
      Ring::Producer producer;
      Ring::Consumer consumer;
      Bell::Flag flag;
    };
    const FileDescriptor event(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    const auto sides = std::make_unique<Side[]>(producers);
    for (std::uint32_t i = 0; i < producers; ++i) {
      threads.add_thread([&, i] {
        for (std::uint32_t record = 0; record < records_each; ++record) {
          EXPECT_TRUE(sides[i].producer.push(std::span(&record, 1)));
          test::Interleaver::yield();
          Bell(&sides[i].flag, event.get()).ring();
        }
      });
    }
    threads.add_thread([&] {
      const std::span all(sides.get(), producers);
      const auto nothing_published = [&] {
        return std::ranges::all_of(all, [](const Side& side) { return side.consumer.empty(); });
      };
      std::uint32_t read = 0;
      while (true) {
        for (Side& side : all) {
          for (auto record = side.consumer.front(); !record.empty(); record = side.consumer.front()) {
            side.consumer.pop();
            ++read;
          }
          side.consumer.release();
        }
        if (read == producers * records_each) break;
        for (Side& side : all) Bell(&side.flag, event.get()).arm();
        if (!nothing_published()) {
          for (Side& side : all) Bell(&side.flag, event.get()).disarm();
          continue;
        }
        test::Interleaver::wait_until([&] { return eventfd::wait(event.get(), 0); });
        if (sleeps_by_wait && producers == 1) {
          EXPECT_TRUE(Bell(&all[0].flag, event.get()).wait(0));
          continue;
        }
        for (Side& side : all) Bell(&side.flag, event.get()).consume();
      }
    });
    threads.run();
  };
}

TEST(DoorbellInterleaved, LosesNoWakeUpOfOneProducerInAnyScheduleOfUpToThreePreemptions) {
  EXPECT_GT(test::explore_all(3, publish_and_ring(1, 3, true)), 1'000U);
}

TEST(DoorbellInterleaved, LosesNoWakeUpOfTwoProducersInAnyScheduleOfUpToTwoPreemptions) {
  EXPECT_GT(test::explore_all(2, publish_and_ring(2, 2, false)), 1'000U);
}

TEST(DoorbellInterleaved, LosesNoWakeUpInRandomSchedules) {
  test::explore_randomly(test::soak(1'000), publish_and_ring(3, 3, false));
}

// Real sleeps: a ball that two threads throw to each other, each of which sleeps until it comes.
TEST(DoorbellStress, NeitherOfTwoThreadsSleepsForEver) {
  const std::uint64_t throws = test::soak(5'000);
  struct Side {
    FileDescriptor event{::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
    DoorbellFlag flag;
    LaneSet<> lanes = LaneSet<>::allocate(64);
    Doorbell bell() { return {&flag, event.get()}; }
  };
  Side a, b;
  std::atomic<bool> lost = false;
  const auto play = [&](Side& mine, Side& others, bool begins) {
    SpscRing<>::Consumer& reader = mine.lanes.reader(Priority::kHigh);
    for (std::uint64_t i = 0; i < throws; ++i) {
      if (!begins || i > 0) {
        while (reader.front().empty()) {
          mine.bell().arm();
          if (!reader.empty()) {
            mine.bell().disarm();
          } else if (!mine.bell().wait(kLong)) {
            lost = true;
          }
          if (lost) return;
        }
        reader.pop();
        reader.release();
      }
      others.lanes.push(Priority::kHigh, std::span(&i, 1));
      others.bell().ring();
    }
  };
  std::thread other([&] { play(b, a, false); });
  play(a, b, true);
  other.join();
  EXPECT_FALSE(lost) << "a wake-up was lost";
}

}  // namespace
}  // namespace rts
