// Files that are wrong in ways nobody thought of. Each is parsed in memory of just its size, so that the address
// sanitizer sees any read outside.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "gguf_bytes.hpp"
#include "rts/gguf.hpp"

namespace {
std::size_t allocated_bytes = 0;  // ever; these tests have one thread
}

// Not inlined: gcc would see one half of a pair and warn that the other does not match.
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  allocated_bytes += size;
  return std::malloc(std::max<std::size_t>(size, 1));
}
[[gnu::noinline]] void* operator new(std::size_t size) {
  if (void* const memory = operator new(size, std::nothrow)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace rts {
namespace {

using testing::array;
using testing::GgufBytes;
using testing::le;
using testing::text;
using testing::u32;
using testing::u64;
using Type = GgufValueType;

constexpr int kMutants = 40'000;
// An entry takes up 13 bytes of the file or more and 56 here, a tensor 24 and 100; vectors double as they grow.
constexpr std::size_t kAllocatedPerByte = 32;
constexpr std::size_t kAllocatedAtAll = 2'000;

// Everything that a file can hold, in as few bytes as it takes: a mutation then hits something that matters.
std::vector<std::string> seeds() {
  GgufBytes scalars{.version = 2};
  scalars.entry("u8", Type::kUint8, "\1").entry("i16", Type::kInt16, "\1\1").entry("f32", Type::kFloat32, le(1.0F));
  scalars.entry("bool", Type::kBool, "\1")
      .entry("text", Type::kString, text("some text"))
      .entry("u64", Type::kUint64, u64(1));
  GgufBytes arrays;
  const std::string strings = array(Type::kString, {text("a"), text(""), text("token")});
  arrays.entry("strings", Type::kArray, strings);
  arrays.entry("numbers", Type::kArray, array(Type::kInt32, {u32(1), u32(2), u32(3)}));
  arrays.entry("bools", Type::kArray, array(Type::kBool, {"\1", "\1"}));
  arrays.entry("nested", Type::kArray,
               array(Type::kArray, {strings, array(Type::kArray, {array(Type::kUint8, {"\1"}), strings})}));

  GgufBytes tensors{.alignment = 16};
  tensors.entry("general.alignment", Type::kUint32, u32(16));
  tensors.tensor("f32", {2, 2}, GgufTypeId::kF32, std::string(16, '\1'));
  tensors.tensor("f16", {3}, GgufTypeId::kF16, std::string(6, '\2'));
  tensors.tensor("bf16", {1, 1, 1, 2}, GgufTypeId::kBF16, std::string(4, '\3'));
  tensors.tensor("q4_0", {32, 2}, GgufTypeId::kQ4_0, std::string(36, '\4'));
  tensors.tensor("q4_1", {32}, GgufTypeId::kQ4_1, std::string(20, '\5'));
  tensors.tensor("q8_0", {32}, GgufTypeId::kQ8_0, std::string(34, '\6'));
  tensors.tensor("q5_0", {32}, GgufTypeId::kQ5_0, std::string(22, '\7'));
  tensors.tensor("q6_k", {256}, GgufTypeId::kQ6_K, std::string(210, '\7'));
  tensors.tensor("iq4_nl", {32}, 20, std::string(18, '\7'));  // not decoded
  return {scalars.file(), arrays.file(), tensors.file()};
}

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  std::string mutant(std::string bytes) {
    for (std::size_t i = below(3) + 1; i > 0 && !bytes.empty(); --i) mutate(bytes);
    return bytes;
  }

 private:
  std::size_t below(std::size_t bound) { return random_() % bound; }

  void mutate(std::string& bytes) {
    const std::size_t at = below(bytes.size());
    const std::size_t length = std::min(below(24) + 1, bytes.size() - at);
    switch (below(7)) {
      case 0:
        bytes[at] = static_cast<char>(bytes[at] ^ 1 << below(8));
        break;
      case 1:
        bytes[at] = static_cast<char>(bytes[at] + (below(2) == 0 ? 1 : -1));
        break;
      case 2:
        overwrite(bytes, at, u32(static_cast<std::uint32_t>(number())));
        break;
      case 3:
        overwrite(bytes, at, u64(number()));
        break;
      case 4:
        bytes.resize(at);
        break;
      case 5:
        bytes.erase(at, length);
        break;
      default:
        bytes.insert(below(bytes.size()), bytes.substr(at, length));
        break;
    }
  }

  // Small, or around a power of two, where sizes overflow.
  std::uint64_t number() {
    const std::uint64_t base = below(3) == 0 ? 0 : std::uint64_t{1} << below(64);
    return base + below(4) - 2;
  }

  static void overwrite(std::string& bytes, std::size_t at, const std::string& with) {
    std::copy_n(with.begin(), std::min(with.size(), bytes.size() - at),
                bytes.begin() + static_cast<std::ptrdiff_t>(at));
  }

  std::mt19937_64 random_;
};

// A sum over all bytes of it, so that each is read.
std::size_t read_all(const GgufValue& value) {
  if (const auto* const string = std::get_if<std::string_view>(&value)) {
    std::size_t sum = 0;
    for (const char c : *string) sum += static_cast<unsigned char>(c);
    return sum;
  }
  if (const auto* const array = std::get_if<GgufArray>(&value)) {
    std::size_t sum = 0;
    std::size_t visited = 0;
    for (const GgufValue& element : *array) {
      sum += read_all(element);
      ++visited;
    }
    EXPECT_EQ(visited, array->size);
    return sum;
  }
  return value.index();
}

void read_all(const GgufFile& file) {
  volatile std::size_t sum = 0;
  for (const GgufEntry& entry : file.metadata()) {
    sum = sum + read_all(entry.value);
    EXPECT_EQ(file.find(entry.name), &entry.value);
  }
  for (const GgufTensor& tensor : file.tensors()) {
    EXPECT_EQ(file.find_tensor(tensor.name), &tensor);
    if (tensor.type->dequantize == nullptr) {
      for (const std::byte byte : tensor.bytes) sum = sum + std::to_integer<std::size_t>(byte);
      continue;
    }
    std::vector<float> values(tensor.values);
    file.dequantize(tensor, values);
  }
}

// Whether it opened.
bool try_file(const std::string& bytes) {
  const std::vector<char> exact(bytes.begin(), bytes.end());
  const std::size_t before = allocated_bytes;
  const auto expect_modest = [&] {
    EXPECT_LE(allocated_bytes - before, kAllocatedAtAll + kAllocatedPerByte * bytes.size());
  };
  try {
    const GgufFile file("m.gguf", std::as_bytes(std::span(exact)));
    expect_modest();
    read_all(file);
    return true;
  } catch (const std::runtime_error& error) {
    expect_modest();
    const std::string_view message = error.what();
    EXPECT_TRUE(message.starts_with("m.gguf: ")) << message;
    EXPECT_TRUE(std::ranges::all_of(message, [](char c) { return c >= ' ' && c <= '~'; })) << message;
    return false;
  }
}

TEST(GgufFuzz, SeedsAreFiles) {
  for (const std::string& seed : seeds()) EXPECT_TRUE(try_file(seed));
}

TEST(GgufFuzz, NoPartOfAFileIsOne) {
  for (const std::string& seed : seeds()) {
    for (std::size_t size = 0; size < seed.size(); ++size) EXPECT_FALSE(try_file(seed.substr(0, size))) << size;
  }
}

TEST(GgufFuzz, MutantsOpenOrThrow) {
  const std::vector<std::string> files = seeds();
  int opened = 0;
  for (int i = 0; i < kMutants; ++i) {
    SCOPED_TRACE("mutant " + std::to_string(i));
    const auto seed = static_cast<std::uint64_t>(i);
    opened += try_file(Mutator(seed).mutant(files[seed % files.size()]));
    if (HasFailure()) break;
  }
  // Else the mutations are too gentle or too rough to find anything.
  EXPECT_GT(opened, kMutants / 20);
  EXPECT_LT(opened, kMutants / 2);
}

}  // namespace
}  // namespace rts
