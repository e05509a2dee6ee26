#include "rts/detokenizer.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace rts {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

template <typename Word>
Word load(const char* from) {
  Word word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// Overlapping words and no loop over the last bytes: tokens are short and of all lengths, so that its end would be
// mispredicted (4 of 20 ns a token).
bool is_ascii(std::string_view text) {
  constexpr std::uint64_t kHighBits = 0x8080808080808080;
  const char* const first = text.data();
  const char* const last = first + text.size();
  std::uint64_t bytes = 0;
  if (text.size() >= 8) {
    bytes = load<std::uint64_t>(last - 8);
    for (const char* at = first; last - at > 8; at += 8) bytes |= load<std::uint64_t>(at);
  } else if (text.size() >= 4) {
    bytes = load<std::uint32_t>(first) | load<std::uint32_t>(last - 4);
  } else if (!text.empty()) {
    bytes = static_cast<unsigned char>(first[0] | first[text.size() / 2] | last[-1]);
  }
  return (bytes & kHighBits) == 0;
}

enum class Form { kCharacter, kTruncated, kInvalid };

struct Unit {
  Form form;
  std::size_t bytes;  // the character's, or those of the maximal subpart of one
};

constexpr std::size_t character_bytes(unsigned char lead) {
  if (lead < 0x80) return 1;
  if (lead < 0xC2) return 0;
  if (lead < 0xE0) return 2;
  if (lead < 0xF0) return 3;
  return lead < 0xF5 ? 4 : 0;
}

// The second byte's range is narrower where it decides on overlong forms, surrogates and the end of Unicode.
constexpr bool may_follow(unsigned char lead, unsigned char second) {
  const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  return second >= low && second <= high;
}

Unit first_unit(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  const std::size_t bytes = character_bytes(lead);
  if (bytes == 0) return {Form::kInvalid, 1};
  for (std::size_t i = 1; i < bytes; ++i) {
    if (i == text.size()) return {Form::kTruncated, i};
    const auto next = static_cast<unsigned char>(text[i]);
    const bool valid = i == 1 ? may_follow(lead, next) : (next & 0xC0) == 0x80;
    if (!valid) return {Form::kInvalid, i};
  }
  return {Form::kCharacter, bytes};
}

}  // namespace

void Detokenizer::push(std::string_view bytes, std::string& out) {
  if (pending_bytes_ != 0) complete_pending(bytes, out);
  if (is_ascii(bytes)) {
    out.append(bytes);
    return;
  }
  std::size_t valid = 0;
  while (valid < bytes.size()) {
    const std::string_view rest = bytes.substr(valid);
    const Unit unit = first_unit(rest);
    if (unit.form == Form::kCharacter) {
      valid += unit.bytes;
      continue;
    }
    out.append(bytes.substr(0, valid));
    if (unit.form == Form::kTruncated) {
      std::copy_n(rest.data(), unit.bytes, pending_);
      pending_bytes_ = static_cast<std::uint8_t>(unit.bytes);
      return;
    }
    out.append(kReplacement);
    bytes = rest.substr(unit.bytes);
    valid = 0;
  }
  out.append(bytes);
}

void Detokenizer::flush(std::string& out) {
  if (pending_bytes_ != 0) out.append(kReplacement);
  pending_bytes_ = 0;
}

// Takes bytes until the pending character is complete or cannot become one; a byte that breaks it is left in `bytes`.
void Detokenizer::complete_pending(std::string_view& bytes, std::string& out) {
  while (!bytes.empty()) {
    pending_[pending_bytes_] = bytes.front();
    const std::string_view pending(pending_, pending_bytes_ + 1U);
    const Form form = first_unit(pending).form;
    if (form == Form::kInvalid) {
      flush(out);
      return;
    }
    bytes.remove_prefix(1);
    if (form == Form::kCharacter) {
      out.append(pending);
      pending_bytes_ = 0;
      return;
    }
    ++pending_bytes_;
  }
}

}  // namespace rts
