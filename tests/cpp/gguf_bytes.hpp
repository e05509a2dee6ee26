#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "rts/gguf.hpp"

namespace rts::testing {

template <typename Number>
std::string le(Number number) {
  std::string bytes(sizeof number, '\0');
  std::memcpy(bytes.data(), &number, sizeof number);
  return bytes;
}

inline std::string u32(std::uint32_t number) {
  return le(number);
}

inline std::string u64(std::uint64_t number) {
  return le(number);
}

inline std::string text(std::string_view bytes) {
  return u64(bytes.size()) + std::string(bytes);
}

inline std::string array(GgufValueType type, std::initializer_list<std::string> elements) {
  std::string bytes = le(type) + u64(elements.size());
  for (const std::string& element : elements) bytes += element;
  return bytes;
}

// A GGUF file in pieces, each of which may be wrong.
struct GgufBytes {
  std::string magic = "GGUF";
  std::uint32_t version = 3;
  std::uint64_t tensor_count = 0;
  std::uint64_t entry_count = 0;
  std::string entries{};
  std::string tensors{};
  std::string data{};
  std::size_t alignment = 32;

  GgufBytes& entry(std::string_view name, GgufValueType type, std::string_view value) {
    ++entry_count;
    entries += text(name) + le(type) + std::string(value);
    return *this;
  }

  // Dimensions as the file has them, fastest first.
  GgufBytes& tensor_at(std::uint64_t offset, std::string_view name, const std::vector<std::uint64_t>& dims,
                       std::uint32_t type) {
    ++tensor_count;
    tensors += text(name) + u32(static_cast<std::uint32_t>(dims.size()));
    for (const std::uint64_t dim : dims) tensors += u64(dim);
    tensors += u32(type) + u64(offset);
    return *this;
  }
  // With its bytes, behind those of the one before.
  GgufBytes& tensor(std::string_view name, const std::vector<std::uint64_t>& dims, std::uint32_t type,
                    std::string_view bytes) {
    pad(data);
    tensor_at(data.size(), name, dims, type);
    data += bytes;
    return *this;
  }
  GgufBytes& tensor(std::string_view name, const std::vector<std::uint64_t>& dims, GgufTypeId type,
                    std::string_view bytes) {
    return tensor(name, dims, static_cast<std::uint32_t>(type), bytes);
  }

  std::string file() const {
    std::string bytes = magic + u32(version) + u64(tensor_count) + u64(entry_count) + entries + tensors;
    if (!data.empty()) pad(bytes);
    return bytes + data;
  }

 private:
  void pad(std::string& bytes) const { bytes.resize((bytes.size() + alignment - 1) / alignment * alignment); }
};

inline std::span<const std::byte> as_bytes(std::string_view bytes) {
  return std::as_bytes(std::span(bytes));
}

}  // namespace rts::testing
