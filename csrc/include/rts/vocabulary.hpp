#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rts {

// The bytes of every token of a model. Immutable, so one object is shared by all sequences and threads.
class Vocabulary {
 public:
  // token_bytes[id] is what token `id` adds to the output. Throws std::invalid_argument for an id outside token_bytes
  // and for a token with text that is longer than kMaxTokenBytes.
  Vocabulary(const std::vector<std::string>& token_bytes, const std::vector<std::int32_t>& special_ids,
             const std::vector<std::int32_t>& eos_ids);

  std::size_t size() const noexcept { return flags_.size(); }

  // Empty for a special token and for an id outside the vocabulary.
  std::string_view bytes(std::int32_t id) const noexcept {
    if (!contains(id)) return {};
    const auto i = static_cast<std::size_t>(id);
    return {bytes_.data() + offsets_[i], offsets_[i + 1] - offsets_[i]};
  }
  bool special(std::int32_t id) const noexcept { return has(id, kSpecial); }
  bool eos(std::int32_t id) const noexcept { return has(id, kEos); }
  const std::vector<std::int32_t>& eos_ids() const noexcept { return eos_ids_; }

 private:
  enum Flag : std::uint8_t { kSpecial = 1, kEos = 2 };

  bool contains(std::int32_t id) const noexcept { return id >= 0 && static_cast<std::size_t>(id) < flags_.size(); }
  bool has(std::int32_t id, Flag flag) const noexcept {
    return contains(id) && (flags_[static_cast<std::size_t>(id)] & flag) != 0;
  }
  void mark(const std::vector<std::int32_t>& ids, Flag flag, const char* kind);

  std::string bytes_;
  std::vector<std::size_t> offsets_;  // size() + 1; special tokens have no bytes
  std::vector<std::uint8_t> flags_;
  std::vector<std::int32_t> eos_ids_;
};

// A byte-level BPE vocabulary stores bytes as printable characters ("Ġhello" for " hello"): GPT-2's map, undone.
// Throws std::invalid_argument for a character outside the map.
std::string decode_byte_level(std::string_view entry);

}  // namespace rts
