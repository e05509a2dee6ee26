#include "rts/sse_writer.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "rts/top_logprobs.hpp"

namespace rts {
namespace {

using namespace std::string_literals;

constexpr float kNoLogprob = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::string token_event(std::uint32_t index, std::int32_t token_id, std::string_view text, float logprob = kNoLogprob) {
  FrameBuffer out;
  append_token_event(out, index, token_id, text, logprob);
  return std::string(out.view());
}

std::string json_string(std::string_view text) {
  FrameBuffer out;
  append_json_string(out, text);
  return std::string(out.view());
}

const EndOfStream kEnd{.request_id = "req-1",
                       .model = "smol\"m",
                       .version = "1.0.0",
                       .finish = FinishReason::kStop,
                       .completion_tokens = 7,
                       .usage = {.prompt_tokens = 5,
                                 .cached_tokens = 4,
                                 .queue_ns = 1'234'567,
                                 .prefill_ns = 999'500,
                                 .decode_ns = 60'000'000'499,
                                 .stalled_ns = 0}};
constexpr std::string_view kOutcome =
    R"("finish_reason":"stop",)"
    R"("usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12,"cached_tokens":4},)"
    R"("timings":{"queue_ms":1.235,"prefill_ms":1.000,"decode_ms":60000.000,"stalled_ms":0.000})";

TEST(FrameBuffer, KeepsBytesWhileItGrows) {
  FrameBuffer out(1);
  std::string expected;
  for (int i = 0; i < 1000; ++i) {
    const std::string piece(static_cast<std::size_t>(i % 7), static_cast<char>('a' + i % 26));
    out.append(piece);
    expected += piece;
  }
  EXPECT_EQ(out.view(), expected);
}

TEST(FrameBuffer, AllocatesNoMoreOnceWarm) {
  FrameBuffer out(1);
  const auto burst = [&] {
    out.clear();
    out.begin_chunk();
    for (std::uint32_t i = 0; i < 50; ++i) append_token_event(out, i, 1, "text\n", -0.5F);
    out.end_chunk();
    return out.data();
  };
  const char* const warm = burst();
  EXPECT_EQ(burst(), warm);
  EXPECT_EQ(burst(), warm);
}

TEST(FrameBuffer, AChunkIsLedByItsSize) {
  FrameBuffer out;
  for (const std::size_t bytes : {1, 9, 10, 15, 16, 255, 256, 4095, 4096, 70000}) {
    const std::string content(bytes, 'x');
    char size[32];
    std::snprintf(size, sizeof size, "%zx\r\n", bytes);
    out.clear();
    out.begin_chunk();
    out.append(content);
    out.end_chunk();
    EXPECT_EQ(out.view(), size + content + "\r\n");
  }
}

TEST(FrameBuffer, HeadersChunksAndTheLastOneLieSideBySide) {
  FrameBuffer out;
  out.append("HTTP/1.1 200 OK\r\n\r\n");
  out.begin_chunk();
  out.append("one");
  out.append(" two");
  out.end_chunk();
  out.begin_chunk();
  out.append("three");
  out.end_chunk();
  out.last_chunk();
  EXPECT_EQ(out.view(), "HTTP/1.1 200 OK\r\n\r\n7\r\none two\r\n5\r\nthree\r\n0\r\n\r\n");
  out.clear();
  EXPECT_TRUE(out.empty());
  out.append("next");
  EXPECT_EQ(out.view(), "next");
}

TEST(FrameBuffer, AnEmptyChunkIsNoChunk) {
  FrameBuffer out;
  out.append("a");
  out.begin_chunk();
  out.end_chunk();
  EXPECT_EQ(out.view(), "a");
}

TEST(TokenEvent, HasIdAndData) {
  EXPECT_EQ(token_event(12, 101, " hello"), "id: 12\ndata: {\"token\":\" hello\",\"token_id\":101,\"index\":12}\n\n");
  EXPECT_EQ(token_event(0, 0, ""), "id: 0\ndata: {\"token\":\"\",\"token_id\":0,\"index\":0}\n\n");
  EXPECT_EQ(token_event(4294967295, -2147483648, "x"),
            "id: 4294967295\ndata: {\"token\":\"x\",\"token_id\":-2147483648,\"index\":4294967295}\n\n");
}

TEST(TokenEvent, HasALogprobWhereAskedFor) {
  EXPECT_EQ(token_event(1, 2, "x", -0.1234F),
            "id: 1\ndata: {\"token\":\"x\",\"token_id\":2,\"index\":1,\"logprob\":-0.1234}\n\n");
  EXPECT_EQ(token_event(1, 2, "x", 0.0F),
            "id: 1\ndata: {\"token\":\"x\",\"token_id\":2,\"index\":1,\"logprob\":0}\n\n");
  EXPECT_EQ(token_event(1, 2, "x", -kInfinity),
            "id: 1\ndata: {\"token\":\"x\",\"token_id\":2,\"index\":1,\"logprob\":null}\n\n");
}

std::string two_top_logprobs() {
  std::string extension;
  append_top_logprob(extension, {7, -0.5F}, "a\n");
  append_top_logprob(extension, {-1, -kInfinity}, "");
  return extension;
}
constexpr std::string_view kTwoTopLogprobs =
    R"(,"top_logprobs":[{"token":"a\n","token_id":7,"logprob":-0.5},{"token":"","token_id":-1,"logprob":null}])";

TEST(TokenEvent, HasTopLogprobsWhereAskedFor) {
  FrameBuffer out;
  append_token_event(out, 1, 2, "x", -0.25F);
  insert_top_logprobs(out, kTokenEventEnd, two_top_logprobs());
  EXPECT_EQ(out.view(), R"(id: 1
data: {"token":"x","token_id":2,"index":1,"logprob":-0.25)" +
                            std::string(kTwoTopLogprobs) + "}\n\n");
}

TEST(TokenEvent, ALongTopLogprobIsCutBetweenCharacters) {
  std::string extension, long_text;
  for (int i = 0; i < 100; ++i) long_text += "\u20AC";
  append_top_logprob(extension, {7, -0.5F}, "x" + long_text);
  TopLogprobReader reader(extension);
  EXPECT_EQ(reader.next()->text, "x" + long_text.substr(0, 93));
  FrameBuffer out(64);
  append_token_event(out, 1, 2, "x", -0.25F);
  insert_top_logprobs(out, kTokenEventEnd, extension);
  EXPECT_NE(out.view().find(long_text.substr(0, 93) + "\",\"token_id\":7"), std::string_view::npos);
}

TEST(TokenEvent, WhatIsNoTopLogprobEndsThem) {
  const std::string extension = two_top_logprobs();
  for (std::size_t size = 1; size < extension.size(); ++size) {
    const std::vector<char> cut(extension.begin(), extension.begin() + static_cast<std::ptrdiff_t>(size));
    FrameBuffer out;
    append_token_event(out, 1, 2, "x", 0);
    insert_top_logprobs(out, kTokenEventEnd, {cut.data(), cut.size()});
    const bool has_first = size >= sizeof(TopLogprobHeader) + 2;
    EXPECT_TRUE(out.view().ends_with(has_first ? "\"logprob\":-0.5}]}\n\n" : "\"top_logprobs\":[]}\n\n")) << size;
  }
}

TEST(TokenEvent, StaysOneDataLine) {
  EXPECT_EQ(token_event(1, 2, "a\n\nb\rc"), "id: 1\ndata: {\"token\":\"a\\n\\nb\\rc\",\"token_id\":2,\"index\":1}\n\n");
}

TEST(TokenEvent, TheLongestTextFits) {
  const std::string text(65535, '\x01');
  std::string escaped;
  for (std::size_t i = 0; i < text.size(); ++i) escaped += "\\u0001";
  EXPECT_EQ(token_event(1, 2, text, -1.17549435e-38F),
            "id: 1\ndata: {\"token\":\"" + escaped + "\",\"token_id\":2,\"index\":1,\"logprob\":-1.1754944e-38}\n\n");
}

TEST(JsonString, EscapesWhatJsonCannotHold) {
  EXPECT_EQ(json_string(""), R"("")");
  EXPECT_EQ(json_string("a\"b\\c/d"), R"("a\"b\\c/d")");
  EXPECT_EQ(json_string("\b\t\n\f\r"), R"("\b\t\n\f\r")");
  EXPECT_EQ(json_string("\0\x01\x0B\x1F\x7F"s), "\"\\u0000\\u0001\\u000b\\u001f\x7F\"");
  EXPECT_EQ(json_string("é你🎉\u2028"), "\"é你🎉\u2028\"");
}

// The scan looks at words: each byte at each place of each length around them, with neighbours that a carry between the
// word's bytes would confuse.
TEST(JsonString, EachByteAtEachPlace) {
  for (const char around : {'x', '!', '#', '[', ']', '\x20', '\x7F', '\x80', '\xFF', '\x00', '"'}) {
    const std::string around_escaped = json_string(std::string(1, around));
    const std::string neighbour = around_escaped.substr(1, around_escaped.size() - 2);
    for (int value = 0; value < 256; ++value) {
      const std::string alone = json_string(std::string(1, static_cast<char>(value)));
      const std::string escaped = alone.substr(1, alone.size() - 2);
      for (std::size_t length = 1; length <= 18; ++length) {
        for (std::size_t place = 0; place < length; ++place) {
          std::string text(length, around);
          text[place] = static_cast<char>(value);
          std::string expected = "\"";
          for (std::size_t i = 0; i < length; ++i) expected += i == place ? escaped : neighbour;
          ASSERT_EQ(json_string(text), expected + "\"") << value << " at " << place << " of " << length;
        }
      }
    }
  }
}

TEST(JsonString, LongTextIsEscapedToItsEnd) {
  std::string text;
  std::string expected = "\"";
  for (int i = 0; i < 5000; ++i) {
    text += "é\n";
    expected += "é\\n";
  }
  EXPECT_EQ(json_string(text), expected + "\"");
}

TEST(DoneEvent, IsOneObject) {
  FrameBuffer out;
  append_done_event(out, kEnd);
  EXPECT_EQ(out.view(), R"(event: done
data: {"request_id":"req-1","model":"smol\"m","version":"1.0.0",)" +
                            std::string(kOutcome) + "}\n\n");
}

TEST(DoneEvent, NamesTheFinishReason) {
  const auto reason = [](FinishReason finish) {
    EndOfStream end = kEnd;
    end.finish = finish;
    FrameBuffer out;
    append_done_event(out, end);
    const std::string text(out.view());
    const std::string key = R"("finish_reason":")";
    const std::size_t at = text.find(key) + key.size();
    return text.substr(at, text.find('"', at) - at);
  };
  EXPECT_EQ(reason(FinishReason::kStop), "stop");
  EXPECT_EQ(reason(FinishReason::kLength), "length");
  EXPECT_EQ(reason(FinishReason::kCancelled), "cancelled");
  EXPECT_EQ(reason(FinishReason::kTimeout), "timeout");
  EXPECT_EQ(reason(FinishReason::kError), "error");
}

TEST(DoneEvent, TheExtremesAreStillNumbers) {
  EndOfStream end = kEnd;
  end.completion_tokens = 4294967295;
  end.usage = {.prompt_tokens = 4294967295,
               .cached_tokens = 4294967295,
               .queue_ns = std::numeric_limits<std::int64_t>::max(),
               .prefill_ns = std::numeric_limits<std::int64_t>::min(),
               .decode_ns = -1,
               .stalled_ns = 1'500};
  FrameBuffer out;
  append_done_event(out, end);
  EXPECT_NE(out.view().find(R"("total_tokens":8589934590)"), std::string_view::npos);
  EXPECT_NE(out.view().find(R"("queue_ms":9223372036854.776,"prefill_ms":0.000,"decode_ms":0.000,"stalled_ms":0.002)"),
            std::string_view::npos);
}

TEST(ErrorEvent, HasAllFourFields) {
  FrameBuffer out;
  append_error_event(out, "it \"broke\"\n", "model_error", "model_failed", std::nullopt);
  EXPECT_EQ(out.view(), R"(event: error
data: {"error":{"message":"it \"broke\"\n","type":"model_error","param":null,"code":"model_failed"}}

)");
  out.clear();
  append_error_event(out, "m", "t", "c", "top_p");
  EXPECT_EQ(out.view(), R"(event: error
data: {"error":{"message":"m","type":"t","param":"top_p","code":"c"}}

)");
}

TEST(Answer, HoldsAllTokens) {
  FrameBuffer tokens;
  append_token_object(tokens, 101, " hello", kNoLogprob);
  append_token_object(tokens, -1, "\"", -0.5F);
  append_token_object(tokens, 3, "", -kInfinity);
  EXPECT_EQ(tokens.view(), R"({"token":" hello","token_id":101,"logprob":null},)"
                           R"({"token":"\"","token_id":-1,"logprob":-0.5},)"
                           R"({"token":"","token_id":3,"logprob":null})");
  FrameBuffer out;
  append_answer(out, kEnd, tokens.view(), " hello\"");
  EXPECT_EQ(out.view(), R"({"request_id":"req-1","model":"smol\"m","version":"1.0.0","tokens":[)" +
                            std::string(tokens.view()) + R"(],"text":" hello\"",)" + std::string(kOutcome) + "}");
}

TEST(Answer, HoldsTopLogprobs) {
  FrameBuffer tokens;
  append_token_object(tokens, 1, "x", -0.25F);
  insert_top_logprobs(tokens, kTokenObjectEnd, two_top_logprobs());
  append_token_object(tokens, 2, "y", -0.25F);
  EXPECT_EQ(tokens.view(), R"({"token":"x","token_id":1,"logprob":-0.25)" + std::string(kTwoTopLogprobs) +
                               R"(},{"token":"y","token_id":2,"logprob":-0.25})");
}

TEST(Answer, MayHaveNoTokens) {
  FrameBuffer out;
  append_answer(out, kEnd, "", "");
  EXPECT_NE(out.view().find(R"("tokens":[],"text":"")"), std::string_view::npos);
}

}  // namespace
}  // namespace rts
