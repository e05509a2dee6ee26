#include "cpu/packed_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
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
#include <new>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "rts/file_descriptor.hpp"

namespace rts::cpu {
namespace {

// Since Linux 5.14; C libraries before 2022 do not name it.
constexpr int kMadvPopulateRead = 22;

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

// 24 GB/s on one core from its cache, so memory decides.
Checksum checksum(std::span<const std::byte> bytes) noexcept {
  Checksum sums{};
  for (; bytes.size() >= sizeof sums; bytes = bytes.subspan(sizeof sums)) sums = add(sums, bytes.data());
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
constexpr std::size_t kMostPayloadBytes = std::numeric_limits<std::int64_t>::max() - kPayloadOffset;

std::error_code error_code(int error) noexcept {
  return {error, std::generic_category()};
}

// Writing mapped memory for which the disk has no room kills (SIGBUS). File systems that copy on write may still run
// out of it.
std::error_code allocate(int fd, std::size_t size) noexcept {
  int error = 0;
  do {
    error = ::posix_fallocate(fd, 0, static_cast<off_t>(size));
  } while (error == EINTR);
  return error_code(error);
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

void PackedFile::Unmap::operator()(std::byte* memory) const noexcept {
  ::munmap(memory, size);
}

PackedFile::PackedFile(Mapping mapping, std::span<const std::byte> payload) noexcept
    : mapping_(std::move(mapping)), payload_(payload) {}

// None, and errno, where that fails. Huge pages are filled and mapped faster (150 MB in 58 ms and not in 76), and not
// all file systems have them.
PackedFile::Mapping PackedFile::map(std::size_t size, int protection, int flags, int fd) noexcept {
  void* const memory = ::mmap(nullptr, size, protection, flags, fd, 0);
  if (memory == MAP_FAILED) return Mapping(nullptr, Unmap{size});
  ::madvise(memory, size, MADV_HUGEPAGE);
  return Mapping(static_cast<std::byte*>(memory), Unmap{size});
}

std::optional<PackedFile> PackedFile::open(const std::filesystem::path& path, const PackedKey& key,
                                           std::size_t payload_bytes) noexcept {
  if (payload_bytes > kMostPayloadBytes) return std::nullopt;
  const std::size_t size = kPayloadOffset + payload_bytes;
  // Without O_NONBLOCK, opening a FIFO would wait for a writer.
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status{};
  if (file.get() < 0 || ::fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode)) return std::nullopt;
  if (static_cast<std::uint64_t>(status.st_size) != size) return std::nullopt;

  Header header;
  if (::pread(file.get(), &header, sizeof header, 0) != sizeof header) return std::nullopt;
  if (header != Header{.key = key, .payload_bytes = payload_bytes, .checksum = header.checksum}) return std::nullopt;

  Mapping mapping = map(size, PROT_READ, MAP_SHARED, file.get());
  if (mapping == nullptr) return std::nullopt;
  // Reads what is not in the page cache, in large pieces, and says where that fails instead of killing us.
  if (::madvise(mapping.get(), size, kMadvPopulateRead) != 0 && errno != EINVAL) return std::nullopt;
  const std::span<const std::byte> payload(mapping.get() + kPayloadOffset, payload_bytes);
  if (checksum(payload) != header.checksum) return std::nullopt;
  return PackedFile(std::move(mapping), payload);
}

std::variant<PackedFile, std::error_code> PackedFile::create(const std::filesystem::path& path, const PackedKey& key,
                                                             std::size_t payload_bytes, const Fill& fill) {
  if (payload_bytes > kMostPayloadBytes) return error_code(EFBIG);
  const std::size_t size = kPayloadOffset + payload_bytes;
  TemporaryFile file(path);
  if (file.error()) return file.error();
  if (const std::error_code error = allocate(file.fd(), size)) return error;
  Mapping mapping = map(size, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd());
  if (mapping == nullptr) return error_code(errno);

  const std::span<std::byte> payload(mapping.get() + kPayloadOffset, payload_bytes);
  fill(payload);
  const Header header{.key = key, .payload_bytes = payload_bytes, .checksum = checksum(payload)};
  std::memcpy(mapping.get(), &header, sizeof header);

  // Waits for the disk, whose errors show nowhere else.
  if (::mprotect(mapping.get(), size, PROT_READ) != 0 || ::fsync(file.fd()) != 0) return error_code(errno);
  if (const std::error_code error = file.replace_target()) return error;
  return PackedFile(std::move(mapping), payload);
}

PackedFile PackedFile::in_memory(std::size_t payload_bytes, const Fill& fill) {
  const std::size_t size = std::max<std::size_t>(payload_bytes, 1);
  Mapping mapping = map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  if (mapping == nullptr) throw std::bad_alloc();
  const std::span<std::byte> payload(mapping.get(), payload_bytes);
  fill(payload);
  return PackedFile(std::move(mapping), payload);
}

}  // namespace rts::cpu
