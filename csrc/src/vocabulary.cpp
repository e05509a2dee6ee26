#include "rts/vocabulary.hpp"

#include <array>
#include <stdexcept>

#include "rts/detokenizer.hpp"
#include "rts/request.hpp"

namespace rts {
namespace {

// Bytes that GPT-2's map leaves as they are; the others become U+0100, U+0101, … in ascending order.
constexpr bool maps_to_itself(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

constexpr std::size_t kMappedCharacters = 0x144;
constexpr std::int16_t kUnmapped = -1;

constexpr auto kByteOfCharacter = [] {
  std::array<std::int16_t, kMappedCharacters> byte_of{};
  byte_of.fill(kUnmapped);
  std::size_t next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    byte_of[maps_to_itself(byte) ? byte : next++] = static_cast<std::int16_t>(byte);
  }
  return byte_of;
}();

// The character at `at`, which is moved past it; kMappedCharacters for what cannot be in the map: it ends within
// UTF-8's two-byte forms.
std::size_t next_character(std::string_view text, std::size_t& at) {
  const auto lead = static_cast<unsigned char>(text[at++]);
  if (lead < 0x80) return lead;
  if (lead < 0xC2 || lead > 0xDF || at == text.size()) return kMappedCharacters;
  const auto second = static_cast<unsigned char>(text[at++]);
  if ((second & 0xC0) != 0x80) return kMappedCharacters;
  return (lead & 0x1FU) << 6 | (second & 0x3FU);
}

// What a token becomes by itself: three bytes for each that is no UTF-8.
std::size_t text_bytes(std::string_view token) {
  Detokenizer detokenizer;
  std::string text;
  detokenizer.push(token, text);
  detokenizer.flush(text);
  return text.size();
}

}  // namespace

Vocabulary::Vocabulary(const std::vector<std::string>& token_bytes, const std::vector<std::int32_t>& special_ids,
                       const std::vector<std::int32_t>& eos_ids)
    : flags_(token_bytes.size()), eos_ids_(eos_ids) {
  mark(special_ids, kSpecial, "special");
  mark(eos_ids, kEos, "end-of-sequence");

  offsets_.reserve(token_bytes.size() + 1);
  offsets_.push_back(0);
  for (std::size_t id = 0; id < token_bytes.size(); ++id) {
    if ((flags_[id] & kSpecial) == 0) {
      const std::string& token = token_bytes[id];
      const std::size_t text = token.size() > kMaxTokenBytes / 3 ? text_bytes(token) : 0;
      if (text > kMaxTokenBytes) {
        throw std::invalid_argument("token " + std::to_string(id) + " has " + std::to_string(text) +
                                    " bytes of text; at most " + std::to_string(kMaxTokenBytes) + " can be served");
      }
      bytes_ += token;
    }
    offsets_.push_back(bytes_.size());
  }
  bytes_.shrink_to_fit();
}

void Vocabulary::mark(const std::vector<std::int32_t>& ids, Flag flag, const char* kind) {
  for (const std::int32_t id : ids) {
    if (!contains(id)) {
      throw std::invalid_argument(std::string(kind) + " token id " + std::to_string(id) +
                                  " is outside the vocabulary of " + std::to_string(size()));
    }
    flags_[static_cast<std::size_t>(id)] |= flag;
  }
}

std::string decode_byte_level(std::string_view entry) {
  std::string bytes;
  bytes.reserve(entry.size());
  for (std::size_t at = 0; at < entry.size();) {
    const std::size_t start = at;
    const std::size_t character = next_character(entry, at);
    const std::int16_t byte = character < kMappedCharacters ? kByteOfCharacter[character] : kUnmapped;
    if (byte == kUnmapped) {
      throw std::invalid_argument("the character at byte " + std::to_string(start) +
                                  " is none that a byte-level vocabulary uses");
    }
    bytes += static_cast<char>(byte);
  }
  return bytes;
}

}  // namespace rts
