#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "rts/gguf_types.hpp"
#include "rts/gguf_values.hpp"
#include "rts/mapped_file.hpp"

namespace rts {

struct GgufEntry {
  std::string_view name;
  GgufValue value;
};

struct GgufTensor {
  static constexpr std::size_t kMaxRank = 4;

  std::string_view name;
  const GgufTensorType* type = nullptr;
  std::array<std::size_t, kMaxRank> dims{};  // slowest first, unlike in the file
  std::size_t rank = 0;
  std::size_t values = 1;            // the dims' product, never 0
  std::span<const std::byte> bytes;  // whole blocks of the type; at a multiple of the file's alignment

  std::span<const std::size_t> shape() const { return {dims.data(), rank}; }
};

// A GGUF file of version 2 or 3, little-endian. All it says is checked when it is opened: no offset or count in it can
// make a later read leave the mapping. Immutable, so any number of threads may read it; views stay valid while it
// lives.
//
// Whatever is wrong with a file is a std::runtime_error of one line that begins with the path.
class GgufFile {
 public:
  explicit GgufFile(std::string path);
  // Reads bytes that the caller keeps; `path` is for messages.
  GgufFile(std::string path, std::span<const std::byte> bytes);

  const std::string& path() const { return path_; }
  std::uint32_t version() const { return version_; }
  std::size_t alignment() const { return alignment_; }

  // In the file's order; no two have the same name.
  std::span<const GgufEntry> metadata() const { return metadata_; }
  std::span<const GgufTensor> tensors() const { return tensors_; }
  // nullptr where there is none of that name. Logarithmic.
  const GgufValue* find(std::string_view key) const noexcept;
  const GgufTensor* find_tensor(std::string_view name) const noexcept;

  // Writes a tensor's values to `out`, in the order of its shape. Throws std::runtime_error for a type that is not
  // decoded, std::invalid_argument where `out` has another number of elements.
  void dequantize(const GgufTensor& tensor, std::span<float> out) const;

  // See MappedFile.
  void release_pages() const noexcept { mapped_.release_pages(); }

 private:
  void parse(std::span<const std::byte> bytes);

  std::string path_;
  MappedFile mapped_;
  std::uint32_t version_ = 0;
  std::size_t alignment_ = 32;
  std::vector<GgufEntry> metadata_;
  std::vector<GgufTensor> tensors_;
  // Positions of the two above, by name.
  std::vector<std::size_t> metadata_by_name_;
  std::vector<std::size_t> tensors_by_name_;
};

}  // namespace rts
