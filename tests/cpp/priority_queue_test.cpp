#include "rts/priority_queue.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "interleave.hpp"
#include "test_memory.hpp"

namespace rts {
namespace {

using test::GuardedMemory;
using test::InterleavedAtomics;

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
constexpr std::array kHighestFirst{Priority::kHigh, Priority::kNormal, Priority::kLow};

struct Job {
  std::uint32_t producer = 0;
  std::uint32_t number = 0;  // of its producer's, in its lane
  Priority priority = Priority::kNormal;
  std::int64_t arrival_ns = 0;
  bool operator==(const Job&) const = default;
};

template <class Atomics>
bool push(LaneSet<Atomics>& lanes, const Job& job) {
  return lanes.push(job.priority, std::span(&job, 1));
}

std::optional<std::pair<Ticket, Job>> parse(std::span<const std::byte> record) {
  Job job;
  if (record.size() != sizeof job) return std::nullopt;
  std::memcpy(&job, record.data(), sizeof job);
  return std::pair{Ticket{.priority = job.priority, .arrival_ns = job.arrival_ns}, job};
}

template <class Atomics>
std::vector<Job> pop_all(PriorityQueue<Job, Atomics>& queue, std::int64_t now_ns = 0) {
  std::vector<Job> jobs;
  while (const std::optional<Job> job = queue.pop(now_ns)) jobs.push_back(*job);
  return jobs;
}

TEST(LaneSet, HasALaneForEachPriority) {
  LaneSet<> lanes = LaneSet<>::allocate(64);
  EXPECT_TRUE(lanes.empty());
  for (const Priority priority : kHighestFirst) {
    EXPECT_TRUE(lanes.push(priority, std::string(1, static_cast<char>('0' + static_cast<int>(priority)))));
  }
  EXPECT_FALSE(lanes.empty());
  for (const Priority priority : kHighestFirst) {
    const auto record = lanes.reader(priority).front();
    ASSERT_EQ(record.size(), 1U);
    EXPECT_EQ(record[0], static_cast<std::byte>('0' + static_cast<int>(priority)));
    EXPECT_FALSE(lanes.empty());
    lanes.reader(priority).pop();
    lanes.reader(priority).release();
  }
  EXPECT_TRUE(lanes.empty());
  EXPECT_FALSE(lanes.corrupt());
}

TEST(LaneSet, AFullLaneRefusesAndLeavesTheOthersTheirRoom) {
  LaneSet<> lanes = LaneSet<>::allocate(64);
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(lanes.push(Priority::kLow, std::string("four")));
  EXPECT_FALSE(lanes.push(Priority::kLow, std::string("four")));
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(lanes.push(Priority::kHigh, std::string("four")));
  EXPECT_FALSE(lanes.push(Priority::kNormal, std::string(29, 'x'))) << "larger than a lane's largest record";
}

TEST(LaneSet, GoesOnAfterItWasMoved) {
  LaneSet<> lanes = LaneSet<>::allocate(256);
  lanes.push(Priority::kLow, std::string("one"));
  LaneSet<> moved = std::move(lanes);
  moved.push(Priority::kLow, std::string("two"));
  EXPECT_EQ(moved.reader(Priority::kLow).records(), 2U);
}

TEST(LaneSet, StaysInsideTheMemoryItIsGivenWhichZeroedHoldsEmptyLanes) {
  for (const std::uint32_t lane_bytes : {64U, 128U, 1U << 16}) {
    GuardedMemory memory(LaneSet<>::bytes_needed(lane_bytes));
    LaneSet<> front(memory.data(), lane_bytes);
    LaneSet<> worker(memory.data(), lane_bytes);  // as another process has it
    EXPECT_TRUE(worker.empty());
    for (const Priority priority : kHighestFirst) {
      std::uint32_t pushed = 0;
      while (front.push(priority, std::string(20, static_cast<char>('a' + pushed % 26)))) ++pushed;
      EXPECT_EQ(pushed, lane_bytes / 24) << lane_bytes;
      EXPECT_EQ(worker.reader(priority).records(), pushed);
    }
  }
  GuardedMemory memory(LaneSet<>::bytes_needed(64));
  EXPECT_THROW(LaneSet<>(memory.data(), 96), std::invalid_argument);
}

class PriorityQueueOf : public testing::TestWithParam<std::uint32_t> {
 protected:
  PriorityQueueOf() {
    for (std::uint32_t producer = 0; producer < GetParam(); ++producer) {
      producers_.push_back(std::make_unique<LaneSet<>>(LaneSet<>::allocate(1 << 14)));
    }
  }
  void attach_all(PriorityQueue<Job>& queue) {
    for (const auto& lanes : producers_) queue.attach(*lanes);
  }

  std::vector<std::unique_ptr<LaneSet<>>> producers_;
};
INSTANTIATE_TEST_SUITE_P(Producers, PriorityQueueOf, testing::Values(1, 2, 4), testing::PrintToStringParamName());

TEST_P(PriorityQueueOf, KeepsEachProducersOrder) {
  PriorityQueue<Job> queue(1'000, kNever);
  attach_all(queue);
  for (std::uint32_t number = 0; number < 50; ++number) {
    for (std::uint32_t producer = 0; producer < GetParam(); ++producer) {
      ASSERT_TRUE(push(*producers_[producer], {producer, number, Priority::kNormal, 0}));
    }
    if (number == 20) {
      EXPECT_EQ(queue.drain(parse), 21 * GetParam());
    }
  }
  EXPECT_EQ(queue.drain(parse), 29 * GetParam());
  std::vector<std::uint32_t> next(GetParam());
  for (const Job& job : pop_all(queue)) EXPECT_EQ(job.number, next[job.producer]++);
  EXPECT_EQ(next, std::vector<std::uint32_t>(GetParam(), 50));
}

TEST_P(PriorityQueueOf, TheHigherPriorityGoesFirstWhoeverItIsFromThenTheEarlierArrival) {
  PriorityQueue<Job> queue(1'000, kNever);
  attach_all(queue);
  std::mt19937 random(7);
  std::vector<Job> jobs;
  for (std::uint32_t number = 0; number < 200; ++number) {
    const auto producer = static_cast<std::uint32_t>(random() % GetParam());
    const Job job{producer, number, static_cast<Priority>(random() % 3), number * 37 % 200};
    ASSERT_TRUE(push(*producers_[producer], job));
    jobs.push_back(job);
  }
  EXPECT_EQ(queue.drain(parse), 200U);
  EXPECT_EQ(queue.drain(parse), 0U);
  for (const Priority priority : kHighestFirst) {
    EXPECT_EQ(queue.size(priority), static_cast<std::size_t>(std::ranges::count(jobs, priority, &Job::priority)));
  }
  std::ranges::sort(jobs, {},
                    [](const Job& job) { return std::pair(-static_cast<int>(job.priority), job.arrival_ns); });
  EXPECT_EQ(pop_all(queue), jobs);
}

TEST_P(PriorityQueueOf, WhoHasWaitedLongEnoughGoesFirst) {
  PriorityQueue<Job> queue(1'000, 100);
  attach_all(queue);
  const Job old_low{0, 0, Priority::kLow, 10};
  push(*producers_[0], old_low);
  queue.drain(parse);
  for (std::uint32_t number = 0; number < 5; ++number) {
    const std::uint32_t producer = number % GetParam();
    push(*producers_[producer], {producer, number, Priority::kHigh, 20});
  }
  queue.drain(parse);
  EXPECT_EQ(queue.peek(109)->priority, Priority::kHigh);
  EXPECT_EQ(*queue.peek(110), old_low);
  EXPECT_EQ(*queue.pop(110), old_low);
  EXPECT_EQ(queue.pop(110)->priority, Priority::kHigh);
}

TEST_P(PriorityQueueOf, AFullQueueLeavesTheRestInTheLanesAndLosesNothing) {
  PriorityQueue<Job> queue(3, kNever);
  attach_all(queue);
  std::uint32_t pushed = 0;
  for (std::uint32_t number = 0; number < 20; ++number) {
    for (std::uint32_t producer = 0; producer < GetParam(); ++producer) {
      pushed += push(*producers_[producer], {producer, number, Priority::kNormal, 0});
    }
  }
  std::vector<std::uint32_t> next(GetParam());
  std::uint32_t popped = 0;
  while (true) {
    const std::size_t held = queue.size();
    const std::size_t taken = queue.drain(parse);
    EXPECT_EQ(taken, std::min<std::size_t>(3 - held, pushed - popped - held));
    EXPECT_EQ(queue.drain(parse), 0U);
    const std::optional<Job> job = queue.pop(0);
    if (!job) break;
    ++popped;
    EXPECT_EQ(job->number, next[job->producer]++);
  }
  EXPECT_EQ(popped, pushed);
  EXPECT_EQ(popped, 20 * GetParam());
}

TEST(PriorityQueue, WithOneFreePlaceTheHighestPriorityIsTakenIn) {
  LaneSet<> a = LaneSet<>::allocate(1024), b = LaneSet<>::allocate(1024);
  PriorityQueue<Job> queue(1, kNever);
  queue.attach(a);
  queue.attach(b);
  push(a, {0, 0, Priority::kLow, 0});
  push(a, {0, 0, Priority::kNormal, 0});
  push(b, {1, 0, Priority::kHigh, 0});
  for (const Priority priority : kHighestFirst) {
    EXPECT_EQ(queue.drain(parse), 1U);
    EXPECT_TRUE(queue.full());
    EXPECT_EQ(queue.pop(0)->priority, priority);
  }
  EXPECT_TRUE(queue.empty());
}

TEST(PriorityQueue, DropsWhatCannotBeParsedAndGivesItsRoomBack) {
  LaneSet<> lanes = LaneSet<>::allocate(64);
  PriorityQueue<Job> queue(10, kNever);
  queue.attach(lanes);
  for (std::uint32_t round = 0; round < 20; ++round) {
    ASSERT_TRUE(lanes.push(Priority::kHigh, std::string("junk")));
    ASSERT_TRUE(push(lanes, {0, round, Priority::kHigh, 0}));
    ASSERT_TRUE(lanes.push(Priority::kHigh, std::string("junk")));
    EXPECT_EQ(queue.drain(parse), 3U);
    EXPECT_EQ(queue.size(), 1U);
    EXPECT_EQ(queue.pop(0)->number, round);
  }
}

TEST(PriorityQueue, ARecordWhoseParsingThrowsIsNotMetAgain) {
  LaneSet<> lanes = LaneSet<>::allocate(1024);
  PriorityQueue<Job> queue(10, kNever);
  queue.attach(lanes);
  for (std::uint32_t number = 0; number < 3; ++number) push(lanes, {0, number, Priority::kHigh, 0});
  const auto throws_at_1 = [](std::span<const std::byte> record) {
    auto entry = parse(record);
    if (entry->second.number == 1) throw std::runtime_error("1");
    return entry;
  };
  EXPECT_THROW(queue.drain(throws_at_1), std::runtime_error);
  EXPECT_EQ(queue.drain(throws_at_1), 1U);
  EXPECT_EQ(pop_all(queue), (std::vector<Job>{{0, 0, Priority::kHigh, 0}, {0, 2, Priority::kHigh, 0}}));
  EXPECT_TRUE(lanes.empty());
}

TEST(PriorityQueue, TheLaneDecidesThePriorityWhateverTheTicketSays) {
  LaneSet<> lanes = LaneSet<>::allocate(1024);
  PriorityQueue<Job> queue(10, kNever);
  queue.attach(lanes);
  const Job job{0, 1, Priority::kHigh, 0};
  lanes.push(Priority::kLow, std::span(&job, 1));
  push(lanes, {0, 2, Priority::kNormal, 0});
  queue.drain(parse);
  EXPECT_EQ(queue.size(Priority::kLow), 1U);
  EXPECT_EQ(queue.pop(0)->number, 2U);
  EXPECT_EQ(queue.pop(0)->number, 1U);
}

TEST(PriorityQueue, AnEntryCanBeRemovedByTheHandleThatParseAskedFor) {
  LaneSet<> lanes = LaneSet<>::allocate(1024);
  PriorityQueue<Job> queue(10, kNever);
  queue.attach(lanes);
  std::map<std::uint32_t, PriorityQueue<Job>::Handle> handles;
  for (std::uint32_t number = 0; number < 4; ++number) push(lanes, {0, number, Priority::kNormal, 0});
  queue.drain([&](std::span<const std::byte> record) {
    const auto entry = parse(record);
    return std::optional(std::tuple{entry->first, entry->second, &handles[entry->second.number]});
  });
  EXPECT_TRUE(queue.remove(handles[1]));
  EXPECT_FALSE(queue.remove(handles[1]));
  EXPECT_EQ(queue.pop(0)->number, 0U);
  EXPECT_FALSE(queue.remove(handles[0]));
  EXPECT_EQ(queue.pop(0)->number, 2U);
}

TEST(PriorityQueue, DrainsOneProducerOnDemand) {
  LaneSet<> a = LaneSet<>::allocate(1024), b = LaneSet<>::allocate(1024);
  PriorityQueue<Job> queue(10, kNever);
  queue.attach(a);
  queue.attach(b);
  push(a, {0, 0, Priority::kLow, 0});
  push(b, {1, 0, Priority::kHigh, 0});
  EXPECT_EQ(queue.drain(a, parse), 1U);
  EXPECT_EQ(queue.pop(0)->producer, 0U);
  EXPECT_FALSE(b.empty());
  EXPECT_EQ(queue.drain(b, parse), 1U);
}

TEST(PriorityQueue, WhatWasDrainedStaysWhenItsProducerIsDetached) {
  LaneSet<> a = LaneSet<>::allocate(1024);
  PriorityQueue<Job> queue(10, kNever);
  queue.attach(a);
  push(a, {0, 0, Priority::kNormal, 0});
  {
    LaneSet<> b = LaneSet<>::allocate(1024);
    queue.attach(b);
    push(b, {1, 0, Priority::kNormal, 0});
    queue.drain(parse);
    push(b, {1, 1, Priority::kNormal, 0});
    queue.detach(b);
  }
  push(a, {0, 1, Priority::kNormal, 0});
  EXPECT_EQ(queue.drain(parse), 1U);
  EXPECT_EQ(pop_all(queue).size(), 3U);
}

TEST(PriorityQueue, ABrokenLaneStopsAloneAndItsProducersOthersGoOn) {
  constexpr std::uint32_t kLaneBytes = 1024;
  GuardedMemory memory(LaneSet<>::bytes_needed(kLaneBytes));
  LaneSet<> broken(memory.data(), kLaneBytes);
  LaneSet<> sane = LaneSet<>::allocate(kLaneBytes);
  PriorityQueue<Job> queue(100, kNever);
  queue.attach(broken);
  queue.attach(sane);
  const auto push_to_all = [&](std::uint32_t number) {
    for (const Priority priority : kHighestFirst) {
      push(broken, {0, number, priority, 0});
      push(sane, {1, number, priority, 0});
    }
  };
  push_to_all(0);
  EXPECT_EQ(queue.drain(parse), 6U);
  push_to_all(1);
  auto* const normal = reinterpret_cast<SpscRingHeader<StdAtomics>*>(
      memory.data() + static_cast<std::size_t>(Priority::kNormal) * LaneSet<>::bytes_needed(kLaneBytes) / kPriorities);
  normal->tail.store(std::bit_cast<std::uint64_t>(RingPosition{1U << 30, 2}), std::memory_order_release);
  EXPECT_EQ(queue.drain(parse), 5U);
  EXPECT_TRUE(broken.corrupt());
  EXPECT_FALSE(sane.corrupt());
  push_to_all(2);
  EXPECT_EQ(queue.drain(parse), 5U);
  std::map<std::pair<std::uint32_t, Priority>, std::uint32_t> next;
  for (const Job& job : pop_all(queue)) {
    std::uint32_t& expected = next[{job.producer, job.priority}];
    EXPECT_EQ(job.number, expected++);
  }
  for (const auto& [from, count] : next) EXPECT_EQ(count, from == std::pair(0U, Priority::kNormal) ? 1U : 3U);
  EXPECT_EQ(next.size(), 6U);
}

// Any operation in any order against a plain list of what is under way.
TEST(PriorityQueue, LosesAndDoublesNothingWhateverTheOrderOfOperations) {
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    std::vector<std::unique_ptr<LaneSet<>>> producers;
    PriorityQueue<Job> queue(1 + random() % 20, static_cast<std::int64_t>(random() % 100));
    for (std::uint64_t i = 1 + random() % 4; i > 0; --i) {
      producers.push_back(std::make_unique<LaneSet<>>(LaneSet<>::allocate(64U << random() % 4)));
      queue.attach(*producers.back());
    }
    std::map<std::pair<std::uint32_t, std::uint32_t>, Job> under_way;  // by producer and number
    std::map<std::pair<std::uint32_t, Priority>, std::uint32_t> drained;
    std::uint32_t number = 0;
    std::int64_t now = 0;
    for (int step = 0; step < 500; ++step) {
      ++now;
      switch (random() % 4) {
        case 0:
        case 1: {
          const auto producer = static_cast<std::uint32_t>(random() % producers.size());
          const Job job{producer, ++number, static_cast<Priority>(random() % 3), now};
          if (push(*producers[producer], job)) under_way[{producer, number}] = job;
          break;
        }
        case 2:
          queue.drain([&](std::span<const std::byte> record) {
            auto entry = parse(record);
            std::uint32_t& last = drained[{entry->second.producer, entry->second.priority}];
            EXPECT_LT(last, entry->second.number) << "a lane's order";
            last = entry->second.number;
            return entry;
          });
          break;
        case 3: {
          const std::optional<Job> job = queue.pop(now);
          if (!job) break;
          const auto found = under_way.find({job->producer, job->number});
          ASSERT_NE(found, under_way.end());
          ASSERT_EQ(found->second, *job);
          under_way.erase(found);
          break;
        }
      }
    }
    do {
      for (const Job& job : pop_all(queue, now)) ASSERT_EQ(under_way.erase({job.producer, job.number}), 1U);
    } while (queue.drain(parse) > 0);
    ASSERT_TRUE(under_way.empty());
  }
}

test::Scenario two_producers(std::uint32_t jobs_each, std::size_t capacity) {
  return [=](test::Interleaver& threads) {
    using Lanes = LaneSet<InterleavedAtomics>;
    std::array lanes{Lanes::allocate(128), Lanes::allocate(128)};  // three jobs in a lane
    PriorityQueue<Job, InterleavedAtomics> queue(capacity, kNever);
    for (std::uint32_t producer = 0; producer < 2; ++producer) {
      queue.attach(lanes[producer]);
      threads.add_thread([&, producer] {
        for (std::uint32_t i = 0; i < jobs_each; ++i) {
          const Priority priority = i % 2 == 0 ? Priority::kLow : Priority::kHigh;
          auto& lane = lanes[producer].lane(priority);
          test::Interleaver::wait_until([&] { return lane.can_claim(1, sizeof(Job)); });
          EXPECT_TRUE(push(lanes[producer], {producer, i / 2, priority, 0}));
        }
      });
    }
    threads.add_thread([&] {
      std::map<std::pair<std::uint32_t, Priority>, std::uint32_t> next;
      for (std::uint32_t popped = 0; popped < 2 * jobs_each;) {
        if (queue.drain(parse) == 0) {
          test::Interleaver::wait_until([&] { return !lanes[0].empty() || !lanes[1].empty(); });
        }
        while (const std::optional<Job> job = queue.pop(0)) {
          std::uint32_t& expected = next[{job->producer, job->priority}];
          ASSERT_EQ(job->number, expected++);
          ++popped;
        }
      }
      EXPECT_EQ(queue.drain(parse), 0U);
      EXPECT_FALSE(lanes[0].corrupt() || lanes[1].corrupt());
    });
    threads.run();
  };
}

TEST(PriorityQueueInterleaved, EveryScheduleOfUpToTwoPreemptions) {
  EXPECT_GT(test::explore_all(2, two_producers(3, 16)), 1'000U);
}

TEST(PriorityQueueInterleaved, RandomSchedules) {
  test::explore_randomly(test::soak(500), two_producers(10, 16));
  test::explore_randomly(test::soak(500), two_producers(10, 2));
}

class PriorityQueueStress : public testing::TestWithParam<std::uint32_t> {};
INSTANTIATE_TEST_SUITE_P(Producers, PriorityQueueStress, testing::Values(1, 2, 4), testing::PrintToStringParamName());

TEST_P(PriorityQueueStress, ExactlyOnceAndEachLaneInOrder) {
  const std::uint64_t jobs_each = test::soak(150'000) / GetParam();
  std::vector<LaneSet<>> lanes;
  for (std::uint32_t producer = 0; producer < GetParam(); ++producer) lanes.push_back(LaneSet<>::allocate(1024));
  PriorityQueue<Job> queue(50, kNever);
  std::atomic<std::uint32_t> running = GetParam();
  std::vector<std::thread> threads;
  for (std::uint32_t producer = 0; producer < GetParam(); ++producer) {
    queue.attach(lanes[producer]);
    threads.emplace_back([&, producer] {
      std::array<std::uint32_t, kPriorities> next{};
      std::mt19937 random(producer);
      for (std::uint64_t i = 0; i < jobs_each; ++i) {
        const auto priority = static_cast<Priority>(random() % 3);
        const Job job{producer, next[static_cast<std::size_t>(priority)]++, priority, 0};
        while (!push(lanes[producer], job)) std::this_thread::yield();
      }
      --running;
    });
  }
  std::map<std::pair<std::uint32_t, Priority>, std::uint32_t> next;
  std::uint64_t popped = 0, out_of_order = 0;
  while (true) {
    const bool all_pushed = running == 0;
    if (queue.drain(parse) == 0) {
      if (all_pushed) break;
      std::this_thread::yield();
    }
    while (const std::optional<Job> job = queue.pop(0)) {
      std::uint32_t& expected = next[{job->producer, job->priority}];
      out_of_order += job->number != expected++;
      ++popped;
    }
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(out_of_order, 0U);
  EXPECT_EQ(popped, jobs_each * GetParam());
  for (const LaneSet<>& each : lanes) EXPECT_FALSE(each.corrupt());
}

}  // namespace
}  // namespace rts
