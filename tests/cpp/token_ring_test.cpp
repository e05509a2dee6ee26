#include "rts/token_ring.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "test_memory.hpp"

namespace rts {
namespace {

using test::GuardedMemory;

struct Fixture {
  explicit Fixture(SpscRingShape shape, RingPosition start = {})
      : memory(SpscRing<>::bytes_needed(shape)), ring(memory.data(), shape), writer((ring.clear(start), ring)) {
    reader = ring.consumer();
  }
  // The next record, which stays readable; it is popped already.
  TokenRecord next() {
    const TokenRecord record(reader.front());
    reader.pop();
    return record;
  }

  GuardedMemory memory;
  SpscRing<> ring;
  TokenWriter writer;
  SpscRing<>::Consumer reader;
};

TEST(TokenRing, ATokenComesOutAsItWentIn) {
  Fixture f({.bytes = 4096});
  TokenHeader header;
  header.index = 7;
  header.token_id = 42;
  header.logprob = -1.5F;
  header.flags = TokenHeader::kSpecial;
  header.text_bytes = 999;  // set by the writer
  header.extension_bytes = 999;
  EXPECT_TRUE(f.writer.write_token(header, "h\u00e9llo"));
  EXPECT_TRUE(f.writer.write_token({.index = 8, .logprob = std::nanf("")}, ""));

  const TokenRecord first = f.next();
  ASSERT_TRUE(first.valid);
  EXPECT_EQ(first.header.index, 7U);
  EXPECT_EQ(first.header.token_id, 42);
  EXPECT_EQ(first.header.logprob, -1.5F);
  EXPECT_EQ(first.header.flags, TokenHeader::kSpecial);
  EXPECT_EQ(first.text, "h\u00e9llo");
  EXPECT_TRUE(first.extension.empty());
  EXPECT_FALSE(first.is_last());
  const TokenRecord second = f.next();
  ASSERT_TRUE(second.valid);
  EXPECT_EQ(second.header.index, 8U);
  EXPECT_TRUE(std::isnan(second.header.logprob));
  EXPECT_EQ(second.text, "");
  EXPECT_TRUE(f.reader.front().empty());
}

TEST(TokenRing, TheLastRecordSaysHowTheStreamEnded) {
  Fixture f({.bytes = 4096});
  EndExtension end;
  end.prompt_tokens = 5;
  end.cached_tokens = 4;
  end.queue_ns = 1;
  end.prefill_ns = 2;
  end.decode_ns = 3;
  end.stalled_ns = std::numeric_limits<std::int64_t>::max();
  TokenHeader header;
  header.index = 12;
  header.finish = FinishReason::kError;
  header.error = StreamError::kInvalidLogits;
  EXPECT_TRUE(f.writer.write_last(header, end));
  const TokenRecord record = f.next();
  ASSERT_TRUE(record.valid);
  EXPECT_TRUE(record.is_last());
  EXPECT_EQ(record.header.index, 12U);
  EXPECT_EQ(record.header.finish, FinishReason::kError);
  EXPECT_EQ(record.header.error, StreamError::kInvalidLogits);
  EXPECT_EQ(record.text, "");
  const EndExtension read = record.end();
  EXPECT_EQ(std::memcmp(&read, &end, sizeof end), 0);
}

TEST(TokenRing, AnEndWithoutItsExtensionIsAllZero) {
  TokenHeader header;
  header.flags = TokenHeader::kEnd;
  header.extension_bytes = sizeof(EndExtension) - 1;
  std::vector<std::byte> bytes(sizeof header + header.extension_bytes, std::byte{0xFF});
  std::memcpy(bytes.data(), &header, sizeof header);
  const TokenRecord record(bytes);
  ASSERT_TRUE(record.valid);
  EXPECT_TRUE(record.is_last());
  EXPECT_EQ(record.end().decode_ns, 0);
  EXPECT_EQ(record.end().prompt_tokens, 0U);
}

TEST(TokenRing, ARecordWhoseSizesDoNotFitItIsNotValid) {
  TokenHeader header;
  header.text_bytes = 5;
  header.extension_bytes = 3;
  std::vector<std::byte> bytes(sizeof header + 8);
  std::memcpy(bytes.data(), &header, sizeof header);
  for (std::size_t size = 0; size <= bytes.size(); ++size) {
    const std::vector<std::byte> cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
    const TokenRecord record{std::span(cut)};
    EXPECT_EQ(record.valid, size == bytes.size()) << size;
    if (record.valid) continue;
    EXPECT_TRUE(record.text.empty() && record.extension.empty()) << size;
  }
}

TEST(TokenRing, ARecordOfRandomBytesStaysInsideThem) {
  for (std::uint64_t seed = 1; seed <= 20'000; ++seed) {
    std::mt19937_64 random(seed);
    std::vector<std::byte> bytes(random() % 64);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() % 4 == 0 ? random() : random() % 8);
    const TokenRecord record{std::span<const std::byte>(bytes)};
    record.is_last();
    record.end();
    if (!record.valid) continue;
    const auto* const text = reinterpret_cast<const std::byte*>(record.text.data());
    ASSERT_GE(text, bytes.data()) << "seed " << seed;
    ASSERT_LE(text + record.text.size(), bytes.data() + bytes.size()) << "seed " << seed;
    ASSERT_EQ(record.extension.data(), text + record.text.size()) << "seed " << seed;
    ASSERT_LE(record.extension.data() + record.extension.size(), bytes.data() + bytes.size()) << "seed " << seed;
  }
}

TEST(TokenRing, AStreamIsAheadByItsTokensAndThenByThoseInFlightAndItsEnd) {
  constexpr std::uint32_t kTokens = 5;
  Fixture f({.bytes = 1 << 14, .records = kTokens + TokenWriter::kReservedRecords});
  for (std::uint32_t index = 0; index < kTokens; ++index) {
    EXPECT_TRUE(f.writer.has_room());
    EXPECT_TRUE(f.writer.write_token({.index = index}, "x"));
  }
  EXPECT_TRUE(f.writer.has_room()) << "at its bound exactly";
  EXPECT_TRUE(f.writer.write_token({.index = kTokens}, "x"));
  EXPECT_FALSE(f.writer.has_room());
  EXPECT_TRUE(f.writer.write_token({.index = kTokens + 1}, "x"));
  EXPECT_TRUE(f.writer.write_last({.index = kTokens + 2}, {}));
  EXPECT_FALSE(f.writer.write_token({.index = kTokens + 2}, "x"));
  EXPECT_FALSE(f.writer.write_last({.index = kTokens + 2}, {}));

  for (int i = 0; i < 3; ++i) f.next();
  EXPECT_FALSE(f.writer.has_room()) << "popped is not given back";
  f.reader.release();
  EXPECT_TRUE(f.writer.has_room());
}

// Whatever the texts before: where has_room() said yes, the tokens in flight and the last record find their place.
TEST(TokenRing, RoomIsAPromiseForTheTokensInFlightAndTheEnd) {
  constexpr std::size_t kLongest = kMaxTokenRecordBytes - sizeof(TokenHeader);
  int refused = 0;
  for (std::uint64_t seed = 1; seed <= 2'000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    Fixture f({.bytes = 1 << 14, .records = static_cast<std::uint32_t>(4 + random() % 100)},
              {.bytes = static_cast<std::uint32_t>(random()), .records = static_cast<std::uint32_t>(random())});
    const std::size_t longest = 1 + random() % kLongest;
    const std::uint32_t top_logprobs = seed % 3 == 0 ? 0 : static_cast<std::uint32_t>(seed % (kMaxTopLogprobs + 1));
    const std::string most(max_top_logprobs_bytes(top_logprobs), 't');
    std::uint32_t written = 0, read = 0;
    while (written < 200) {
      if (!f.writer.has_room(top_logprobs)) {
        ++refused;
        if (random() % 4 == 0) break;
        while (random() % 8 != 0 && !f.reader.front().empty()) {
          ASSERT_EQ(f.next().header.index, read++);
        }
        f.reader.release();
        continue;
      }
      if (random() % 16 != 0) {
        const std::string_view top = std::string_view(most).substr(random() % (most.size() + 1));
        ASSERT_TRUE(f.writer.write_token({.index = written++}, std::string(random() % longest, 'x'), top));
        continue;
      }
      // Here it ends, with the tokens that are in flight.
      for (std::uint32_t i = 0; i < kTokensInFlight; ++i) {
        ASSERT_TRUE(f.writer.write_token({.index = written++}, std::string(kLongest, 'y'), most));
      }
      break;
    }
    ASSERT_TRUE(f.writer.write_last({.index = written}, {}));
    TokenRecord record = f.next();
    for (; !record.is_last(); record = f.next()) {
      ASSERT_TRUE(record.valid);
      ASSERT_EQ(record.header.index, read++);
    }
    ASSERT_EQ(record.header.index, written);
    ASSERT_EQ(read, written);
  }
  EXPECT_GT(refused, 500);
}

TEST(TokenRing, AnEmptyRingOfTheSmallestSizeHasRoomAnywhere) {
  for (std::uint32_t start = 0; start < kMinRingBytes; start += 8) {
    Fixture f({.bytes = kMinRingBytes}, {.bytes = start});
    ASSERT_TRUE(f.writer.has_room(kMaxTopLogprobs)) << start;
  }
}

}  // namespace
}  // namespace rts
