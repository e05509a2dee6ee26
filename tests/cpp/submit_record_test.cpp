#include "rts/submit_record.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace rts {
namespace {

const std::vector<std::int32_t> kPrompt{7, 8, 9};
const std::vector<std::string> kStops{"a", "four", "\xC3\xA9nd of it"};

const std::string kPayload("any\0bytes", 9);
const std::vector<TokenBias> kBiases{{3, -100.0F}, {1, 0.5F}};
const std::vector<std::int32_t> kStopTokenIds{2, 0, 7};

std::vector<std::byte> written(const SubmitHeader& header = {}) {
  const SubmitContent content{.prompt = kPrompt,
                              .stops = kStops,
                              .request_id = "req-1",
                              .payload = kPayload,
                              .logit_bias = kBiases,
                              .stop_token_ids = kStopTokenIds};
  std::vector<std::byte> bytes(submit_record_bytes(content));
  write_submit_record(header, content, bytes.data());
  return bytes;
}

void set_header(std::vector<std::byte>& bytes, const SubmitHeader& header) {
  std::memcpy(bytes.data(), &header, sizeof header);
}

TEST(SubmitRecord, ReadsBackWhatWasWritten) {
  SubmitHeader header;
  header.stream_id = 12345678901;
  header.slot = 4;
  header.sampling.seed = 99;
  header.priority = Priority::kHigh;
  const std::vector<std::byte> bytes = written(header);
  const SubmitRecord record(bytes);
  ASSERT_TRUE(record.valid);
  EXPECT_EQ(record.header.stream_id, 12345678901U);
  EXPECT_EQ(record.header.slot, 4U);
  EXPECT_EQ(record.header.sampling.seed, 99U);
  EXPECT_EQ(record.header.priority, Priority::kHigh);
  EXPECT_EQ(record.header.prompt_tokens, 3U);
  ASSERT_EQ(record.ids.size(), 3 * sizeof(std::int32_t));
  EXPECT_EQ(std::memcmp(record.ids.data(), kPrompt.data(), record.ids.size()), 0);
  EXPECT_EQ(record.stops, kStops);
  EXPECT_EQ(record.request_id, "req-1");
  EXPECT_EQ(record.payload, kPayload);
  EXPECT_EQ(record.logit_bias, kBiases);
  EXPECT_EQ(record.stop_token_ids, kStopTokenIds);
}

TEST(SubmitRecord, ListsOfValuesMustBeWhole) {
  for (const std::uint16_t type : {TailHeader::kLogitBias, TailHeader::kStopTokenIds}) {
    for (std::uint32_t size = 0; size <= 16; ++size) {
      SubmitHeader header;
      header.tail_bytes = static_cast<std::uint32_t>(sizeof(TailHeader) + (size + 3) / 4 * 4);
      std::vector<std::byte> bytes(sizeof header + header.tail_bytes);
      set_header(bytes, header);
      const TailHeader entry{type, 0, size};
      std::memcpy(bytes.data() + sizeof header, &entry, sizeof entry);
      const SubmitRecord record(bytes);
      const std::size_t each = type == TailHeader::kLogitBias ? sizeof(TokenBias) : sizeof(std::int32_t);
      ASSERT_EQ(record.valid, size % each == 0) << type << " of " << size;
      EXPECT_EQ(record.logit_bias.size() + record.stop_token_ids.size(), record.valid ? size / each : 0) << size;
    }
  }
}

TEST(SubmitRecord, APayloadMayBeLong) {
  const std::string payload(200'000, 'x');
  const SubmitContent content{.prompt = {}, .stops = {}, .request_id = {}, .payload = payload};
  std::vector<std::byte> bytes(submit_record_bytes(content));
  write_submit_record({}, content, bytes.data());
  const SubmitRecord record(bytes);
  ASSERT_TRUE(record.valid);
  EXPECT_EQ(record.payload, payload);
  EXPECT_TRUE(record.request_id.empty());
}

TEST(SubmitRecord, WithoutItsWholeHeaderItIsNothing) {
  const std::vector<std::byte> bytes = written();
  const SubmitRecord record{std::span(bytes).first(sizeof(SubmitHeader) - 1)};
  EXPECT_FALSE(record.has_header);
  EXPECT_FALSE(record.valid);
}

TEST(SubmitRecord, CutAnywhereItIsNotValid) {
  const std::vector<std::byte> bytes = written();
  for (std::size_t size = sizeof(SubmitHeader); size < bytes.size(); ++size) {
    const SubmitRecord record{std::span(bytes).first(size)};
    EXPECT_TRUE(record.has_header);
    EXPECT_FALSE(record.valid) << size;
  }
}

TEST(SubmitRecord, SizesThatLieAreNotBelieved) {
  const std::vector<std::byte> honest = written();
  const SubmitHeader header = SubmitRecord(honest).header;
  const auto valid_with = [&](auto change) {
    std::vector<std::byte> bytes = honest;
    SubmitHeader changed = header;
    change(changed);
    set_header(bytes, changed);
    return SubmitRecord(bytes).valid;
  };
  EXPECT_TRUE(valid_with([](SubmitHeader&) {}));
  EXPECT_FALSE(valid_with([](SubmitHeader& h) { h.prompt_tokens = ~0U; }));
  EXPECT_FALSE(valid_with([](SubmitHeader& h) { h.generated_tokens = ~0U; }));
  EXPECT_FALSE(valid_with([](SubmitHeader& h) { h.prompt_tokens = h.generated_tokens = ~0U; }));
  EXPECT_FALSE(valid_with([](SubmitHeader& h) { h.tail_bytes += 4; }));
  EXPECT_FALSE(valid_with([](SubmitHeader& h) { h.tail_bytes -= 4; })) << "the last entry is cut";
}

TEST(SubmitRecord, UnknownTailEntriesAreSkipped) {
  std::vector<std::byte> bytes = written();
  const TailHeader unknown{77, 0, 1};
  const std::size_t first = sizeof(SubmitHeader) + kPrompt.size() * sizeof(std::int32_t);
  std::memcpy(bytes.data() + first, &unknown, sizeof unknown);
  const SubmitRecord record(bytes);
  ASSERT_TRUE(record.valid);
  EXPECT_EQ(record.stops, std::vector(kStops.begin() + 1, kStops.end()));
}

// Under AddressSanitizer: nothing outside the bytes is read, whatever they are.
TEST(SubmitRecord, ReadsNothingOutsideBrokenBytes) {
  std::mt19937 random(1);
  for (int round = 0; round < 20'000; ++round) {
    std::vector<std::byte> bytes = written();
    bytes.resize(random() % (bytes.size() + 1));
    bytes.shrink_to_fit();
    for (int change = 0; change < 4 && !bytes.empty(); ++change) {
      bytes[random() % bytes.size()] = static_cast<std::byte>(random());
    }
    const SubmitRecord record(bytes);
    EXPECT_LE(record.ids.size(), bytes.size());
    EXPECT_LE(record.payload.size(), bytes.size());
  }
}

}  // namespace
}  // namespace rts
