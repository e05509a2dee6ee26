#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace rts {

// A regular file mapped for reading, whole. Its pages are shared with every process that maps it; a file that is cut
// short while it is mapped kills whoever reads the missing part (SIGBUS), so replace a file by rename, not in place.
class MappedFile {
 public:
  MappedFile() = default;
  // Throws std::runtime_error that begins with the path where it is missing, not readable, not a file or empty.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  std::span<const std::byte> bytes() const { return bytes_; }
  // What was read no longer counts as this process's memory. It comes back when it is read again.
  void release_pages() const noexcept;

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace rts
