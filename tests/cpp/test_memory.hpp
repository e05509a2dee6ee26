#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <system_error>

#include "rts/file_descriptor.hpp"

namespace rts::test {

// How much a stress does: `quick` times the environment variable RTS_SOAK (1 where it is not set).
inline std::uint64_t soak(std::uint64_t quick) {
  const char* factor = std::getenv("RTS_SOAK");
  return factor == nullptr ? quick : quick * std::strtoull(factor, nullptr, 10);
}

inline std::byte* map_pages(std::size_t bytes, int flags, int fd = -1) {
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  return static_cast<std::byte*>(memory);
}

// Zeroed memory between two pages that cannot be touched. It ends where the second one starts; what lies between the
// first one and its start is watched.
class GuardedMemory {
 public:
  // `bytes` is a multiple of a cache line, so that the start is aligned to one.
  explicit GuardedMemory(std::size_t bytes)
      : page_(static_cast<std::size_t>(::sysconf(_SC_PAGESIZE))),
        inner_((bytes + page_ - 1) / page_ * page_),
        pages_(map_pages(inner_ + 2 * page_, MAP_PRIVATE | MAP_ANONYMOUS)),
        data_(pages_ + page_ + inner_ - bytes) {
    ::mprotect(pages_, page_, PROT_NONE);
    ::mprotect(pages_ + page_ + inner_, page_, PROT_NONE);
  }
  ~GuardedMemory() {
    for (const std::byte* at = pages_ + page_; at < data_; ++at) {
      if (*at != std::byte{0}) {
        ADD_FAILURE() << "written " << data_ - at << " bytes before the memory";
        break;
      }
    }
    ::munmap(pages_, inner_ + 2 * page_);
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  std::byte* data() const { return data_; }

 private:
  std::size_t page_;
  std::size_t inner_;
  std::byte* pages_;
  std::byte* data_;
};

// Zeroed memory that child processes share, mapped at two addresses.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t bytes) : bytes_(bytes), fd_(::memfd_create("rts-test", MFD_CLOEXEC)) {
    if (fd_.get() < 0 || ::ftruncate(fd_.get(), static_cast<off_t>(bytes)) != 0) {
      throw std::system_error(errno, std::generic_category(), "memfd");
    }
    data_ = map_pages(bytes, MAP_SHARED, fd_.get());
    again_ = map_pages(bytes, MAP_SHARED, fd_.get());
  }
  ~SharedMemory() {
    ::munmap(data_, bytes_);
    ::munmap(again_, bytes_);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  std::byte* data() const { return data_; }
  std::byte* again() const { return again_; }

 private:
  std::size_t bytes_;
  FileDescriptor fd_;
  std::byte* data_ = nullptr;
  std::byte* again_ = nullptr;
};

}  // namespace rts::test
