#pragma once

#include <cstddef>
#include <span>

namespace rts::cpu {

// Zeroed memory from the system: a page takes room once it is written, and what begins at the beginning begins at a
// multiple of 4096.
class AnonymousMemory {
 public:
  AnonymousMemory() = default;
  // Throws std::bad_alloc where the system refuses. `huge_pages` asks for pages of 2 MB where the system has them.
  explicit AnonymousMemory(std::size_t size, bool huge_pages = false);
  ~AnonymousMemory();
  AnonymousMemory(AnonymousMemory&& other) noexcept;
  AnonymousMemory& operator=(AnonymousMemory&& other) noexcept;

  std::span<std::byte> bytes() const { return bytes_; }
  template <typename Number>
  Number* as() const {
    return reinterpret_cast<Number*>(bytes_.data());
  }

 private:
  std::span<std::byte> bytes_;
};

}  // namespace rts::cpu
