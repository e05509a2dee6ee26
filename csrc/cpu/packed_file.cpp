#include "cpu/packed_file.hpp"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include "rts/file_descriptor.hpp"

namespace rts::cpu {
namespace {

// Eight sums side by side, of every eighth word each. Whatever the sum was, two different words lead to two different
// sums, so a change within 64 bytes that begin at a multiple of 64 is always found; any other, swapped blocks among
// them, but for one in 2^64.
using Checksum = std::array<std::uint64_t, 8>;

Checksum add(Checksum sums, const std::byte* bytes) noexcept {
  for (std::size_t i = 0; i < sums.size(); ++i) {
    std::uint64_t word;
    std::memcpy(&word, bytes + i * sizeof word, sizeof word);
    sums[i] = std::rotl(sums[i] ^ word, 29) * 0x9e3779b97f4a7c15;
  }
  return sums;
}

// Of `bytes` behind others, of which there was a multiple of 64. 24 GB/s on one core from its cache.
Checksum checksum(std::span<const std::byte> bytes, Checksum sums = {}) noexcept {
  for (; bytes.size() >= sizeof sums; bytes = bytes.subspan(sizeof sums)) sums = add(sums, bytes.data());
  if (bytes.empty()) return sums;
  std::array<std::byte, sizeof sums> rest{};
  std::copy(bytes.begin(), bytes.end(), rest.begin());
  return add(sums, rest.data());
}

// At the file's start. The payload begins at a later page, and the file ends with it.
struct Header {
  std::array<char, 8> magic{'r', 't', 's', 'p', 'a', 'c', 'k', '\n'};
  std::uint64_t version = 1;  // in this machine's byte order: one of the other does not recognise it
  PackedKey key;
  std::uint64_t payload_bytes = 0;
  Checksum checksum{};

  friend bool operator==(const Header&, const Header&) = default;
};
static_assert(sizeof(Header) == 104 && std::has_unique_object_representations_v<Header>);

constexpr std::size_t kPayloadOffset = 4096;
constexpr std::size_t kPieceBytes = 256 << 10;  // read at once: what the second-level cache holds for the checksum
constexpr std::size_t kMostPayloadBytes = std::numeric_limits<std::int64_t>::max() - kPayloadOffset;

std::error_code error_code(int error) noexcept {
  return {error, std::generic_category()};
}

// So that a full disk is known before the work is done. File systems that copy on write may still run out of room.
std::error_code allocate(int fd, std::size_t size) noexcept {
  int error = 0;
  do {
    error = ::posix_fallocate(fd, 0, static_cast<off_t>(size));
  } while (error == EINTR);
  return error_code(error);
}

// Whether all of it could be had.
bool read_all(int fd, std::span<std::byte> to, std::size_t offset) noexcept {
  while (!to.empty()) {
    const ssize_t count = ::pread(fd, to.data(), to.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    to = to.subspan(static_cast<std::size_t>(count));
    offset += static_cast<std::size_t>(count);
  }
  return true;
}

std::error_code write_all(int fd, std::span<const std::byte> from, std::size_t offset) noexcept {
  while (!from.empty()) {
    const ssize_t count = ::pwrite(fd, from.data(), from.size(), static_cast<off_t>(offset));
    if (count < 0 && errno != EINTR) return error_code(errno);
    if (count <= 0) continue;
    from = from.subspan(static_cast<std::size_t>(count));
    offset += static_cast<std::size_t>(count);
  }
  return {};
}

// A new file beside `target`, removed with this object unless it has replaced the target.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::filesystem::path& target) : target_(target), path_(target) {
    std::uint64_t number = 0;
    if (::getrandom(&number, sizeof number, 0) != sizeof number) {
      error_ = error_code(errno);
      return;
    }
    std::array<char, sizeof ".0123456789abcdef.tmp"> suffix{};
    std::snprintf(suffix.data(), suffix.size(), ".%016" PRIx64 ".tmp", number);
    path_ += suffix.data();
    file_ = FileDescriptor(::open(path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (file_.get() < 0) {
      error_ = error_code(errno);
      return;
    }
    remove_abandoned();
  }
  ~TemporaryFile() {
    if (file_.get() >= 0 && !replaced_) ::unlink(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  std::error_code error() const noexcept { return error_; }
  int fd() const noexcept { return file_.get(); }

  std::error_code replace_target() noexcept {
    replaced_ = ::rename(path_.c_str(), target_.c_str()) == 0;
    return error_code(replaced_ ? 0 : errno);
  }

 private:
  static constexpr std::string_view kEnding = ".tmp";
  static constexpr std::size_t kDigits = 16;
  static constexpr std::time_t kAbandonedAfterSeconds = 3600;

  bool has_such_a_name(const std::string& name) const {
    const std::string target = target_.filename().native();
    if (name.size() != target.size() + 1 + kDigits + kEnding.size()) return false;
    const std::string_view digits = std::string_view(name).substr(target.size() + 1, kDigits);
    return name.starts_with(target + ".") && name.ends_with(kEnding) &&
           digits.find_first_not_of("0123456789abcdef") == std::string_view::npos;
  }

  // What killed processes have left. One that is still being written has been touched of late; should it not, its
  // writer finds that it cannot rename it. The time is the file system's own: that of the file just made.
  void remove_abandoned() const {
    struct stat own{};
    if (::fstat(fd(), &own) != 0) return;
    std::error_code ended;
    std::filesystem::directory_iterator entry(path_.has_parent_path() ? path_.parent_path() : ".", ended);
    for (; !ended && entry != std::filesystem::directory_iterator(); entry.increment(ended)) {
      struct stat status{};
      if (!has_such_a_name(entry->path().filename().native())) continue;
      if (::lstat(entry->path().c_str(), &status) != 0 || !S_ISREG(status.st_mode)) continue;
      if (status.st_mtime + kAbandonedAfterSeconds < own.st_mtime) ::unlink(entry->path().c_str());
    }
  }

  std::filesystem::path target_;
  std::filesystem::path path_;
  FileDescriptor file_;
  std::error_code error_;
  bool replaced_ = false;
};

}  // namespace

PackedKey PackedKey::of(std::string_view description) noexcept {
  return {siphash128(SipKey{}, std::as_bytes(std::span(description)))};
}

std::optional<PackedFile> PackedFile::open(const std::filesystem::path& path, const PackedKey& key,
                                           std::size_t payload_bytes) {
  if (payload_bytes > kMostPayloadBytes) return std::nullopt;
  // Without O_NONBLOCK, opening a FIFO would wait for a writer.
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status{};
  if (file.get() < 0 || ::fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode)) return std::nullopt;
  if (static_cast<std::uint64_t>(status.st_size) != kPayloadOffset + payload_bytes) return std::nullopt;

  Header header;
  if (!read_all(file.get(), std::as_writable_bytes(std::span(&header, 1)), 0)) return std::nullopt;
  if (header != Header{.key = key, .payload_bytes = payload_bytes, .checksum = header.checksum}) return std::nullopt;

  PackedFile opened(payload_bytes);
  Checksum sums{};
  for (std::size_t at = 0; at < payload_bytes; at += kPieceBytes) {
    const std::span<std::byte> piece = opened.memory_.bytes().subspan(at, std::min(kPieceBytes, payload_bytes - at));
    if (!read_all(file.get(), piece, kPayloadOffset + at)) return std::nullopt;
    sums = checksum(piece, sums);
  }
  if (sums != header.checksum) return std::nullopt;
  return opened;
}

std::variant<PackedFile, std::error_code> PackedFile::create(const std::filesystem::path& path, const PackedKey& key,
                                                             std::size_t payload_bytes, const Fill& fill) {
  if (payload_bytes > kMostPayloadBytes) return error_code(EFBIG);
  TemporaryFile file(path);
  if (file.error()) return file.error();
  if (const std::error_code error = allocate(file.fd(), kPayloadOffset + payload_bytes)) return error;

  PackedFile made = in_memory(payload_bytes, fill);
  const Header header{.key = key, .payload_bytes = payload_bytes, .checksum = checksum(made.bytes())};
  if (const std::error_code error = write_all(file.fd(), made.bytes(), kPayloadOffset)) return error;
  if (const std::error_code error = write_all(file.fd(), std::as_bytes(std::span(&header, 1)), 0)) return error;
  // Not waited for the disk: what it loses, the checksum finds.
  if (const std::error_code error = file.replace_target()) return error;
  return made;
}

PackedFile PackedFile::in_memory(std::size_t payload_bytes, const Fill& fill) {
  PackedFile made(payload_bytes);
  fill(made.memory_.bytes());
  return made;
}

}  // namespace rts::cpu
