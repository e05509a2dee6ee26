#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>
#include <variant>

#include "rts/siphash.hpp"

namespace rts::cpu {

// What a packed file was made from, and how.
struct PackedKey {
  // Of a text that names all that the payload depends on: the source's size and time, the layout, the packing's
  // version.
  static PackedKey of(std::string_view description) noexcept;

  Hash128 hash;
  friend bool operator==(const PackedKey&, const PackedKey&) = default;
};

// A model's packed weights: read-only memory that is kept in a file, so that the next start maps it and packs nothing,
// and so that processes share one copy. A step reads it as fast as memory of the process's own, in huge pages or not
// (150 MB by two threads: 19 GB/s, huge pages 18 GB/s), so nothing is copied.
//
// What the file holds is trusted as far as its folder is: the checksum finds accidents, not forgeries.
class PackedFile {
 public:
  // Writes the payload, which comes zeroed and at a multiple of 4096. May throw.
  using Fill = std::function<void(std::span<std::byte> payload)>;

  // Maps a file that create() has made for this key and size. None where it is missing, made for another, or not intact
  // to the last byte: every page is read once, which takes 20 ms for 150 MB in the page cache. Never throws. A file
  // that is cut short while it is mapped kills whoever reads what is missing (SIGBUS); create() does that to none.
  static std::optional<PackedFile> open(const std::filesystem::path& path, const PackedKey& key,
                                        std::size_t payload_bytes) noexcept;

  // Makes the file and maps it. Any number of processes may do so at once, and others open it: each sees an old file or
  // a new one, whole. The error says why there can be none, say in a folder that is read-only or full; `fill` has not
  // been called if that was known before. What `fill` throws passes through. Either way nothing is left behind but by a
  // process that is killed, and that is removed by a later create() of the same path, after an hour.
  static std::variant<PackedFile, std::error_code> create(const std::filesystem::path& path, const PackedKey& key,
                                                          std::size_t payload_bytes, const Fill& fill);

  // The same without a file, in memory of the process's own. Throws std::bad_alloc, and what `fill` throws.
  static PackedFile in_memory(std::size_t payload_bytes, const Fill& fill);

  // The payload, at a multiple of 4096.
  std::span<const std::byte> bytes() const noexcept { return payload_; }

 private:
  struct Unmap {
    std::size_t size;
    void operator()(std::byte* memory) const noexcept;
  };
  using Mapping = std::unique_ptr<std::byte, Unmap>;

  PackedFile(Mapping mapping, std::span<const std::byte> payload) noexcept;
  static Mapping map(std::size_t size, int protection, int flags, int fd) noexcept;

  Mapping mapping_;
  std::span<const std::byte> payload_;
};

}  // namespace rts::cpu
