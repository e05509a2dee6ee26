#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>
#include <variant>

#include "cpu/anonymous_memory.hpp"
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

// A model's packed weights, which are kept in a file, so that the next start reads it and packs nothing. Read and not
// mapped: each step reads all of it again, and two threads get 23 GB/s out of huge pages, which mapped files rarely
// have, where pages of 4 KB give 17.
//
// What the file holds is trusted as far as its folder is: the checksum finds accidents, not forgeries.
class PackedFile {
 public:
  // Writes the payload, which comes zeroed and at a multiple of 4096, in the process's own memory. May throw.
  using Fill = std::function<void(std::span<std::byte> payload)>;

  // Reads a file that create() has made for this key and size. None where it is missing, made for another, or not
  // intact to the last byte. Throws std::bad_alloc.
  static std::optional<PackedFile> open(const std::filesystem::path& path, const PackedKey& key,
                                        std::size_t payload_bytes);

  // Makes the file. Any number of processes may do so at once, and others open it: each sees an old file or a new one,
  // whole. The error says why there can be none, say in a folder that is read-only or full; `fill` has not been called
  // if that was known before. What `fill` throws passes through. Either way nothing is left behind but by a process
  // that is killed, and that is removed by a later create() of the same path, after an hour.
  static std::variant<PackedFile, std::error_code> create(const std::filesystem::path& path, const PackedKey& key,
                                                          std::size_t payload_bytes, const Fill& fill);

  // The same without a file. Throws std::bad_alloc, and what `fill` throws.
  static PackedFile in_memory(std::size_t payload_bytes, const Fill& fill);

  // The payload, at a multiple of 4096.
  std::span<const std::byte> bytes() const noexcept { return memory_.bytes(); }

 private:
  explicit PackedFile(std::size_t payload_bytes) : memory_(payload_bytes, true) {}

  AnonymousMemory memory_;
};

}  // namespace rts::cpu
