#include "rts/gguf_values.hpp"

#include <algorithm>
#include <bit>

namespace rts {
namespace {

static_assert(std::endian::native == std::endian::little && sizeof(std::size_t) == sizeof(std::uint64_t));

constexpr unsigned kMaxArrayDepth = 8;

void check_bool(std::byte value) {
  if (value > std::byte{1}) {
    throw GgufCorrupt{"a bool is " + std::to_string(std::to_integer<int>(value)) + ", neither 0 nor 1"};
  }
}

[[noreturn]] void fail_unknown(GgufValueType type) {
  throw GgufCorrupt{"value type " + std::to_string(static_cast<std::uint32_t>(type)) + " is unknown"};
}

// Of an array's elements. For strings and arrays the least that one has.
std::size_t element_bytes(GgufValueType type) {
  switch (type) {
    case GgufValueType::kUint8:
    case GgufValueType::kInt8:
    case GgufValueType::kBool:
      return 1;
    case GgufValueType::kUint16:
    case GgufValueType::kInt16:
      return 2;
    case GgufValueType::kUint32:
    case GgufValueType::kInt32:
    case GgufValueType::kFloat32:
      return 4;
    case GgufValueType::kUint64:
    case GgufValueType::kInt64:
    case GgufValueType::kFloat64:
      return 8;
    case GgufValueType::kString:
      return sizeof(std::uint64_t);  // its size
    case GgufValueType::kArray:
      return sizeof(std::uint32_t) + sizeof(std::uint64_t);  // its elements' type, its size
  }
  fail_unknown(type);
}

GgufValue take_value(GgufCursor& from, GgufValueType type, unsigned depth);

GgufArray take_array(GgufCursor& from, unsigned depth) {
  if (depth > kMaxArrayDepth) throw GgufCorrupt{"arrays are nested deeper than " + std::to_string(kMaxArrayDepth)};
  const auto type = from.take<GgufValueType>();
  const std::size_t bytes = element_bytes(type);
  const auto size = from.take<std::uint64_t>();
  if (size > from.left() / bytes) {
    throw GgufCorrupt{"an array claims " + std::to_string(size) + " elements, more than the " +
                      std::to_string(from.left()) + " bytes left can hold"};
  }
  const auto start = from.rest();
  if (type == GgufValueType::kString || type == GgufValueType::kArray) {
    for (std::size_t i = 0; i < size; ++i) take_value(from, type, depth);
  } else {
    const auto elements = from.take_bytes(size * bytes);
    if (type == GgufValueType::kBool) std::ranges::for_each(elements, check_bool);
  }
  return {type, size, start.first(start.size() - from.left())};
}

GgufValue take_value(GgufCursor& from, GgufValueType type, unsigned depth) {
  switch (type) {
    case GgufValueType::kUint8:
      return from.take<std::uint8_t>();
    case GgufValueType::kInt8:
      return from.take<std::int8_t>();
    case GgufValueType::kUint16:
      return from.take<std::uint16_t>();
    case GgufValueType::kInt16:
      return from.take<std::int16_t>();
    case GgufValueType::kUint32:
      return from.take<std::uint32_t>();
    case GgufValueType::kInt32:
      return from.take<std::int32_t>();
    case GgufValueType::kFloat32:
      return from.take<float>();
    case GgufValueType::kBool: {
      const auto value = from.take<std::byte>();
      check_bool(value);
      return value != std::byte{0};
    }
    case GgufValueType::kString:
      return from.take_string();
    case GgufValueType::kArray:
      return take_array(from, depth + 1);
    case GgufValueType::kUint64:
      return from.take<std::uint64_t>();
    case GgufValueType::kInt64:
      return from.take<std::int64_t>();
    case GgufValueType::kFloat64:
      return from.take<double>();
  }
  fail_unknown(type);
}

}  // namespace

std::span<const std::byte> GgufCursor::take_bytes(std::size_t count) {
  if (count > left()) {
    throw GgufCorrupt{"the file ends too early: " + std::to_string(count) + " bytes needed, " + std::to_string(left()) +
                      " left"};
  }
  return bytes_.subspan(std::exchange(at_, at_ + count), count);
}

GgufValue take_gguf_value(GgufCursor& from, GgufValueType type) {
  return take_value(from, type, 0);
}

GgufArrayIterator::GgufArrayIterator(const GgufArray& array) : rest_(array) {
  ++*this;
}

GgufArrayIterator& GgufArrayIterator::operator++() {
  if (rest_.size == 0) {
    done_ = true;
    return *this;
  }
  GgufCursor from(rest_.elements);
  value_ = take_gguf_value(from, rest_.element_type);
  rest_ = {rest_.element_type, rest_.size - 1, from.rest()};
  return *this;
}

}  // namespace rts
