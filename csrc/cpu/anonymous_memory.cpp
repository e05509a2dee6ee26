#include "cpu/anonymous_memory.hpp"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace rts::cpu {

AnonymousMemory::AnonymousMemory(std::size_t size, bool huge_pages) {
  if (size == 0) return;
  void* const at = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  bytes_ = {static_cast<std::byte*>(at), size};
  ::madvise(at, size, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);  // only a hint
}

AnonymousMemory::~AnonymousMemory() {
  if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
}

AnonymousMemory::AnonymousMemory(AnonymousMemory&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

AnonymousMemory& AnonymousMemory::operator=(AnonymousMemory&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace rts::cpu
