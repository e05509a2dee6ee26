// Peers that die at every step in turn: around each atomic operation, and where a scenario says so in between. They are
// child processes over shared memory and end without any cleaning up.
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "hooked_atomics.hpp"
#include "rts/doorbell.hpp"
#include "rts/file_descriptor.hpp"
#include "rts/priority_queue.hpp"
#include "rts/spsc_ring.hpp"
#include "test_memory.hpp"

namespace rts {
namespace {

using test::SharedMemory;

constexpr int kKilled = 77;
constexpr int kLived = 0;
constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

// Around each atomic operation of a process that is to die.
class Mortal {
 public:
  Mortal() { step(); }
  ~Mortal() { step(); }
  static void step() {
    if (steps_left_ != 0 && --steps_left_ == 0) ::_exit(kKilled);
  }
  static void die_at(int step) { steps_left_ = step; }

 private:
  static inline int steps_left_ = 0;  // 0: immortal
};
using MortalAtomics = test::HookedAtomics<Mortal>;
using Ring = SpscRing<MortalAtomics>;
using Lanes = LaneSet<MortalAtomics>;
using Bell = BasicDoorbell<MortalAtomics>;

// Lives `life` in a child that dies at the given step; false: it lived to its end.
bool dies(int step, const std::function<void()>& life) {
  const pid_t child = ::fork();
  if (child == 0) {
    Mortal::die_at(step);
    life();
    ::_exit(testing::Test::HasFailure() ? 1 : kLived);
  }
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && (WEXITSTATUS(status) == kKilled || WEXITSTATUS(status) == kLived)) << status;
  return WIFEXITED(status) && WEXITSTATUS(status) == kKilled;
}

// `trial(n)` has a life end at its n-th step and returns whether it did. How many deaths there were, until one lived.
int for_each_death(const std::function<bool(int)>& trial) {
  for (int step = 1; step < 10'000; ++step) {
    SCOPED_TRACE("dies at step " + std::to_string(step));
    if (!trial(step) || testing::Test::HasFailure()) return step - 1;
  }
  ADD_FAILURE() << "no life comes to its end";
  return 0;
}

// How far a life got. The child writes it, and the parent reads it when the child is dead.
struct Journal {
  std::uint32_t begun = 0;
  std::uint32_t ended = 0;
};

// Shared memory with a journal at its start.
class Stage {
 public:
  explicit Stage(std::size_t bytes) : memory_(kCacheLine + bytes), journal_(new (memory_.data()) Journal) {}
  volatile Journal& journal() const { return *journal_; }
  std::byte* data() const { return memory_.data() + kCacheLine; }

 private:
  SharedMemory memory_;
  Journal* journal_;
};

std::string payload(std::uint32_t number) {
  return std::string(1 + number * 11 % 29, static_cast<char>('a' + number % 26)) + std::to_string(number);
}

// Writes a record in two halves, and may die in between.
bool publish_in_halves(Ring::Producer& producer, std::string_view text) {
  std::byte* out = producer.claim(static_cast<std::uint32_t>(text.size()));
  if (out == nullptr) return false;
  Mortal::step();
  std::memcpy(out, text.data(), text.size() / 2);
  Mortal::step();
  std::memcpy(out + text.size() / 2, text.data() + text.size() / 2, text.size() - text.size() / 2);
  Mortal::step();
  producer.publish();
  return true;
}

std::vector<std::string> read_all(Ring::Consumer& consumer) {
  std::vector<std::string> records;
  for (auto record = consumer.front(); !record.empty(); record = consumer.front()) {
    records.emplace_back(reinterpret_cast<const char*>(record.data()), record.size());
    consumer.pop();
  }
  consumer.release();
  return records;
}

std::vector<std::string> payloads(std::uint32_t from, std::uint32_t to) {
  std::vector<std::string> texts;
  for (std::uint32_t number = from; number < to; ++number) texts.push_back(payload(number));
  return texts;
}

// What holds: the consumer reads what the dead one had published, whole and in order, and of a record whose publish()
// was under way either all or nothing; and the next producer goes on behind it.
TEST(AKilledProducer, LeavesAPrefixOfItsRecordsAndARingThatGoesOn) {
  const SpscRingShape shape{.bytes = 256};
  const int deaths = for_each_death([&](int step) {
    Stage stage(Ring::bytes_needed(shape));
    const Ring ring(stage.data(), shape);
    Ring(ring).clear({.bytes = 0U - 104, .records = 0U - 2});  // skips and wraps on its way
    Ring::Consumer consumer = ring.consumer();
    const bool died = dies(step, [&] {
      Ring::Producer producer = ring.producer();
      std::uint32_t number = 0;
      do {
        stage.journal().begun = number + 1;
        if (!publish_in_halves(producer, payload(number))) break;
        stage.journal().ended = ++number;
      } while (true);  // until it is full
    });
    const std::uint32_t begun = stage.journal().begun, ended = stage.journal().ended;
    const auto read = read_all(consumer);
    const auto published = static_cast<std::uint32_t>(read.size());
    EXPECT_GE(published, ended);
    EXPECT_LE(published, begun);
    EXPECT_EQ(read, payloads(0, published));

    Ring::Producer next = ring.producer();
    for (std::uint32_t number = published; number < published + 30; ++number) {
      EXPECT_TRUE(next.push(payload(number)));
      EXPECT_EQ(read_all(consumer), payloads(number, number + 1));
    }
    EXPECT_FALSE(consumer.corrupt());
    return died;
  });
  EXPECT_GT(deaths, 30);
}

// The same, where the next producer comes before anything was read: it finds exactly the room that is left.
TEST(AKilledProducer, LeavesItsSuccessorTheRoomThatItHadNotUsed) {
  const SpscRingShape shape{.bytes = 256, .records = 9};
  for_each_death([&](int step) {
    Stage stage(Ring::bytes_needed(shape));
    const Ring ring(stage.data(), shape);
    const bool died = dies(step, [&] {
      Ring::Producer producer = ring.producer();
      for (std::uint32_t number = 0; number < 6; ++number) publish_in_halves(producer, "0123456789ab");
    });
    Ring::Consumer consumer = ring.consumer();
    const std::uint32_t left = shape.records - consumer.records();
    Ring::Producer next = ring.producer();
    for (std::uint32_t i = 0; i < left; ++i) EXPECT_TRUE(next.push(std::string_view("ba9876543210"))) << i;
    EXPECT_FALSE(next.push(std::string_view("ba9876543210")));
    EXPECT_EQ(read_all(consumer).size(), shape.records);
    return died;
  });
}

// At whatever instruction: the signal comes when it comes, in the middle of publishing as fast as it can.
TEST(AKilledProducer, ByASignalLeavesAPrefixToo) {
  const SpscRingShape shape{.bytes = 1024};
  for (std::uint64_t trial = 0; trial < test::soak(20); ++trial) {
    Stage stage(Ring::bytes_needed(shape));
    const Ring ring(stage.data(), shape);
    const pid_t child = ::fork();
    if (child == 0) {
      Ring::Producer producer = ring.producer();
      for (std::uint32_t number = 0;; ++number) {
        while (!producer.push(payload(number))) ::sched_yield();
      }
    }
    Ring::Consumer consumer = ring.consumer();
    std::uint32_t read = 0;
    const auto read_on = [&] {
      const auto records = read_all(consumer);
      const auto count = static_cast<std::uint32_t>(records.size());
      EXPECT_EQ(records, payloads(read, read + count));
      EXPECT_FALSE(consumer.corrupt());
      read += count;
    };
    while (read < 1'000 + 37 * trial && !testing::Test::HasFailure()) {
      read_on();
      ::sched_yield();
    }
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    read_on();
    Ring::Producer next = ring.producer();
    for (int i = 0; i < 100; ++i) {
      EXPECT_TRUE(next.push(payload(read)));
      read_on();
    }
    EXPECT_TRUE(consumer.empty());
  }
}

// What holds: what the dead one had given back is not met again, and all else is read by the next consumer, once and in
// order. So nothing is lost; read twice is only what was popped and not given back, and of a release() that was under
// way either all or nothing.
TEST(AKilledConsumer, LeavesAllThatItHadNotGivenBack) {
  const SpscRingShape shape{.bytes = 256};
  const int deaths = for_each_death([&](int step) {
    Stage stage(Ring::bytes_needed(shape));
    const Ring ring(stage.data(), shape);
    Ring(ring).clear({.bytes = 0U - 104, .records = 0U - 2});
    Ring::Producer producer = ring.producer();
    std::uint32_t pushed = 0;
    while (producer.push(payload(pushed))) ++pushed;

    const bool died = dies(step, [&] {
      Ring::Consumer consumer = ring.consumer();
      std::uint32_t popped = 0;
      for (auto record = consumer.front(); !record.empty(); record = consumer.front()) {
        Mortal::step();
        consumer.pop();
        Mortal::step();
        if (++popped % 2 != 0) continue;
        stage.journal().begun = popped;
        consumer.release();
        stage.journal().ended = popped;
      }
    });
    const std::uint32_t begun = stage.journal().begun, ended = stage.journal().ended;
    Ring::Consumer next = ring.consumer();
    const std::uint32_t left = next.records();
    const std::uint32_t given_back = pushed - left;
    EXPECT_TRUE(given_back == ended || given_back == begun) << given_back;
    EXPECT_EQ(read_all(next), payloads(given_back, pushed));
    // And the producer goes on as if nothing had been.
    for (std::uint32_t end = pushed + 30; pushed < end; ++pushed) {
      EXPECT_TRUE(producer.push(payload(pushed)));
      EXPECT_EQ(read_all(next), payloads(pushed, pushed + 1));
    }
    EXPECT_FALSE(next.corrupt());
    return died;
  });
  EXPECT_GT(deaths, 15);
}

struct Job {
  std::uint32_t producer;
  std::uint32_t number;  // of its producer's, in its lane
  Priority priority;
};

std::optional<std::pair<Ticket, Job>> parse(std::span<const std::byte> record) {
  Job job;
  if (record.size() != sizeof job) return std::nullopt;
  std::memcpy(&job, record.data(), sizeof job);
  return std::pair{Ticket{}, job};
}

// The n-th of a producer's jobs.
Job job(std::uint32_t producer, std::uint32_t n) {
  return {producer, n / kPriorities, static_cast<Priority>(n % kPriorities)};
}
bool push(Lanes& lanes, const Job& job) {
  return lanes.push(job.priority, std::span(&job, 1));
}

// Pops all, checks each lane's order from 0 on, and returns how many came from each producer.
std::array<std::uint32_t, 2> count_in_order(PriorityQueue<Job, MortalAtomics>& queue) {
  std::map<std::pair<std::uint32_t, Priority>, std::uint32_t> next;
  std::array<std::uint32_t, 2> counts{};
  while (const std::optional<Job> popped = queue.pop(0)) {
    std::uint32_t& expected = next[{popped->producer, popped->priority}];
    EXPECT_EQ(popped->number, expected++);
    ++counts[popped->producer];
  }
  return counts;
}

TEST(AKilledProducer, OfAPriorityQueueHarmsNoOtherProducersLanes) {
  constexpr std::uint32_t kLaneBytes = 256;
  constexpr std::uint32_t kJobs = 12;
  const int deaths = for_each_death([&](int step) {
    Stage stage(2 * Lanes::bytes_needed(kLaneBytes));
    std::byte* const mortals = stage.data();
    std::byte* const others = stage.data() + Lanes::bytes_needed(kLaneBytes);
    Lanes other(others, kLaneBytes);
    for (std::uint32_t n = 0; n < kJobs / 2; ++n) EXPECT_TRUE(push(other, job(1, n)));
    const bool died = dies(step, [&] {
      Lanes lanes(mortals, kLaneBytes);
      for (std::uint32_t n = 0; n < kJobs; ++n) {
        stage.journal().begun = n + 1;
        EXPECT_TRUE(push(lanes, job(0, n)));
        stage.journal().ended = n + 1;
      }
    });
    for (std::uint32_t n = kJobs / 2; n < kJobs; ++n) EXPECT_TRUE(push(other, job(1, n)));

    Lanes dead(mortals, kLaneBytes);
    std::uint32_t published = 0;
    for (const Priority priority : {Priority::kLow, Priority::kNormal, Priority::kHigh}) {
      published += dead.reader(priority).records();
    }
    EXPECT_GE(published, stage.journal().ended);
    EXPECT_LE(published, stage.journal().begun);
    PriorityQueue<Job, MortalAtomics> queue(100, kNever);
    queue.attach(dead);
    queue.attach(other);
    // A successor on the dead one's lanes, before these were drained.
    Lanes successor(mortals, kLaneBytes);
    for (std::uint32_t n = published; n < kJobs; ++n) EXPECT_TRUE(push(successor, job(0, n)));
    EXPECT_EQ(queue.drain(parse), 2 * kJobs);
    EXPECT_EQ(count_in_order(queue), (std::array{kJobs, kJobs}));
    EXPECT_FALSE(dead.corrupt() || other.corrupt());
    return died;
  });
  EXPECT_GT(deaths, 20);
}

// The heap dies with its consumer; what the lanes still hold is the next one's. A drain gives each lane back in one
// piece, so a lane is there either whole or not at all.
TEST(AKilledConsumer, OfAPriorityQueueLeavesEachLaneWholeOrDrained) {
  constexpr std::uint32_t kLaneBytes = 256;
  constexpr std::uint32_t kJobs = 12;
  const int deaths = for_each_death([&](int step) {
    Stage stage(Lanes::bytes_needed(kLaneBytes));
    Lanes lanes(stage.data(), kLaneBytes);
    for (std::uint32_t n = 0; n < kJobs; ++n) EXPECT_TRUE(push(lanes, job(0, n)));
    const bool died = dies(step, [&] {
      Lanes consumers(stage.data(), kLaneBytes);
      PriorityQueue<Job, MortalAtomics> queue(100, kNever);
      queue.attach(consumers);
      queue.drain(parse);
      stage.journal().ended = 1;
    });
    Lanes next(stage.data(), kLaneBytes);
    PriorityQueue<Job, MortalAtomics> queue(100, kNever);
    queue.attach(next);
    std::array<std::uint32_t, kPriorities> left;
    for (std::size_t lane = 0; lane < left.size(); ++lane) {
      left[lane] = next.reader(static_cast<Priority>(lane)).records();
      EXPECT_TRUE(left[lane] == 0 || left[lane] == kJobs / kPriorities) << left[lane];
    }
    EXPECT_TRUE(std::ranges::is_sorted(left, std::greater())) << "the highest priority is drained first";
    if (stage.journal().ended != 0) {
      EXPECT_EQ(left[0], 0U);
    }
    queue.drain(parse);
    count_in_order(queue);
    EXPECT_TRUE(push(lanes, job(0, 0)));
    EXPECT_EQ(queue.drain(parse), 1U);
    return died;
  });
  EXPECT_GT(deaths, 6);
}

FileDescriptor new_event() {
  return FileDescriptor(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
}

struct BellStage {
  Bell::Flag mortals_flag;
  Bell::Flag others_flag;
};

// Two producers with a flag each ring one eventfd. One dies, the other's wake-up comes; and with that, or with the dead
// one's own if it got so far, all is found that was published.
TEST(AKilledProducer, TakesNoOneElsesWakeUpWithIt) {
  const SpscRingShape shape{.bytes = 256};
  const std::size_t ring_bytes = align_up(Ring::bytes_needed(shape), kCacheLine);
  bool died_unheard = false;
  const int deaths = for_each_death([&](int step) {
    Stage stage(2 * ring_bytes + sizeof(BellStage));
    const Ring mortals(stage.data(), shape), others(stage.data() + ring_bytes, shape);
    auto* const flags = reinterpret_cast<BellStage*>(stage.data() + 2 * ring_bytes);
    const FileDescriptor event = new_event();
    const Bell mortals_bell(&flags->mortals_flag, event.get());
    const Bell others_bell(&flags->others_flag, event.get());

    mortals_bell.arm();
    others_bell.arm();
    const bool died = dies(step, [&] {
      Ring::Producer producer = mortals.producer();
      for (std::uint32_t number = 0; number < 2; ++number) {
        publish_in_halves(producer, payload(number));
        stage.journal().begun = number + 1;
        mortals_bell.ring();
        stage.journal().ended = number + 1;
      }
    });
    const bool heard = eventfd::wait(event.get(), 0);
    EXPECT_TRUE(heard || stage.journal().ended == 0) << "a ring() that came to its end wakes";
    died_unheard = died_unheard || (stage.journal().begun != 0 && !heard);

    Ring::Producer other = others.producer();
    EXPECT_TRUE(other.push(std::string_view("other")));
    others_bell.ring();
    EXPECT_TRUE(others_bell.wait(0)) << "the sleeper was not woken";
    mortals_bell.consume();
    Ring::Consumer from_dead = mortals.consumer(), from_other = others.consumer();
    EXPECT_GE(read_all(from_dead).size(), stage.journal().begun);
    EXPECT_EQ(read_all(from_other).size(), 1U);

    // The bell that the dead one left wakes the next time.
    mortals_bell.arm();
    mortals_bell.ring();
    EXPECT_TRUE(mortals_bell.wait(0));
    return died;
  });
  EXPECT_GT(deaths, 8);
  EXPECT_TRUE(died_unheard) << "no one died between taking the flag and the system call";
}

// A consumer that dies leaves a bell that its successor can arm: what was rung before is found by looking, and what is
// rung after it wakes.
TEST(AKilledConsumer, LeavesABellThatWakesTheNext) {
  const SpscRingShape shape{.bytes = 256};
  const int deaths = for_each_death([&](int step) {
    Stage stage(Ring::bytes_needed(shape) + sizeof(BellStage));
    const Ring ring(stage.data(), shape);
    auto* const flags = reinterpret_cast<BellStage*>(stage.data() + Ring::bytes_needed(shape));
    const FileDescriptor event = new_event();
    const Bell bell(&flags->mortals_flag, event.get());
    Ring::Producer producer = ring.producer();
    producer.push(payload(0));
    bell.ring();
    const bool died = dies(step, [&] {
      Ring::Consumer consumer = ring.consumer();
      for (int round = 0; round < 2; ++round) {
        bell.arm();
        if (consumer.empty()) {
          bell.consume();
        } else {
          bell.disarm();
        }
        read_all(consumer);
      }
    });
    producer.push(payload(1));
    bell.ring();

    Ring::Consumer next = ring.consumer();
    bell.arm();
    EXPECT_FALSE(next.empty());
    bell.consume();
    EXPECT_EQ(read_all(next).back(), payload(1));
    bell.arm();
    EXPECT_TRUE(next.empty());
    EXPECT_FALSE(eventfd::wait(event.get(), 0)) << "consume() has emptied it";
    producer.push(payload(2));
    bell.ring();
    EXPECT_TRUE(bell.wait(0));
    EXPECT_EQ(read_all(next), payloads(2, 3));
    return died;
  });
  EXPECT_GT(deaths, 10);
}

}  // namespace
}  // namespace rts
