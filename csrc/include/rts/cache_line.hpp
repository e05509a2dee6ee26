#pragma once

#include <cstddef>

namespace rts {

// A constant and not std::hardware_destructive_interference_size: the value is part of the shared-memory layout, and
// GCC's follows -mtune, so that two builds of the same source could disagree on it.
inline constexpr std::size_t kCacheLine = 64;

constexpr std::size_t align_up(std::size_t n, std::size_t alignment) {
  return (n + alignment - 1) / alignment * alignment;
}

}  // namespace rts
