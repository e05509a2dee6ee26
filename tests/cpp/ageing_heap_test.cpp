#include "rts/ageing_heap.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <new>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {
std::size_t allocations = 0;
}

[[gnu::noinline]] void* operator new(std::size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace rts {
namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

Ticket low(std::int64_t arrival_ns, std::int64_t deadline_ns = 0) {
  return {Priority::kLow, arrival_ns, deadline_ns};
}
Ticket normal(std::int64_t arrival_ns, std::int64_t deadline_ns = 0) {
  return {Priority::kNormal, arrival_ns, deadline_ns};
}
Ticket high(std::int64_t arrival_ns, std::int64_t deadline_ns = 0) {
  return {Priority::kHigh, arrival_ns, deadline_ns};
}

std::string pop_all(AgeingHeap<char>& heap, std::int64_t now_ns) {
  std::string order;
  while (const std::optional<char> value = heap.pop(now_ns)) order += *value;
  return order;
}

// An element that knows how many of its kind live, and notices a life after its death.
class Counted {
 public:
  static inline int alive = 0;

  explicit Counted(int number) : number_(number) { ++alive; }
  Counted(Counted&& other) noexcept : number_(other.number()) { ++alive; }
  Counted& operator=(Counted&&) = delete;
  ~Counted() {
    EXPECT_EQ(self_, this) << "destroyed twice, or never made";
    self_ = nullptr;
    --alive;
  }
  int number() const {
    EXPECT_EQ(self_, this) << "read after its end";
    return number_;
  }

 private:
  int number_;
  Counted* self_ = this;
};

TEST(AgeingHeap, RefusesWhatNoHeapCanBe) {
  EXPECT_THROW(AgeingHeap<char>(1, -1), std::invalid_argument);
  EXPECT_THROW(AgeingHeap<char>(std::size_t{1} << 32, 0), std::invalid_argument);
}

TEST(AgeingHeap, TheHigherPriorityGoesFirst) {
  AgeingHeap<char> heap(8, kNever);
  heap.push(low(1), 'l');
  heap.push(normal(2), 'n');
  heap.push(high(3), 'h');
  heap.push(normal(1), 'm');
  EXPECT_EQ(pop_all(heap, 3), "hmnl");
}

TEST(AgeingHeap, WithinAPriorityTheEarlierDeadlineThenTheEarlierArrivalThenTheEarlierPush) {
  AgeingHeap<char> heap(16, kNever);
  heap.push(normal(1), 'f');  // no deadline: last
  heap.push(normal(5, 200), 'c');
  heap.push(normal(4, 200), 'b');
  heap.push(normal(9, 100), 'a');
  heap.push(normal(5, 200), 'd');
  heap.push(normal(5, 200), 'e');
  heap.push(high(99), '0');
  heap.push(low(0, 1), 'z');
  EXPECT_EQ(pop_all(heap, 10), "0abcdefz");
}

TEST(AgeingHeap, WhoHasWaitedLongEnoughGoesFirstTheOldestOfThemFirst) {
  AgeingHeap<char> heap(8, 100);
  heap.push(low(10), 'b');
  heap.push(low(5, 1'000), 'a');
  heap.push(high(50, 60), 'h');
  heap.push(normal(20), 'n');
  EXPECT_EQ(*heap.peek(104), 'h');
  EXPECT_EQ(*heap.peek(105), 'a') << "at its ageing exactly";
  EXPECT_EQ(*heap.pop(105), 'a');
  EXPECT_EQ(*heap.pop(109), 'h');
  EXPECT_EQ(*heap.pop(119), 'b');
  EXPECT_EQ(*heap.pop(119), 'n');
  EXPECT_EQ(heap.pop(119), std::nullopt);
}

TEST(AgeingHeap, WithAnAgeingOfZeroItIsAQueueByArrival) {
  AgeingHeap<char> heap(8, 0);
  heap.push(high(3), 'c');
  heap.push(low(1), 'a');
  heap.push(normal(3), 'd');
  heap.push(low(2), 'b');
  EXPECT_EQ(pop_all(heap, 3), "abcd");
}

TEST(AgeingHeap, AnyArrivalWillDo) {
  AgeingHeap<char> heap(4, 100);
  heap.push(high(0), 'h');
  heap.push(low(std::numeric_limits<std::int64_t>::min()), 'a');
  heap.push(low(kNever), 'z');
  EXPECT_EQ(pop_all(heap, 0), "ahz");
}

TEST(AgeingHeap, ArrivalsOutOfOrderAgeInOrder) {
  AgeingHeap<char> heap(8, 10);
  for (const auto& [arrival, value] : {std::pair{3, 'c'}, {1, 'a'}, {5, 'e'}, {2, 'b'}, {4, 'd'}, {1, 'A'}}) {
    heap.push(low(arrival), value);
  }
  std::string oldest_first;
  heap.for_each([&](char value) { oldest_first += value; });
  EXPECT_EQ(oldest_first, "aAbcde");
  EXPECT_EQ(pop_all(heap, 100), "aAbcde");
}

TEST(AgeingHeap, IsBounded) {
  AgeingHeap<int> heap(3, kNever);
  AgeingHeap<int>::Handle handle = 77;
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(heap.push(normal(i), i));
  EXPECT_TRUE(heap.full());
  EXPECT_FALSE(heap.push(high(0), 9, &handle));
  EXPECT_EQ(handle, 77U);
  EXPECT_EQ(heap.size(), 3U);
  EXPECT_EQ(*heap.pop(0), 0);
  EXPECT_FALSE(heap.full());
  EXPECT_TRUE(heap.push(high(0), 9));
  EXPECT_FALSE(heap.push(high(0), 10));

  AgeingHeap<int> none(0, kNever);
  EXPECT_TRUE(none.full());
  EXPECT_TRUE(none.empty());
  EXPECT_FALSE(none.push(high(0), 1));
  EXPECT_EQ(none.pop(0), std::nullopt);
  EXPECT_EQ(none.peek(0), nullptr);
  EXPECT_FALSE(none.remove(1));
}

TEST(AgeingHeap, CountsByPriority) {
  AgeingHeap<char> heap(8, kNever);
  AgeingHeap<char>::Handle handle;
  heap.push(low(0), 'l', &handle);
  heap.push(low(0), 'l');
  heap.push(high(0), 'h');
  EXPECT_EQ(heap.size(Priority::kLow), 2U);
  EXPECT_EQ(heap.size(Priority::kNormal), 0U);
  EXPECT_EQ(heap.size(Priority::kHigh), 1U);
  heap.remove(handle);
  heap.pop(0);
  EXPECT_EQ(heap.size(Priority::kLow), 1U);
  EXPECT_EQ(heap.size(Priority::kHigh), 0U);
  heap.clear();
  EXPECT_EQ(heap.size(Priority::kLow), 0U);
  EXPECT_TRUE(heap.empty());
}

TEST(AgeingHeap, AHandleNamesItsEntryAndNothingAfter) {
  AgeingHeap<char> heap(2, kNever);
  AgeingHeap<char>::Handle a = 0, b = 0, c = 0;
  heap.push(normal(0), 'a', &a);
  heap.push(normal(0), 'b', &b);
  EXPECT_NE(a, 0U);
  EXPECT_NE(a, b);
  EXPECT_FALSE(heap.remove(0));
  EXPECT_FALSE(heap.remove(~AgeingHeap<char>::Handle{0}));
  EXPECT_TRUE(heap.remove(a));
  EXPECT_FALSE(heap.remove(a));
  heap.push(normal(0), 'c', &c);  // in the place that is free
  EXPECT_FALSE(heap.remove(a));
  EXPECT_EQ(heap.size(), 2U);
  EXPECT_EQ(*heap.pop(0), 'b');
  EXPECT_FALSE(heap.remove(b));
  EXPECT_TRUE(heap.remove(c));
  EXPECT_TRUE(heap.empty());
  heap.push(normal(0), 'd', &a);
  heap.clear();
  EXPECT_FALSE(heap.remove(a));
}

TEST(AgeingHeap, AThrowingElementLeavesTheHeapAsItWas) {
  struct Throws {
    explicit Throws(bool throws_when_moved) : throws(throws_when_moved) {}
    Throws(Throws&& other) : throws(other.throws) {
      if (throws) throw std::runtime_error("moved");
    }
    bool throws;
  };
  AgeingHeap<Throws> heap(2, kNever);
  EXPECT_THROW(heap.push(normal(0), Throws(true)), std::runtime_error);
  EXPECT_TRUE(heap.empty());
  EXPECT_TRUE(heap.push(normal(0), Throws(false)));
  EXPECT_TRUE(heap.push(normal(0), Throws(false)));
  EXPECT_EQ(heap.size(), 2U);
}

TEST(AgeingHeap, ElementsLiveExactlyAsLongAsTheyAreInIt) {
  ASSERT_EQ(Counted::alive, 0);
  {
    AgeingHeap<Counted> heap(4, kNever);
    AgeingHeap<Counted>::Handle handle;
    for (int i = 0; i < 6; ++i) EXPECT_EQ(heap.push(normal(i), Counted(i), &handle), i < 4);
    EXPECT_EQ(Counted::alive, 4);
    EXPECT_EQ(heap.pop(0)->number(), 0);
    EXPECT_EQ(Counted::alive, 3);
    EXPECT_TRUE(heap.remove(handle));
    EXPECT_EQ(Counted::alive, 2);
    EXPECT_EQ(heap.peek(0)->number(), 1);
    heap.clear();
    EXPECT_EQ(Counted::alive, 0);
    EXPECT_TRUE(heap.push(normal(0), Counted(9)));
  }
  EXPECT_EQ(Counted::alive, 0);
}

TEST(AgeingHeap, AllocatesNothingOnceMade) {
  AgeingHeap<int> heap(64, 50);
  const std::size_t before = allocations;
  AgeingHeap<int>::Handle handle = 0;
  for (int i = 0; i < 10'000; ++i) {
    heap.push({static_cast<Priority>(i % 3), i * 7 % 100, i % 5}, i, &handle);
    if (i % 3 == 0) heap.remove(handle);
    if (i % 2 == 0) heap.pop(i);
  }
  heap.clear();
  EXPECT_EQ(allocations, before);
}

// A server that takes one entry after the other, each for as long as it likes up to kService, under more HIGH entries
// than it can serve. Whoever is not HIGH waits for the ageing, for what is being served then, and for those who were
// before it.
TEST(AgeingHeap, NothingStarvesUnderAnyLoad) {
  constexpr std::int64_t kAgeing = 1'000;
  constexpr std::int64_t kService = 50;
  std::size_t aged = 0;
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    const std::int64_t high_every = 5 + static_cast<std::int64_t>(random() % 40);
    const std::int64_t other_every = 100 + static_cast<std::int64_t>(random() % 500);
    AgeingHeap<std::size_t> heap(256, kAgeing);
    std::vector<std::int64_t> arrivals;
    std::map<std::size_t, std::int64_t> waiting;  // entry → arrival; entries are numbered by arrival
    std::int64_t now = 0, next_high = 0, next_other = 0;
    const auto arrive = [&](Priority priority, std::int64_t at) {
      const std::int64_t deadline = random() % 3 == 0 ? at + static_cast<std::int64_t>(random() % 5'000) : 0;
      if (!heap.push({priority, at, deadline}, arrivals.size())) return;
      waiting.emplace(arrivals.size(), at);
      arrivals.push_back(at);
    };
    std::map<std::size_t, std::int64_t> bounds;  // entry → until when it must have been taken
    while (now < 30'000) {
      while (std::min(next_high, next_other) <= now) {
        if (next_high <= next_other) {
          arrive(Priority::kHigh, next_high);
          next_high += high_every;
        } else {
          arrive(random() % 2 == 0 ? Priority::kLow : Priority::kNormal, next_other);
          next_other += other_every;
        }
      }
      // The service that was under way when an entry's ageing ended is over now.
      std::int64_t older = 0;
      for (const auto& [entry, arrival] : waiting) {
        if (arrival + kAgeing > now) break;
        bounds.try_emplace(entry, arrival + kAgeing + kService + older * kService);
        ++older;
      }
      const std::optional<std::size_t> taken = heap.pop(now);
      if (!taken) {
        now = std::min(next_high, next_other);
        continue;
      }
      const std::int64_t waited = now - arrivals[*taken];
      if (const auto bound = bounds.find(*taken); bound != bounds.end()) {
        ASSERT_LE(now, bound->second) << "waited " << waited;
        ++aged;
      }
      waiting.erase(*taken);
      ASSERT_TRUE(waiting.empty() || !bounds.contains(waiting.begin()->first) ||
                  bounds.at(waiting.begin()->first) >= now)
          << "the oldest still waits";
      now += 1 + static_cast<std::int64_t>(random() % kService);
    }
  }
  EXPECT_GT(aged, 10'000U) << "the load is such that hardly anyone had to age";
}

// The rules as they are written, over a plain list.
class Model {
 public:
  struct Entry {
    Ticket ticket;
    std::uint64_t order;
    int value;
    AgeingHeap<Counted>::Handle handle;
  };
  explicit Model(std::int64_t ageing_ns) : ageing_ns_(ageing_ns) {}

  std::vector<Entry>::iterator next(std::int64_t now_ns) {
    const auto oldest = std::ranges::min_element(
        entries, {}, [](const Entry& entry) { return std::tuple(entry.ticket.arrival_ns, entry.order); });
    if (oldest == entries.end() || now_ns - oldest->ticket.arrival_ns >= ageing_ns_) return oldest;
    return std::ranges::min_element(entries, {}, [](const Entry& entry) {
      const std::int64_t due = entry.ticket.deadline_ns == 0 ? kNever : entry.ticket.deadline_ns;
      return std::tuple(-static_cast<int>(entry.ticket.priority), due, entry.ticket.arrival_ns, entry.order);
    });
  }

  std::vector<Entry> entries;

 private:
  std::int64_t ageing_ns_;
};

TEST(AgeingHeap, DoesWhatTheRulesSay) {
  for (std::uint64_t seed = 1; seed <= 400; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    const std::size_t capacity = 1 + random() % 40;
    const auto ageing = static_cast<std::int64_t>(random() % 200);
    AgeingHeap<Counted> heap(capacity, ageing);
    Model model(ageing);
    std::vector<AgeingHeap<Counted>::Handle> gone;
    std::int64_t now = 0;
    int pushed = 0;
    for (int step = 0; step < 500; ++step) {
      now += static_cast<std::int64_t>(random() % 10);
      switch (random() % 8) {
        case 0:
        case 1:
        case 2: {
          const Ticket ticket{static_cast<Priority>(random() % 3), now - static_cast<std::int64_t>(random() % 30),
                              random() % 2 == 0 ? 0 : now + static_cast<std::int64_t>(random() % 4)};
          AgeingHeap<Counted>::Handle handle = 0;
          const bool fits = heap.push(ticket, Counted(pushed), &handle);
          ASSERT_EQ(fits, model.entries.size() < capacity);
          if (!fits) break;
          for (const auto& entry : model.entries) ASSERT_NE(entry.handle, handle);
          model.entries.push_back({ticket, static_cast<std::uint64_t>(pushed), pushed, handle});
          ++pushed;
          break;
        }
        case 3:
        case 4: {
          const auto next = model.next(now);
          ASSERT_EQ(heap.peek(now) == nullptr, next == model.entries.end());
          const Counted* const peeked = heap.peek(now);
          const int number = peeked == nullptr ? -1 : peeked->number();
          const std::optional<Counted> value = heap.pop(now);
          ASSERT_EQ(value.has_value(), next != model.entries.end());
          if (!value) break;
          ASSERT_EQ(number, next->value);
          ASSERT_EQ(value->number(), next->value);
          gone.push_back(next->handle);
          model.entries.erase(next);
          break;
        }
        case 5: {
          if (model.entries.empty()) break;
          const auto at = model.entries.begin() + static_cast<std::ptrdiff_t>(random() % model.entries.size());
          ASSERT_TRUE(heap.remove(at->handle));
          gone.push_back(at->handle);
          model.entries.erase(at);
          break;
        }
        case 6:
          if (gone.empty()) break;
          ASSERT_FALSE(heap.remove(gone[random() % gone.size()]));
          break;
        case 7:
          if (random() % 40 != 0) break;
          heap.clear();
          for (const auto& entry : model.entries) gone.push_back(entry.handle);
          model.entries.clear();
          break;
      }
      ASSERT_EQ(heap.size(), model.entries.size());
      ASSERT_EQ(Counted::alive, static_cast<int>(model.entries.size()));
      for (const Priority priority : {Priority::kLow, Priority::kNormal, Priority::kHigh}) {
        ASSERT_EQ(heap.size(priority),
                  static_cast<std::size_t>(std::ranges::count(
                      model.entries, priority, [](const Model::Entry& entry) { return entry.ticket.priority; })));
      }
      std::int64_t last = std::numeric_limits<std::int64_t>::min();
      std::size_t listed = 0;
      heap.for_each([&](const Counted& value) {
        const auto entry = std::ranges::find(model.entries, value.number(), &Model::Entry::value);
        ASSERT_NE(entry, model.entries.end());
        EXPECT_GE(entry->ticket.arrival_ns, last);
        last = entry->ticket.arrival_ns;
        ++listed;
      });
      ASSERT_EQ(listed, model.entries.size());
    }
  }
  EXPECT_EQ(Counted::alive, 0);
}

}  // namespace
}  // namespace rts
