#include "rts/spsc_ring.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "interleave.hpp"
#include "test_memory.hpp"

namespace rts {
namespace {

using test::GuardedMemory;
using test::InterleavedAtomics;
using Ring = SpscRing<>;

constexpr std::uint32_t kSkip = 0xFFFFFFFF;

std::string_view text_of(std::span<const std::byte> record) {
  return {reinterpret_cast<const char*>(record.data()), record.size()};
}

// Bytes that tell one record from any other: of its number and size, and no two neighbours alike.
std::string payload(std::uint64_t number, std::size_t bytes) {
  std::string text(bytes, '\0');
  for (std::size_t i = 0; i < bytes; ++i) text[i] = static_cast<char>(number * 131 + bytes * 7 + i * 29 + 1);
  return text;
}

// A ring and its two sides, in memory with guard pages.
struct Fixture {
  explicit Fixture(SpscRingShape ring_shape, RingPosition start = {})
      : shape(ring_shape), memory(Ring::bytes_needed(shape)), ring(memory.data(), shape) {
    ring.clear(start);
    producer = ring.producer();
    consumer = ring.consumer();
  }
  std::byte* data() const { return memory.data() + sizeof(Ring::Header); }
  Ring::Header& header() const { return *reinterpret_cast<Ring::Header*>(memory.data()); }

  // All that is published, popped and given back.
  std::vector<std::string> read_all() {
    std::vector<std::string> records;
    for (auto record = consumer.front(); !record.empty(); record = consumer.front()) {
      records.emplace_back(text_of(record));
      consumer.pop();
    }
    consumer.release();
    return records;
  }

  SpscRingShape shape;
  GuardedMemory memory;
  Ring ring;
  Ring::Producer producer;
  Ring::Consumer consumer;
};
using Records = std::vector<std::string>;

TEST(SpscRing, RefusesShapesThatNoRingCanHave) {
  GuardedMemory memory(4096);
  for (const SpscRingShape shape : {SpscRingShape{.bytes = 0}, SpscRingShape{.bytes = 32}, SpscRingShape{.bytes = 96},
                                    SpscRingShape{.bytes = 64, .records = 0}}) {
    EXPECT_THROW(Ring(memory.data(), shape), std::invalid_argument) << shape.bytes << ' ' << shape.records;
  }
  EXPECT_NO_THROW(Ring(memory.data(), SpscRingShape{.bytes = 64, .records = 1}));
}

TEST(SpscRing, ZeroedMemoryIsAnEmptyRing) {
  GuardedMemory memory(Ring::bytes_needed({.bytes = 64}));
  const Ring ring(memory.data(), SpscRingShape{.bytes = 64});
  Ring::Producer producer = ring.producer();
  Ring::Consumer consumer = ring.consumer();
  EXPECT_TRUE(consumer.empty());
  EXPECT_TRUE(consumer.front().empty());
  EXPECT_TRUE(producer.push(std::string_view("hello")));
  EXPECT_EQ(text_of(consumer.front()), "hello");
}

TEST(SpscRing, ARecordIsAllThePartsOfAPush) {
  Fixture f({.bytes = 256});
  const std::uint32_t number = 0x31323334;
  EXPECT_TRUE(f.producer.push(std::span(&number, 1), std::string_view("-"), std::string_view(), std::string("text")));
  EXPECT_EQ(f.read_all(), Records{"4321-text"});
}

TEST(SpscRing, RecordsComeInOrderAndOnce) {
  Fixture f({.bytes = 256});
  EXPECT_EQ(f.consumer.records(), 0U);
  for (const char* text : {"a", "bb", "ccc"}) EXPECT_TRUE(f.producer.push(std::string_view(text)));
  EXPECT_FALSE(f.consumer.empty());
  EXPECT_EQ(f.consumer.records(), 3U);
  EXPECT_EQ(text_of(f.consumer.front()), "a");
  EXPECT_EQ(text_of(f.consumer.front()), "a") << "front() does not go on";
  EXPECT_EQ(f.consumer.records(), 3U);
  f.consumer.pop();
  EXPECT_EQ(f.consumer.records(), 2U);
  EXPECT_EQ(f.read_all(), (Records{"bb", "ccc"}));
  EXPECT_TRUE(f.consumer.empty());
  EXPECT_EQ(f.consumer.records(), 0U);
  EXPECT_EQ(f.read_all(), Records{});
}

TEST(SpscRing, EverySizeAtEveryPlaceIsOnePieceInsideTheRing) {
  const SpscRingShape shape{.bytes = 256};
  const std::uint32_t largest = Ring::max_record_bytes(shape);
  EXPECT_EQ(largest, 124U);
  Fixture f(shape);
  for (std::uint32_t start = 0; start < shape.bytes; start += Ring::kAlignment) {
    for (std::uint32_t bytes = 1; bytes <= largest; ++bytes) {
      f.ring.clear({.bytes = start});
      f.producer = f.ring.producer();
      f.consumer = f.ring.consumer();
      ASSERT_TRUE(f.producer.can_claim(1, bytes) || start != 0) << bytes;
      ASSERT_TRUE(f.producer.push(payload(start, bytes))) << bytes << " bytes at " << start;
      const auto record = f.consumer.front();
      ASSERT_EQ(text_of(record), payload(start, bytes));
      ASSERT_GE(record.data(), f.data());
      ASSERT_LE(record.data() + record.size(), f.data() + shape.bytes);
      ASSERT_EQ((record.data() - f.data()) % 8, 4);
      f.consumer.pop();
      f.consumer.release();
      ASSERT_TRUE(f.consumer.empty());
    }
  }
}

TEST(SpscRing, RefusesNoBytesAndMoreThanTheLargestRecord) {
  Fixture f({.bytes = 256});
  EXPECT_EQ(f.producer.claim(0), nullptr);
  EXPECT_FALSE(f.producer.push(std::string_view()));
  EXPECT_NE(f.producer.claim(124), nullptr);
  EXPECT_EQ(f.producer.claim(125), nullptr);
  EXPECT_FALSE(f.producer.push(std::string(125, 'x')));
  for (const std::uint32_t bytes : {256U, 1U << 31, kSkip - 4, kSkip - 1, kSkip}) {
    EXPECT_EQ(f.producer.claim(bytes), nullptr) << bytes;
  }
  EXPECT_TRUE(f.consumer.empty());
}

TEST(SpscRing, WhatDoesNotFitInFrontOfTheEndGoesToTheStart) {
  Fixture f({.bytes = 128});
  for (const char letter : {'a', 'b'}) EXPECT_TRUE(f.producer.push(std::string(52, letter)));  // 2 × 56
  EXPECT_FALSE(f.producer.push(std::string(20, 'c'))) << "16 bytes are left, and none at the start";
  f.read_all();
  EXPECT_TRUE(f.producer.push(std::string(20, 'c')));
  std::uint32_t marker;
  std::memcpy(&marker, f.data() + 112, sizeof marker);
  EXPECT_EQ(marker, kSkip);
  EXPECT_EQ(f.consumer.front().data(), f.data() + 4);
  EXPECT_EQ(f.read_all(), Records{std::string(20, 'c')});
}

TEST(SpscRing, WhatFitsExactlyInFrontOfTheEndNeedsNoMarker) {
  Fixture f({.bytes = 128}, {.bytes = 104});
  EXPECT_TRUE(f.producer.push(std::string(20, 'c')));
  EXPECT_EQ(f.consumer.front().data(), f.data() + 108);
  EXPECT_TRUE(f.producer.push(std::string(20, 'd')));
  EXPECT_EQ(f.read_all(), (Records{std::string(20, 'c'), std::string(20, 'd')}));
}

TEST(SpscRing, TheSkippedBytesCountAsUsedUntilTheirRecordIsGivenBack) {
  Fixture f({.bytes = 64}, {.bytes = 48});
  EXPECT_TRUE(f.producer.push(std::string(20, 'a')));   // 16 skipped, 24 used
  EXPECT_FALSE(f.producer.push(std::string(21, 'b')));  // 32, of 24
  EXPECT_TRUE(f.producer.push(std::string(20, 'b')));
  EXPECT_FALSE(f.producer.push(std::string_view("c")));
  EXPECT_EQ(f.read_all(), (Records{std::string(20, 'a'), std::string(20, 'b')}));
}

TEST(SpscRing, FullByBytesUntilTheConsumerGivesBack) {
  Fixture f({.bytes = 64});
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(f.producer.push(std::string_view("four")));
  EXPECT_FALSE(f.producer.push(std::string_view("four")));
  f.consumer.front();
  f.consumer.pop();
  EXPECT_FALSE(f.producer.push(std::string_view("four"))) << "popped is not given back";
  f.consumer.release();
  EXPECT_TRUE(f.producer.push(std::string_view("last")));
  EXPECT_FALSE(f.producer.push(std::string_view("four")));
  EXPECT_EQ(f.consumer.records(), 8U);
  EXPECT_EQ(f.read_all().back(), "last");
}

TEST(SpscRing, FullByRecordsUntilTheConsumerGivesBack) {
  Fixture f({.bytes = 1024, .records = 3});
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(f.producer.push(std::string_view("r")));
  EXPECT_EQ(f.producer.claim(1), nullptr);
  EXPECT_FALSE(f.producer.can_claim(1, 1));
  f.consumer.front();
  f.consumer.pop();
  f.consumer.release();
  EXPECT_TRUE(f.producer.can_claim(1, 1));
  EXPECT_FALSE(f.producer.can_claim(2, 2));
  EXPECT_TRUE(f.producer.push(std::string_view("r")));
  EXPECT_FALSE(f.producer.push(std::string_view("r")));
}

TEST(SpscRing, AClaimThatIsNotPublishedIsGivenUpByTheNext) {
  for (const std::uint32_t start : {0U, 40U}) {  // from 40 on the first claim skips, and the second does not
    Fixture f({.bytes = 64}, {.bytes = start});
    std::memset(f.producer.claim(24), 'x', 24);
    EXPECT_TRUE(f.consumer.empty());
    EXPECT_TRUE(f.consumer.front().empty());
    std::memset(f.producer.claim(12), 'y', 12);
    f.producer.publish();
    EXPECT_EQ(f.consumer.records(), 1U);
    EXPECT_EQ(f.read_all(), Records{std::string(12, 'y')}) << "from " << start;
  }
}

TEST(SpscRing, AProducerThatAttachesGoesOnWhereTheLastOneStopped) {
  Fixture f({.bytes = 64});
  EXPECT_TRUE(f.producer.push(std::string_view("one")));
  std::memset(f.producer.claim(20), 'x', 20);
  f.producer = f.ring.producer();
  EXPECT_TRUE(f.producer.push(std::string_view("two")));
  EXPECT_EQ(f.read_all(), (Records{"one", "two"}));
  f.producer = f.ring.producer();  // behind records that were given back
  for (int i = 0; i < 6; ++i) EXPECT_TRUE(f.producer.push(std::string_view("four"))) << i;
  f.producer = f.ring.producer();  // in front of a consumer that has not read
  EXPECT_TRUE(f.producer.push(std::string_view("four")));
  EXPECT_TRUE(f.producer.push(std::string_view("four")));
  EXPECT_FALSE(f.producer.push(std::string_view("four")));
  EXPECT_EQ(f.read_all().size(), 8U);
}

TEST(SpscRing, AConsumerThatAttachesReadsAgainWhatWasNotGivenBack) {
  Fixture f({.bytes = 256});
  for (const char* text : {"a", "b", "c", "d"}) EXPECT_TRUE(f.producer.push(std::string_view(text)));
  f.consumer.front();
  f.consumer.pop();
  f.consumer.release();
  f.consumer.front();
  f.consumer.pop();
  f.consumer = f.ring.consumer();
  EXPECT_EQ(f.consumer.records(), 3U);
  EXPECT_EQ(f.read_all(), (Records{"b", "c", "d"}));
  f.consumer = f.ring.consumer();
  EXPECT_TRUE(f.consumer.empty());
}

// So that one pass over a ring ends, however fast the producer is.
TEST(SpscRing, WithoutGivingBackAConsumerFindsAtMostOneRingsContent) {
  Fixture f({.bytes = 64});
  int found = 0;
  f.producer.push(std::string_view("four"));
  while (!f.consumer.front().empty()) {
    f.consumer.pop();
    ++found;
    f.producer.push(std::string_view("four"));
    ASSERT_LE(found, 8);
  }
  EXPECT_EQ(found, 8);
}

TEST(SpscRing, ARecordThatWasFoundKeepsItsSize) {
  Fixture f({.bytes = 256});
  f.producer.push(std::string_view("first"));
  f.producer.push(std::string_view("second"));
  const auto record = f.consumer.front();
  const std::uint32_t other = 100;
  std::memcpy(f.data(), &other, sizeof other);  // behind the check
  EXPECT_EQ(f.consumer.front().size(), record.size());
  f.consumer.pop();
  EXPECT_EQ(text_of(f.consumer.front()), "second");
}

TEST(SpscRing, CanClaimIsAPromise) {
  for (std::uint64_t seed = 1; seed <= 2000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    const SpscRingShape shape{.bytes = 64U << random() % 4, .records = static_cast<std::uint32_t>(1 + random() % 20)};
    const std::uint32_t largest = Ring::max_record_bytes(shape);
    Fixture f(shape, {.bytes = static_cast<std::uint32_t>(random())});
    for (std::uint64_t i = random() % 10; i > 0; --i) f.producer.push(std::string(1 + random() % largest, 'x'));
    for (std::uint64_t i = random() % 10; i > 0 && !f.consumer.front().empty(); --i) f.consumer.pop();
    f.consumer.release();

    const auto records = static_cast<std::uint32_t>(1 + random() % 8);
    std::vector<std::uint32_t> sizes(records);
    std::uint32_t bytes = 0;
    for (std::uint32_t& size : sizes)
      bytes += size = static_cast<std::uint32_t>(1 + random() % (largest / (1 + random() % records)));
    if (!f.producer.can_claim(records, bytes)) continue;
    for (const std::uint32_t size : sizes) ASSERT_TRUE(f.producer.push(std::string(size, 'y')));
  }
}

TEST(SpscRing, CanClaimHoldsForAnEmptyRingOfTwiceTheNeed) {
  // 3 records of 84 bytes: 3 × (84 + 11) = 285, aligned 288, and again as much where the first does not fit.
  for (std::uint32_t start = 0; start < 1024; start += 8) {
    Fixture f({.bytes = 1024}, {.bytes = start});
    EXPECT_TRUE(f.producer.can_claim(3, 3 * 84)) << start;
    EXPECT_FALSE(f.producer.can_claim(1, 1024)) << start;
    EXPECT_FALSE(f.producer.can_claim(kSkip, kSkip)) << start;
  }
}

// Every operation in any order against a deque, with the exact answer to whether there is room. From starts just before
// the counts wrap.
class SpscRingModel : public testing::TestWithParam<RingPosition> {};

TEST_P(SpscRingModel, DoesWhatADequeDoes) {
  for (std::uint64_t seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    const SpscRingShape shape{.bytes = 64U << random() % 4,
                              .records = random() % 2 == 0 ? kSkip : static_cast<std::uint32_t>(1 + random() % 12)};
    const std::uint32_t largest = Ring::max_record_bytes(shape);
    Fixture f(shape, GetParam());

    struct Entry {
      std::string text;
      std::uint64_t start, end;
    };
    std::deque<Entry> entries;  // not given back
    std::size_t popped = 0;     // of them
    const std::uint64_t start = GetParam().bytes & ~7U;
    std::uint64_t tail = start, at = start, head = start, pushed = 0;
    const auto room_for = [&](std::size_t bytes) -> std::optional<Entry> {
      const std::uint64_t needed = align_up(4 + bytes, 8);
      const std::uint64_t in_front = shape.bytes - tail % shape.bytes;
      const std::uint64_t from = needed <= in_front ? tail : tail + in_front;
      if (bytes == 0 || bytes > largest || entries.size() >= shape.records) return std::nullopt;
      if (from + needed - head > shape.bytes) return std::nullopt;
      return Entry{payload(pushed, bytes), from, from + needed};
    };

    for (int step = 0; step < 400; ++step) {
      switch (random() % 12) {
        case 0:
        case 1:
        case 2:
        case 3: {
          const std::size_t bytes = random() % (largest + 2);
          const auto entry = room_for(bytes);
          ASSERT_EQ(f.producer.push(payload(pushed, bytes)), entry.has_value());
          if (!entry) break;
          entries.push_back(*entry);
          tail = entry->end;
          ++pushed;
          break;
        }
        case 4: {
          const std::size_t bytes = random() % (largest + 2);
          std::byte* claimed = f.producer.claim(static_cast<std::uint32_t>(bytes));
          ASSERT_EQ(claimed != nullptr, room_for(bytes).has_value());
          if (claimed != nullptr) std::memset(claimed, '?', bytes);
          break;
        }
        case 5:
        case 6:
        case 7:
        case 8: {
          const auto record = f.consumer.front();
          ASSERT_EQ(record.empty(), popped == entries.size());
          if (record.empty()) break;
          ASSERT_EQ(text_of(record), entries[popped].text);
          at = entries[popped].start;
          if (random() % 4 == 0) break;
          f.consumer.pop();
          at = entries[popped++].end;
          break;
        }
        case 9:
          f.consumer.release();
          head = at;
          entries.erase(entries.begin(), entries.begin() + static_cast<std::ptrdiff_t>(popped));
          popped = 0;
          break;
        case 10:
          f.producer = f.ring.producer();
          break;
        case 11:
          f.consumer = f.ring.consumer();
          at = head;
          popped = 0;
          break;
      }
      ASSERT_EQ(f.consumer.records(), entries.size() - popped);
      ASSERT_EQ(f.consumer.empty(), popped == entries.size());
      ASSERT_FALSE(f.consumer.corrupt());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(FromStarts, SpscRingModel,
                         testing::Values(RingPosition{}, RingPosition{kSkip - 7, kSkip}, RingPosition{kSkip - 300, 0},
                                         RingPosition{kSkip - 2047, kSkip - 5}, RingPosition{1U << 31, 1U << 31},
                                         RingPosition{1234567, kSkip - 1}),
                         [](const auto& test) {
                           return "bytes" + std::to_string(test.param.bytes) + "records" +
                                  std::to_string(test.param.records);
                         });

// --- A broken peer ---

template <class Words>
void write_words(std::byte* at, const Words& words) {
  std::memcpy(at, words.data(), words.size() * sizeof(std::uint32_t));
}

struct BrokenTail {
  const char* name;
  RingPosition tail;                    // the consumer stands at 64
  std::array<std::uint32_t, 2> at64{};  // the words that lie there
  std::uint32_t at0 = 0;                // and at the ring's start
  std::uint32_t at120 = 0;
  std::uint32_t readable = 0;  // the records in front of it
};

TEST(SpscRingWithABrokenProducer, WhatCannotBeIsCorruptAndNothingIsFound) {
  const std::array cases{
      BrokenTail{.name = "more than a ring ahead", .tail{64 + 136, 1}, .at64{4}},
      BrokenTail{.name = "far ahead", .tail{1U << 31, 1}, .at64{4}},
      BrokenTail{.name = "behind", .tail{56, 1}, .at64{4}},
      BrokenTail{.name = "misaligned", .tail{64 + 12, 1}, .at64{4}},
      BrokenTail{.name = "no bytes", .tail{64 + 8, 1}, .at64{0}},
      BrokenTail{.name = "larger than the largest", .tail{64 + 72, 1}, .at64{61}},
      BrokenTail{.name = "far larger", .tail{64 + 128, 1}, .at64{kSkip - 1}},
      BrokenTail{.name = "a size that wraps", .tail{64 + 128, 1}, .at64{kSkip - 3}},
      BrokenTail{.name = "ends behind what is published", .tail{64 + 8, 1}, .at64{5}},
      BrokenTail{.name = "ends behind the ring", .tail{120 + 40, 2}, .at64{52}, .at120 = 12, .readable = 1},
      BrokenTail{.name = "a marker and no record", .tail{128, 1}, .at64{kSkip}},
      BrokenTail{.name = "a marker that reaches beyond", .tail{64 + 8, 1}, .at64{kSkip}},
      BrokenTail{.name = "two markers", .tail{128 + 64, 1}, .at64{kSkip}, .at0 = kSkip},
      BrokenTail{.name = "a marker, then more than is published", .tail{128 + 8, 1}, .at64{kSkip}, .at0 = 5},
  };
  for (const BrokenTail& broken : cases) {
    SCOPED_TRACE(broken.name);
    Fixture f({.bytes = 128}, {.bytes = 64});
    write_words(f.data() + 64, broken.at64);
    write_words(f.data(), std::array{broken.at0});
    if (broken.at120 != 0) write_words(f.data() + 120, std::array{broken.at120});
    f.header().tail.store(std::bit_cast<std::uint64_t>(broken.tail), std::memory_order_release);
    EXPECT_EQ(f.read_all().size(), broken.readable);
    EXPECT_TRUE(f.consumer.corrupt());
    // And for good, whatever is written later.
    const auto honest = std::bit_cast<std::uint64_t>(RingPosition{64 + 128, 2});
    f.header().tail.store(honest, std::memory_order_release);
    write_words(f.data(), std::array{12U, 0U});
    write_words(f.data() + 64, std::array{12U, 0U});
    EXPECT_TRUE(f.consumer.front().empty());
    EXPECT_TRUE(f.consumer.empty());
    EXPECT_EQ(f.consumer.records(), 0U);
  }
}

TEST(SpscRingWithABrokenProducer, ARandomOneLeadsNowhere) {
  std::uint64_t found = 0;
  for (std::uint64_t seed = 1; seed <= 5000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    const SpscRingShape shape{.bytes = 64U << random() % 3};
    Fixture f(shape, {.bytes = static_cast<std::uint32_t>(random())});
    for (int round = 0; round < 20; ++round) {
      for (std::uint64_t i = random() % 3; i > 0; --i) f.producer.push(std::string(1 + random() % 28, 'x'));
      auto tail = std::bit_cast<RingPosition>(f.header().tail.load(std::memory_order_relaxed));
      switch (random() % 8) {
        case 0:
          tail.bytes = static_cast<std::uint32_t>(random());
          break;
        case 1:
          tail.bytes += static_cast<std::uint32_t>(random() % 64);
          break;
        case 2:
          tail.records = static_cast<std::uint32_t>(random());
          break;
        case 3:
          tail.bytes -= static_cast<std::uint32_t>(random() % 64);
          break;
      }
      f.header().tail.store(std::bit_cast<std::uint64_t>(tail), std::memory_order_release);
      for (std::uint64_t i = random() % 3; i > 0; --i) {
        const auto size = static_cast<std::uint32_t>(random() % 3 == 0 ? kSkip - random() % 9 : random() % 70);
        std::memcpy(f.data() + random() % (shape.bytes / 4) * 4, &size, sizeof size);
      }
      if (random() % 8 == 0) f.consumer = f.ring.consumer();
      const bool was_corrupt = f.consumer.corrupt();
      std::uint32_t popped = 0;
      for (auto record = f.consumer.front(); !record.empty(); record = f.consumer.front()) {
        ASSERT_FALSE(was_corrupt);
        ASSERT_GE(record.data(), f.data() + 4);
        ASSERT_LE(record.data() + record.size(), f.data() + shape.bytes);
        ASSERT_LE(record.size(), Ring::max_record_bytes(shape));
        f.consumer.pop();
        ASSERT_LE(++popped, shape.bytes / 8);
      }
      found += popped;
      ASSERT_LE(f.consumer.records(), shape.records);
      if (random() % 2 == 0) f.consumer.release();
    }
  }
  EXPECT_GT(found, 10'000U) << "the damage is such that hardly a record was looked at";
}

TEST(SpscRingWithABrokenConsumer, AProducerStaysInsideTheRing) {
  std::uint64_t claims = 0;
  for (std::uint64_t seed = 1; seed <= 5000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    const SpscRingShape shape{.bytes = 64U << random() % 3, .records = static_cast<std::uint32_t>(1 + random() % 64)};
    Fixture f(shape, {.bytes = static_cast<std::uint32_t>(random())});
    for (int round = 0; round < 40; ++round) {
      auto head = std::bit_cast<RingPosition>(f.header().tail.load(std::memory_order_relaxed));
      if (random() % 3 == 0) head.bytes -= static_cast<std::uint32_t>(random() % (2 * shape.bytes));
      if (random() % 8 == 0) head.bytes = static_cast<std::uint32_t>(random());
      if (random() % 8 == 0) head.records = static_cast<std::uint32_t>(random());
      f.header().head.store(std::bit_cast<std::uint64_t>(head), std::memory_order_release);
      if (random() % 8 == 0) f.producer = f.ring.producer();
      f.producer.can_claim(static_cast<std::uint32_t>(random() % 4), static_cast<std::uint32_t>(random() % 100));
      const auto bytes = static_cast<std::uint32_t>(1 + random() % Ring::max_record_bytes(shape));
      std::byte* claimed = f.producer.claim(bytes);
      if (claimed == nullptr) continue;
      ++claims;
      ASSERT_GE(claimed, f.data() + 4);
      ASSERT_LE(claimed + bytes, f.data() + shape.bytes);
      std::memset(claimed, 'x', bytes);
      f.producer.publish();
    }
  }
  EXPECT_GT(claims, 10'000U);
}

TEST(SpscRingWithABrokenPeer, ASideThatAttachesAtMisalignedCountsStaysInsideTheRing) {
  for (std::uint32_t off = 0; off < 64; ++off) {
    Fixture f({.bytes = 64});
    f.header().tail.store(std::bit_cast<std::uint64_t>(RingPosition{off, 0}), std::memory_order_release);
    f.header().head.store(std::bit_cast<std::uint64_t>(RingPosition{off, 0}), std::memory_order_release);
    f.producer = f.ring.producer();
    f.consumer = f.ring.consumer();
    for (int i = 0; i < 8; ++i) f.producer.push(std::string(20, 'x'));
    EXPECT_EQ(f.read_all(), Records(2, std::string(20, 'x'))) << off;
  }
}

// --- Two threads ---

constexpr std::array<std::uint32_t, 6> kSizes{12, 20, 28, 9, 24, 1};  // of records in a ring of 64: they skip and fill

// A producer of `records` records and a consumer that gives back after each `batch`.
test::Scenario send_through_a_small_ring(std::uint32_t records, std::uint32_t batch, SpscRingShape shape,
                                         RingPosition start) {
  using Interleaved = SpscRing<InterleavedAtomics>;
  auto memory = std::make_shared<GuardedMemory>(Interleaved::bytes_needed(shape));
  return [=](test::Interleaver& threads) {
    Interleaved ring(memory->data(), shape);
    ring.clear(start);
    const auto& head = reinterpret_cast<Interleaved::Header*>(memory->data())->head;
    threads.add_thread([&, side = std::make_shared<Interleaved::Producer>(ring.producer())] {
      for (std::uint32_t i = 0; i < records; ++i) {
        const std::string text = payload(i, kSizes[i % kSizes.size()]);
        while (true) {
          const std::uint64_t before = head.load(std::memory_order_relaxed);
          if (side->push(text)) break;
          test::Interleaver::wait_until([&] { return head.load(std::memory_order_relaxed) != before; });
        }
      }
    });
    threads.add_thread([&, side = std::make_shared<Interleaved::Consumer>(ring.consumer())] {
      for (std::uint32_t next = 0; next < records;) {
        const auto record = side->front();
        if (record.empty()) {
          side->release();
          test::Interleaver::wait_until([&] { return !side->empty(); });
          continue;
        }
        ASSERT_EQ(text_of(record), payload(next, kSizes[next % kSizes.size()])) << next;
        side->pop();
        if (++next % batch == 0) side->release();
      }
      EXPECT_TRUE(side->empty());
      EXPECT_FALSE(side->corrupt());
    });
    threads.run();
  };
}

TEST(SpscRingInterleaved, EveryScheduleOfUpToThreePreemptions) {
  const std::size_t schedules = test::explore_all(3, send_through_a_small_ring(5, 1, {.bytes = 64}, {.bytes = 40}));
  EXPECT_GT(schedules, 2'000U);
}

TEST(SpscRingInterleaved, EveryScheduleOfUpToTwoPreemptionsWhereTheCountsWrap) {
  const RingPosition start{.bytes = kSkip - 39, .records = kSkip - 1};
  const SpscRingShape shape{.bytes = 64, .records = 2};
  EXPECT_GT(test::explore_all(2, send_through_a_small_ring(8, 2, shape, start)), 500U);
}

TEST(SpscRingInterleaved, RandomSchedules) {
  test::explore_randomly(test::soak(3'000), send_through_a_small_ring(20, 3, {.bytes = 64}, {.bytes = 8}));
}

// A producer and a consumer that go as fast as they can; each record's bytes are checked.
void run_two_threads(const Ring& producing, const Ring& consuming, std::uint64_t records) {
  std::thread producer([&] {
    Ring::Producer side = producing.producer();
    std::mt19937 random(1);
    for (std::uint64_t i = 0; i < records; ++i) {
      const auto bytes = static_cast<std::uint32_t>(8 + random() % 100);
      std::byte* out = side.claim(bytes);
      for (; out == nullptr; out = side.claim(bytes)) std::this_thread::yield();
      std::memcpy(out, &i, sizeof i);
      std::memset(out + 8, static_cast<int>(i & 0xFF), bytes - 8);
      side.publish();
    }
  });
  Ring::Consumer side = consuming.consumer();
  std::mt19937 random(1);
  for (std::uint64_t next = 0; next < records;) {
    const auto record = side.front();
    if (record.empty()) {
      ASSERT_FALSE(side.corrupt());
      side.release();
      std::this_thread::yield();
      continue;
    }
    std::uint64_t number;
    std::memcpy(&number, record.data(), sizeof number);
    EXPECT_EQ(number, next);
    EXPECT_EQ(record.size(), 8 + random() % 100);
    const bool whole = std::ranges::all_of(record.subspan(8), [&](std::byte b) { return b == std::byte(next & 0xFF); });
    EXPECT_TRUE(whole) << next;
    if (testing::Test::HasFailure()) std::abort();  // the producer would wait for ever
    ++next;
    side.pop();
    if (next % 5 == 0) side.release();
  }
  side.release();
  producer.join();
  EXPECT_TRUE(side.empty());
}

TEST(SpscRingStress, ExactlyOnceAndInOrder) {
  const SpscRingShape shape{.bytes = 1024, .records = 12};
  GuardedMemory memory(Ring::bytes_needed(shape));
  const Ring ring(memory.data(), shape);
  Ring(ring).clear({.bytes = kSkip - 100'000, .records = kSkip - 1'000});
  run_two_threads(ring, ring, test::soak(200'000));
}

TEST(SpscRingStress, OverMemoryThatIsMappedAtTwoAddresses) {
  const SpscRingShape shape{.bytes = 1024};
  const test::SharedMemory memory(Ring::bytes_needed(shape));
  run_two_threads(Ring(memory.data(), shape), Ring(memory.again(), shape), test::soak(200'000));
}

}  // namespace
}  // namespace rts
