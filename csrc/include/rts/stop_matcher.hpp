#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rts {

// Finds the first stop string in one sequence's text, which comes in pieces, and holds back what may be the start of
// one: never more than the longest stop string less a byte. The match that completes first wins; of those, the one that
// starts first. Pieces of whole UTF-8 characters, and stop strings likewise, give output in whole characters.
class StopMatcher {
 public:
  // No stop strings: everything passes through.
  StopMatcher() = default;
  // The caller has checked them against kMaxStopStrings and kMaxStopBytes; none is empty.
  explicit StopMatcher(const std::vector<std::string>& stops);

  // Appends the text that can no longer belong to a stop string. True: a stop string is complete, `out` has what
  // precedes it, the rest is dropped, and nothing more is to be pushed.
  bool push(std::string_view text, std::string& out) {
    if (nodes_.empty()) {
      out.append(text);
      return false;
    }
    return match(text, out);
  }
  // The text has ended without a match: appends what is held back.
  void flush(std::string& out);

 private:
  // An Aho-Corasick automaton over the stop strings' bytes. The node is the whole state: its path from the root is the
  // longest end of the text that a stop string starts with, and so exactly what is held back.
  struct Node {
    std::uint32_t first_child = 0;
    std::uint32_t next_sibling = 0;
    std::uint32_t fallback = 0;     // the longest proper suffix of the path that is a path itself
    std::uint32_t path_offset = 0;  // the path is stops_[path_offset .. + depth]
    std::uint32_t depth = 0;
    std::uint32_t match_bytes = 0;  // of the longest stop string that the path ends with; 0: none
    char byte = 0;
  };
  static constexpr std::uint32_t kRoot = 0;

  bool match(std::string_view text, std::string& out);
  void insert(std::string_view stop);
  void link_fallbacks();
  std::uint32_t child(std::uint32_t node, char byte) const noexcept;
  std::uint32_t step(std::uint32_t node, char byte) const noexcept;
  std::string_view held() const noexcept;
  void release(std::size_t bytes, std::string_view text, std::string& out) const;

  std::string stops_;        // all, one after the other
  std::vector<Node> nodes_;  // the root first; empty without stop strings
  std::uint32_t state_ = kRoot;
};

}  // namespace rts
