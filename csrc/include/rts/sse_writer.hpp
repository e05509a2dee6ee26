#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "rts/request.hpp"

// The bytes of the native /infer API: one server-sent event a token, or one JSON object for all of them. Text is valid
// UTF-8 wherever it is passed in and goes out as it is, apart from what JSON has to escape.
namespace rts {

// Bytes on their way to a socket. It grows to the largest burst that it had to hold and then allocates no more.
class FrameBuffer {
 public:
  explicit FrameBuffer(std::size_t capacity = 4096) { grow(capacity); }

  const char* data() const noexcept { return bytes_.get() + begin_; }
  std::size_t size() const noexcept { return end_ - begin_; }
  bool empty() const noexcept { return begin_ == end_; }
  std::string_view view() const noexcept { return {data(), size()}; }
  // Keeps the memory.
  void clear() noexcept { begin_ = end_ = chunk_ = 0; }

  void append(std::string_view bytes);
  // Takes back the last of what was appended.
  void drop(std::size_t bytes) noexcept { end_ -= bytes; }

  // At least `bytes` writable bytes behind the last one, until the next call; commit() says where writing stopped.
  char* room(std::size_t bytes) {
    if (capacity_ - end_ < bytes) grow(end_ + bytes);
    return bytes_.get() + end_;
  }
  void commit(const char* end) noexcept { end_ = static_cast<std::size_t>(end - bytes_.get()); }

  // What is appended between the two becomes one HTTP/1.1 chunk, and nothing at all where that is empty: an empty chunk
  // would end the body. Chunks do not nest. data() is meaningful again after end_chunk().
  void begin_chunk();
  void end_chunk();
  // Ends a chunked body.
  void last_chunk() { append("0\r\n\r\n"); }

 private:
  static constexpr std::size_t kSizeLine = 16 + 2;  // a std::size_t in hex, CRLF

  void grow(std::size_t least);

  std::unique_ptr<char[]> bytes_;
  std::size_t capacity_ = 0;
  std::size_t begin_ = 0;  // > 0 once a chunk's size line took less than was kept free for it
  std::size_t end_ = 0;
  std::size_t chunk_ = 0;  // where the open chunk's content starts
};

// How a stream ended and what it took.
struct EndOfStream {
  std::string_view request_id;
  std::string_view model;
  std::string_view version;
  FinishReason finish = FinishReason::kNone;
  std::uint32_t completion_tokens = 0;
  EndExtension usage;
};

// With quotes.
void append_json_string(FrameBuffer& out, std::string_view text);

// `logprob` is left out where it is NaN (none was asked for), and null where it is infinite, which JSON cannot say.
void append_token_event(FrameBuffer& out, std::uint32_t index, std::int32_t token_id, std::string_view text,
                        float logprob);
void append_done_event(FrameBuffer& out, const EndOfStream& end);
void append_error_event(FrameBuffer& out, std::string_view message, std::string_view type, std::string_view code,
                        std::optional<std::string_view> param);

// One more element of a JSON array without its brackets: a comma goes first unless `elements` is empty. `logprob` is
// null where it is not finite.
void append_token_object(FrameBuffer& elements, std::int32_t token_id, std::string_view text, float logprob);
// Adds a token record's extension to the event or the object that was appended last, and that ends with `closing`.
// A token without any pays nothing for it.
inline constexpr std::string_view kTokenEventEnd = "}\n\n", kTokenObjectEnd = "}";
void insert_top_logprobs(FrameBuffer& out, std::string_view closing, std::string_view top_logprobs);
// The whole answer as one JSON object, from the elements that append_token_object() collected.
void append_answer(FrameBuffer& out, const EndOfStream& end, std::string_view token_objects, std::string_view text);

}  // namespace rts
