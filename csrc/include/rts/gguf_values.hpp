#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace rts {

// Metadata value types, by their ids in a file.
enum class GgufValueType : std::uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
};

class GgufArrayIterator;

// A metadata array as it lies in the file; its elements are decoded as they are visited.
struct GgufArray {
  GgufValueType element_type;
  std::size_t size;
  std::span<const std::byte> elements;

  GgufArrayIterator begin() const;
  std::default_sentinel_t end() const { return {}; }
};

// Alternatives in the order of GgufValueType. Strings are any bytes: nothing ensures that they are UTF-8.
using GgufValue = std::variant<std::uint8_t, std::int8_t, std::uint16_t, std::int16_t, std::uint32_t, std::int32_t,
                               float, bool, std::string_view, GgufArray, std::uint64_t, std::int64_t, double>;

class GgufArrayIterator {
 public:
  using value_type = GgufValue;
  using difference_type = std::ptrdiff_t;

  explicit GgufArrayIterator(const GgufArray& array);

  const GgufValue& operator*() const { return value_; }
  GgufArrayIterator& operator++();
  void operator++(int) { ++*this; }
  bool operator==(std::default_sentinel_t) const { return done_; }

 private:
  GgufArray rest_;  // behind value_
  GgufValue value_;
  bool done_ = false;
};

inline GgufArrayIterator GgufArray::begin() const {
  return GgufArrayIterator(*this);
}

// What is wrong with a file, without where.
struct GgufCorrupt {
  std::string what;
};

// Takes what a file has, from front to back. Throws GgufCorrupt where that ends too early.
class GgufCursor {
 public:
  explicit GgufCursor(std::span<const std::byte> bytes) : bytes_(bytes) {}

  std::size_t at() const { return at_; }
  std::size_t left() const { return bytes_.size() - at_; }

  std::span<const std::byte> take_bytes(std::size_t count);

  template <typename Number>
  Number take() {
    Number number;
    std::memcpy(&number, take_bytes(sizeof number).data(), sizeof number);
    return number;
  }

  std::string_view take_string() {
    const auto size = take<std::uint64_t>();
    const auto bytes = take_bytes(size);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  std::span<const std::byte> rest() const { return bytes_.subspan(at_); }

 private:
  std::span<const std::byte> bytes_;
  std::size_t at_ = 0;
};

// Throws GgufCorrupt for what is no value of the type, an unknown type and arrays nested deeper than 8.
GgufValue take_gguf_value(GgufCursor& from, GgufValueType type);

}  // namespace rts
