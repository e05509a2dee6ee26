#include "rts/stop_matcher.hpp"

namespace rts {

StopMatcher::StopMatcher(const std::vector<std::string>& stops) {
  if (stops.empty()) return;
  nodes_.emplace_back();
  for (const std::string& stop : stops) insert(stop);
  link_fallbacks();
}

void StopMatcher::insert(std::string_view stop) {
  const auto offset = static_cast<std::uint32_t>(stops_.size());
  stops_ += stop;
  std::uint32_t node = kRoot;
  for (const char byte : stop) {
    std::uint32_t next = child(node, byte);
    if (next == kRoot) {
      next = static_cast<std::uint32_t>(nodes_.size());
      nodes_.push_back({.next_sibling = nodes_[node].first_child,
                        .path_offset = offset,
                        .depth = nodes_[node].depth + 1,
                        .byte = byte});
      nodes_[node].first_child = next;
    }
    node = next;
  }
  nodes_[node].match_bytes = nodes_[node].depth;
}

// Breadth first: a node's fallback is shorter than its path, so it is linked before.
void StopMatcher::link_fallbacks() {
  std::vector<std::uint32_t> order{kRoot};
  order.reserve(nodes_.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    const std::uint32_t parent = order[i];
    for (std::uint32_t node = nodes_[parent].first_child; node != kRoot; node = nodes_[node].next_sibling) {
      Node& linked = nodes_[node];
      if (parent != kRoot) linked.fallback = step(nodes_[parent].fallback, linked.byte);
      if (linked.match_bytes == 0) linked.match_bytes = nodes_[linked.fallback].match_bytes;
      order.push_back(node);
    }
  }
}

bool StopMatcher::match(std::string_view text, std::string& out) {
  std::uint32_t node = state_;
  for (std::size_t i = 0; i < text.size(); ++i) {
    node = step(node, text[i]);
    const std::size_t match_bytes = nodes_[node].match_bytes;
    if (match_bytes != 0) {
      release(held().size() + i + 1 - match_bytes, text, out);
      state_ = kRoot;
      return true;
    }
  }
  release(held().size() + text.size() - nodes_[node].depth, text, out);
  state_ = node;
  return false;
}

void StopMatcher::flush(std::string& out) {
  if (nodes_.empty()) return;
  out.append(held());
  state_ = kRoot;
}

// The root stands for "none": it is nobody's child.
std::uint32_t StopMatcher::child(std::uint32_t node, char byte) const noexcept {
  std::uint32_t next = nodes_[node].first_child;
  while (next != kRoot && nodes_[next].byte != byte) next = nodes_[next].next_sibling;
  return next;
}

std::uint32_t StopMatcher::step(std::uint32_t node, char byte) const noexcept {
  for (;;) {
    const std::uint32_t next = child(node, byte);
    if (next != kRoot || node == kRoot) return next;
    node = nodes_[node].fallback;
  }
}

std::string_view StopMatcher::held() const noexcept {
  const Node& node = nodes_[state_];
  return std::string_view(stops_).substr(node.path_offset, node.depth);
}

// Appends the first `bytes` bytes of what is held back and `text` after it.
void StopMatcher::release(std::size_t bytes, std::string_view text, std::string& out) const {
  const std::string_view first = held().substr(0, bytes);
  out.append(first);
  out.append(text.substr(0, bytes - first.size()));
}

}  // namespace rts
