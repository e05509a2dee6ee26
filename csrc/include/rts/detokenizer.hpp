#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

namespace rts {

// Makes one sequence's token bytes into text: what comes out is valid UTF-8, and a character that is spread over
// several tokens comes out with its last byte. Bytes that are no UTF-8 become U+FFFD, one for each maximal subpart of a
// character (Unicode 3.9, and Python's errors="replace").
class Detokenizer {
 public:
  void push(std::string_view token_bytes, std::string& out);
  // No more bytes will come: an incomplete character becomes U+FFFD.
  void flush(std::string& out);

 private:
  void complete_pending(std::string_view& bytes, std::string& out);

  char pending_[4] = {};  // an incomplete character's bytes, and room for one that may complete it
  std::uint8_t pending_bytes_ = 0;
};
static_assert(std::is_trivially_copyable_v<Detokenizer>);

}  // namespace rts
