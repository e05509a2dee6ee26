#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "rts/request.hpp"

// The most likely tokens of a position, as the sampler finds them and as a token record's extension carries them.
namespace rts {

struct TopLogprob {
  std::int32_t token = 0;
  float logprob = 0.0F;
};

// In an extension each is this, then text_bytes of UTF-8; the best first.
struct TopLogprobHeader {
  std::int32_t token_id = 0;
  float logprob = 0.0F;
  std::uint32_t text_bytes = 0;
};
static_assert(sizeof(TopLogprobHeader) == 12 && std::is_trivially_copyable_v<TopLogprobHeader>);

// What is longer is cut: it bounds what a token record may need. Few vocabularies have a token of that much text.
inline constexpr std::size_t kMaxTopLogprobText = 96;
constexpr std::size_t max_top_logprobs_bytes(std::uint32_t count) {
  return count * (sizeof(TopLogprobHeader) + kMaxTopLogprobText);
}

// `text` is UTF-8, and is cut between two characters.
inline void append_top_logprob(std::string& extension, TopLogprob top, std::string_view text) {
  if (text.size() > kMaxTopLogprobText) {
    std::size_t end = kMaxTopLogprobText;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
    text = text.substr(0, end);
  }
  const TopLogprobHeader header{top.token, top.logprob, static_cast<std::uint32_t>(text.size())};
  extension.append(reinterpret_cast<const char*>(&header), sizeof header);
  extension.append(text);
}

struct TopLogprobView {
  std::string_view text;
  std::int32_t token_id = 0;
  float logprob = 0.0F;
};

// Reads an extension. It comes from another process: what does not fit it ends it.
class TopLogprobReader {
 public:
  explicit TopLogprobReader(std::string_view extension = {}) : rest_(extension) {}

  std::optional<TopLogprobView> next() {
    TopLogprobHeader header;
    if (rest_.size() < sizeof header) return std::nullopt;
    std::memcpy(&header, rest_.data(), sizeof header);
    if (rest_.size() - sizeof header < header.text_bytes) return std::nullopt;
    const std::string_view text = rest_.substr(sizeof header, header.text_bytes);
    rest_.remove_prefix(sizeof header + header.text_bytes);
    return TopLogprobView{text, header.token_id, header.logprob};
  }

 private:
  std::string_view rest_;
};

}  // namespace rts
