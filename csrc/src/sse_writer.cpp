#include "rts/sse_writer.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <utility>

#include "rts/top_logprobs.hpp"

namespace rts {
namespace {

// The low-level writers below take a pointer into FrameBuffer::room() and return the one behind what they wrote.

template <std::size_t kSize>
char* put(char* to, const char (&literal)[kSize]) {
  std::memcpy(to, literal, kSize - 1);
  return to + kSize - 1;
}

constexpr std::size_t kNumberBytes = 24;  // holds any 64-bit integer and any float

template <typename Number>
char* put_number(char* to, Number value) {
  return std::to_chars(to, to + kNumberBytes, value).ptr;
}

char* put_number_or_null(char* to, float value) {
  return std::isfinite(value) ? put_number(to, value) : put(to, "null");
}

constexpr std::size_t kEscapedBytes = 6;  // the longest form of one byte: \u00XX

// What follows the backslash in a byte's escaped form: 'u' stands for \u00XX, 0 for a byte that needs none.
constexpr auto kEscapes = [] {
  std::array<char, 256> escapes{};
  for (std::size_t control = 0; control < 0x20; ++control) escapes[control] = 'u';
  escapes['\b'] = 'b';
  escapes['\t'] = 't';
  escapes['\n'] = 'n';
  escapes['\f'] = 'f';
  escapes['\r'] = 'r';
  escapes['"'] = '"';
  escapes['\\'] = '\\';
  return escapes;
}();

char* put_escaped_byte(char* to, char byte) {
  const auto value = static_cast<unsigned char>(byte);
  const char escape = kEscapes[value];
  if (escape == 0) {
    *to++ = byte;
    return to;
  }
  *to++ = '\\';
  *to++ = escape;
  if (escape == 'u') {
    to = put(to, "00");
    *to++ = "01"[value >> 4];
    *to++ = "0123456789abcdef"[value & 15];
  }
  return to;
}

constexpr std::uint64_t every_byte(std::uint8_t value) {
  return 0x0101010101010101U * value;
}

// How many of the word's leading bytes JSON takes as they are. Borrows make only bytes behind a true hit look like one,
// so the first is exact.
std::size_t plain_bytes(std::uint64_t word) {
  static_assert(std::endian::native == std::endian::little);
  const std::uint64_t quote = word ^ every_byte('"');
  const std::uint64_t backslash = word ^ every_byte('\\');
  const std::uint64_t hits = ((word - every_byte(0x20)) & ~word) | ((quote - every_byte(1)) & ~quote) |
                             ((backslash - every_byte(1)) & ~backslash);
  return static_cast<std::size_t>(std::countr_zero(hits & every_byte(0x80))) / 8;
}

// Needs kEscapedBytes a byte of text, and a word more: words are stored before they are looked at.
char* put_escaped(char* to, std::string_view text) {
  const char* from = text.data();
  const char* const end = from + text.size();
  std::uint64_t word;
  while (static_cast<std::size_t>(end - from) >= sizeof word) {
    std::memcpy(&word, from, sizeof word);
    std::memcpy(to, &word, sizeof word);
    const std::size_t plain = plain_bytes(word);
    from += plain;
    to += plain;
    if (plain < sizeof word) to = put_escaped_byte(to, *from++);
  }
  while (from < end) to = put_escaped_byte(to, *from++);
  return to;
}

constexpr std::size_t escaped_room(std::size_t text_bytes) {
  return kEscapedBytes * text_bytes + sizeof(std::uint64_t);
}

void append_number(FrameBuffer& out, std::uint64_t value) {
  char* to = out.room(kNumberBytes);
  out.commit(put_number(to, value));
}

// Milliseconds to the microsecond.
void append_ms(FrameBuffer& out, std::int64_t ns) {
  const std::uint64_t us = (static_cast<std::uint64_t>(std::max<std::int64_t>(ns, 0)) + 500) / 1000;
  char* to = put_number(out.room(kNumberBytes + 4), us / 1000);
  const auto fraction = static_cast<unsigned>(us % 1000);
  *to++ = '.';
  *to++ = static_cast<char>('0' + fraction / 100);
  *to++ = static_cast<char>('0' + fraction / 10 % 10);
  *to++ = static_cast<char>('0' + fraction % 10);
  out.commit(to);
}

std::string_view name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "none";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kTimeout:
      return "timeout";
    case FinishReason::kError:
      break;
  }
  return "error";
}

void append_origin(FrameBuffer& out, const EndOfStream& end) {
  out.append(R"("request_id":)");
  append_json_string(out, end.request_id);
  out.append(R"(,"model":)");
  append_json_string(out, end.model);
  out.append(R"(,"version":)");
  append_json_string(out, end.version);
}

void append_outcome(FrameBuffer& out, const EndOfStream& end) {
  out.append(R"("finish_reason":)");
  append_json_string(out, name_of(end.finish));
  out.append(R"(,"usage":{"prompt_tokens":)");
  append_number(out, end.usage.prompt_tokens);
  out.append(R"(,"completion_tokens":)");
  append_number(out, end.completion_tokens);
  out.append(R"(,"total_tokens":)");
  append_number(out, std::uint64_t{end.usage.prompt_tokens} + end.completion_tokens);
  out.append(R"(,"cached_tokens":)");
  append_number(out, end.usage.cached_tokens);
  out.append(R"(},"timings":{"queue_ms":)");
  append_ms(out, end.usage.queue_ns);
  out.append(R"(,"prefill_ms":)");
  append_ms(out, end.usage.prefill_ns);
  out.append(R"(,"decode_ms":)");
  append_ms(out, end.usage.decode_ns);
  out.append(R"(,"stalled_ms":)");
  append_ms(out, end.usage.stalled_ns);
  out.append("}");
}

}  // namespace

void FrameBuffer::append(std::string_view bytes) {
  char* to = room(bytes.size());
  std::copy(bytes.begin(), bytes.end(), to);
  end_ += bytes.size();
}

void FrameBuffer::begin_chunk() {
  room(kSizeLine);
  end_ += kSizeLine;
  chunk_ = end_;
}

void FrameBuffer::end_chunk() {
  if (end_ == chunk_) {
    end_ -= kSizeLine;
    return;
  }
  char line[kSizeLine];
  char* const digits_end = std::to_chars(line, line + sizeof line, end_ - chunk_, 16).ptr;
  const auto line_bytes = static_cast<std::size_t>(put(digits_end, "\r\n") - line);

  // The line goes right in front of the content; what precedes it, response headers if anything, closes up.
  const std::size_t gap = kSizeLine - line_bytes;
  char* const first = bytes_.get() + begin_;
  std::memmove(first + gap, first, chunk_ - kSizeLine - begin_);
  begin_ += gap;
  std::memcpy(bytes_.get() + chunk_ - line_bytes, line, line_bytes);
  append("\r\n");
}

void FrameBuffer::grow(std::size_t least) {
  const std::size_t capacity = std::max(least, 2 * capacity_);
  auto bytes = std::make_unique_for_overwrite<char[]>(capacity);
  std::copy_n(bytes_.get(), end_, bytes.get());
  bytes_ = std::move(bytes);
  capacity_ = capacity;
}

void append_json_string(FrameBuffer& out, std::string_view text) {
  // In pieces, so that a long text does not claim room for its worst case.
  constexpr std::size_t kPiece = 1024;
  out.append("\"");
  for (; !text.empty(); text.remove_prefix(std::min(kPiece, text.size()))) {
    const std::string_view piece = text.substr(0, kPiece);
    out.commit(put_escaped(out.room(escaped_room(piece.size())), piece));
  }
  out.append("\"");
}

void append_token_event(FrameBuffer& out, std::uint32_t index, std::int32_t token_id, std::string_view text,
                        float logprob) {
  constexpr std::size_t kLiterals = 96;
  char* to = out.room(kLiterals + 4 * kNumberBytes + escaped_room(text.size()));
  to = put(to, "id: ");
  const char* const digits = to;
  to = put_number(to, index);
  const auto index_bytes = static_cast<std::size_t>(to - digits);
  to = put(to, "\ndata: {\"token\":\"");
  to = put_escaped(to, text);
  to = put(to, R"(","token_id":)");
  to = put_number(to, token_id);
  to = put(to, R"(,"index":)");
  to = std::copy_n(digits, index_bytes, to);
  if (!std::isnan(logprob)) {
    to = put(to, R"(,"logprob":)");
    to = put_number_or_null(to, logprob);
  }
  out.commit(put(to, "}\n\n"));
}

void append_done_event(FrameBuffer& out, const EndOfStream& end) {
  out.append("event: done\ndata: {");
  append_origin(out, end);
  out.append(",");
  append_outcome(out, end);
  out.append("}\n\n");
}

void append_error_event(FrameBuffer& out, std::string_view message, std::string_view type, std::string_view code,
                        std::optional<std::string_view> param) {
  out.append("event: error\ndata: {\"error\":{\"message\":");
  append_json_string(out, message);
  out.append(R"(,"type":)");
  append_json_string(out, type);
  out.append(R"(,"param":)");
  if (param) {
    append_json_string(out, *param);
  } else {
    out.append("null");
  }
  out.append(R"(,"code":)");
  append_json_string(out, code);
  out.append("}}\n\n");
}

void append_token_object(FrameBuffer& elements, std::int32_t token_id, std::string_view text, float logprob) {
  constexpr std::size_t kLiterals = 64;
  char* to = elements.room(kLiterals + 2 * kNumberBytes + escaped_room(text.size()));
  if (!elements.empty()) *to++ = ',';
  to = put(to, R"({"token":")");
  to = put_escaped(to, text);
  to = put(to, R"(","token_id":)");
  to = put_number(to, token_id);
  to = put(to, R"(,"logprob":)");
  to = put_number_or_null(to, logprob);
  elements.commit(put(to, "}"));
}

void insert_top_logprobs(FrameBuffer& out, std::string_view closing, std::string_view top_logprobs) {
  constexpr std::size_t kLiterals = 64;
  out.drop(closing.size());
  out.append(R"(,"top_logprobs":[)");
  TopLogprobReader reader(top_logprobs);
  bool is_first = true;
  while (const std::optional<TopLogprobView> top = reader.next()) {
    char* to = out.room(kLiterals + 2 * kNumberBytes + escaped_room(top->text.size()));
    if (!std::exchange(is_first, false)) *to++ = ',';
    to = put(to, R"({"token":")");
    to = put_escaped(to, top->text);
    to = put(to, R"(","token_id":)");
    to = put_number(to, top->token_id);
    to = put(to, R"(,"logprob":)");
    to = put_number_or_null(to, top->logprob);
    out.commit(put(to, "}"));
  }
  out.append("]");
  out.append(closing);
}

void append_answer(FrameBuffer& out, const EndOfStream& end, std::string_view token_objects, std::string_view text) {
  out.append("{");
  append_origin(out, end);
  out.append(R"(,"tokens":[)");
  out.append(token_objects);
  out.append(R"(],"text":)");
  append_json_string(out, text);
  out.append(",");
  append_outcome(out, end);
  out.append("}");
}

}  // namespace rts
