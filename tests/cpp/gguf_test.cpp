#include "rts/gguf.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <stdexcept>
#include <utility>

#include "gguf_bytes.hpp"

#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace rts {
namespace {

using namespace std::string_literals;
using testing::array;
using testing::GgufBytes;
using testing::le;
using testing::text;
using testing::u32;
using testing::u64;
using Type = GgufValueType;

constexpr std::uint32_t kF32 = 0;
constexpr std::uint32_t kQ4_0 = 2;
constexpr std::uint32_t kIQ4_NL = 20;

// Opens it from memory of just its size, as "m.gguf".
class Opened {
 public:
  explicit Opened(const std::string& bytes) : bytes_(bytes.begin(), bytes.end()) {}
  explicit Opened(const GgufBytes& bytes) : Opened(bytes.file()) {}
  const GgufFile* operator->() const { return &file_; }

 private:
  std::vector<char> bytes_;
  GgufFile file_{"m.gguf", std::as_bytes(std::span(bytes_))};
};

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

std::string error_of(const std::string& bytes) {
  return error_of([&] { Opened{bytes}; });
}

std::vector<float> dequantized(const GgufFile& file, std::string_view name) {
  const GgufTensor* const tensor = file.find_tensor(name);
  std::vector<float> out(tensor->values);
  file.dequantize(*tensor, out);
  return out;
}

// A scratch directory of the running test.
class GgufOnDisk : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "rts_gguf_XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  std::string path(const std::string& name) const { return (directory_ / name).string(); }
  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path(name), std::ios::binary) << bytes;
    return path(name);
  }

 private:
  std::filesystem::path directory_;
};

TEST(GgufMetadata, HasEveryScalar) {
  const Opened file(GgufBytes{}
                        .entry("u8", Type::kUint8, le(std::uint8_t{255}))
                        .entry("i8", Type::kInt8, le(std::int8_t{-128}))
                        .entry("u16", Type::kUint16, le(std::uint16_t{65535}))
                        .entry("i16", Type::kInt16, le(std::int16_t{-32768}))
                        .entry("u32", Type::kUint32, u32(4294967295))
                        .entry("i32", Type::kInt32, le(std::int32_t{-2147483647}))
                        .entry("f32", Type::kFloat32, le(0.1F))
                        .entry("yes", Type::kBool, "\1")
                        .entry("no", Type::kBool, "\0"s)
                        .entry("str", Type::kString, text("a\0\xFF"s))
                        .entry("u64", Type::kUint64, u64(std::numeric_limits<std::uint64_t>::max()))
                        .entry("i64", Type::kInt64, le(std::numeric_limits<std::int64_t>::min()))
                        .entry("f64", Type::kFloat64, le(0.1)));
  EXPECT_EQ(std::get<std::uint8_t>(*file->find("u8")), 255);
  EXPECT_EQ(std::get<std::int8_t>(*file->find("i8")), -128);
  EXPECT_EQ(std::get<std::uint16_t>(*file->find("u16")), 65535);
  EXPECT_EQ(std::get<std::int16_t>(*file->find("i16")), -32768);
  EXPECT_EQ(std::get<std::uint32_t>(*file->find("u32")), 4294967295);
  EXPECT_EQ(std::get<std::int32_t>(*file->find("i32")), -2147483647);
  EXPECT_EQ(std::get<float>(*file->find("f32")), 0.1F);
  EXPECT_TRUE(std::get<bool>(*file->find("yes")));
  EXPECT_FALSE(std::get<bool>(*file->find("no")));
  EXPECT_EQ(std::get<std::string_view>(*file->find("str")), "a\0\xFF"s);
  EXPECT_EQ(std::get<std::uint64_t>(*file->find("u64")), std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(std::get<std::int64_t>(*file->find("i64")), std::numeric_limits<std::int64_t>::min());
  EXPECT_EQ(std::get<double>(*file->find("f64")), 0.1);
  EXPECT_EQ(file->find("u"), nullptr);
  EXPECT_EQ(file->find("zzz"), nullptr);
}

TEST(GgufMetadata, KeepsTheFilesOrder) {
  const Opened file(
      GgufBytes{}.entry("b", Type::kBool, "\1").entry("", Type::kBool, "\1").entry("a", Type::kBool, "\1"));
  ASSERT_EQ(file->metadata().size(), 3U);
  EXPECT_EQ(file->metadata()[0].name, "b");
  EXPECT_EQ(file->metadata()[1].name, "");
  EXPECT_EQ(file->metadata()[2].name, "a");
}

TEST(GgufMetadata, ArraysAreVisitedInOrder) {
  const Opened file(
      GgufBytes{}
          .entry("numbers", Type::kArray, array(Type::kInt16, {le(std::int16_t{-1}), le(std::int16_t{7})}))
          .entry("strings", Type::kArray, array(Type::kString, {text("one"), text(""), text("three")}))
          .entry("empty", Type::kArray, array(Type::kFloat64, {})));
  const auto& numbers = std::get<GgufArray>(*file->find("numbers"));
  EXPECT_EQ(numbers.element_type, Type::kInt16);
  EXPECT_EQ(numbers.size, 2U);
  std::vector<std::int16_t> seen;
  for (const GgufValue& value : numbers) seen.push_back(std::get<std::int16_t>(value));
  EXPECT_EQ(seen, (std::vector<std::int16_t>{-1, 7}));

  std::vector<std::string> strings;
  for (const GgufValue& value : std::get<GgufArray>(*file->find("strings"))) {
    strings.emplace_back(std::get<std::string_view>(value));
  }
  EXPECT_EQ(strings, (std::vector<std::string>{"one", "", "three"}));

  const auto& empty = std::get<GgufArray>(*file->find("empty"));
  EXPECT_TRUE(empty.begin() == empty.end());
}

std::string nested(int depth) {
  std::string value = array(Type::kUint8, {"\x05", "\x06"});
  for (; depth > 1; --depth) value = array(Type::kArray, {value});
  return value;
}

TEST(GgufMetadata, ArraysNestEightDeep) {
  const Opened file(GgufBytes{}.entry("a", Type::kArray, nested(8)).entry("behind", Type::kBool, "\1"));
  GgufValue value = *file->find("a");
  for (int depth = 1; depth < 8; ++depth) {
    const GgufArray outer = std::get<GgufArray>(value);
    ASSERT_EQ(outer.size, 1U);
    value = *outer.begin();
  }
  const auto& innermost = std::get<GgufArray>(value);
  EXPECT_EQ(innermost.size, 2U);
  EXPECT_EQ(innermost.elements.size(), 2U);
  EXPECT_EQ(std::get<std::uint8_t>(*innermost.begin()), 5);
  EXPECT_NE(file->find("behind"), nullptr);
}

TEST(GgufTensors, LieWhereTheFileSays) {
  const Opened file(GgufBytes{.version = 2}
                        .tensor("matrix", {3, 2}, GgufTypeId::kF32, std::string(24, 'm'))
                        .tensor("all", {2, 3, 1, 2}, GgufTypeId::kF16, std::string(24, 'a'))
                        .tensor("scalar", {}, GgufTypeId::kF32, "scal"));
  EXPECT_EQ(file->version(), 2U);
  EXPECT_EQ(file->alignment(), 32U);
  ASSERT_EQ(file->tensors().size(), 3U);
  const GgufTensor& matrix = file->tensors()[0];
  EXPECT_EQ(matrix.name, "matrix");
  EXPECT_EQ(matrix.type->name, "F32");
  EXPECT_EQ(matrix.values, 6U);
  EXPECT_EQ(std::vector(matrix.shape().begin(), matrix.shape().end()), (std::vector<std::size_t>{2, 3}));
  ASSERT_EQ(matrix.bytes.size(), 24U);
  EXPECT_EQ(matrix.bytes[0], std::byte{'m'});
  EXPECT_EQ(matrix.bytes[23], std::byte{'m'});

  const GgufTensor& all = *file->find_tensor("all");
  EXPECT_EQ(std::vector(all.shape().begin(), all.shape().end()), (std::vector<std::size_t>{2, 1, 3, 2}));
  EXPECT_EQ(all.bytes.data(), matrix.bytes.data() + 32);

  const GgufTensor& scalar = *file->find_tensor("scalar");
  EXPECT_TRUE(scalar.shape().empty());
  EXPECT_EQ(scalar.bytes.size(), 4U);
  EXPECT_EQ(file->find_tensor("matri"), nullptr);
}

TEST(GgufTensors, FollowTheFilesAlignment) {
  GgufBytes bytes{.alignment = 128};
  bytes.entry("general.alignment", Type::kUint32, u32(128));
  bytes.tensor("a", {1}, GgufTypeId::kF32, le(1.5F)).tensor("b", {1}, GgufTypeId::kF32, le(2.5F));
  const Opened file(bytes);
  EXPECT_EQ(file->alignment(), 128U);
  EXPECT_EQ(file->find_tensor("b")->bytes.data() - file->find_tensor("a")->bytes.data(), 128);
  EXPECT_EQ(dequantized(*file.operator->(), "b"), std::vector{2.5F});
}

TEST(GgufTensors, MayLieInAnyOrder) {
  GgufBytes bytes;
  bytes.tensor_at(32, "second", {1}, kF32).tensor_at(0, "first", {1}, kF32);
  bytes.data = le(1.0F) + std::string(28, '\0') + le(2.0F);
  const Opened file(bytes);
  EXPECT_EQ(dequantized(*file.operator->(), "first"), std::vector{1.0F});
  EXPECT_EQ(dequantized(*file.operator->(), "second"), std::vector{2.0F});
}

constexpr std::uint16_t kHalfOne = 0x3C00;
constexpr std::uint16_t kHalfMinusTwo = 0xC000;

std::vector<float> decoded(GgufTypeId type, std::uint64_t values, const std::string& bytes) {
  const Opened file(GgufBytes{}.tensor("t", {values}, type, bytes));
  return dequantized(*file.operator->(), "t");
}

// Low halves 0, 1, … 15, high halves 15, 14, … 0.
std::string nibbles() {
  std::string bytes;
  for (int i = 0; i < 16; ++i) bytes += static_cast<char>((15 - i) << 4 | i);
  return bytes;
}

TEST(GgufDequantize, FourBits) {
  const auto symmetric = decoded(GgufTypeId::kQ4_0, 64, le(kHalfMinusTwo) + nibbles() + le(kHalfOne) + nibbles());
  const auto affine = decoded(GgufTypeId::kQ4_1, 64, le(kHalfOne) + le(kHalfMinusTwo) + nibbles() + u32(0) + nibbles());
  for (std::size_t i = 0; i < 32; ++i) {
    const auto stored = static_cast<float>(i < 16 ? i : 31 - i);
    EXPECT_EQ(symmetric[i], -2 * (stored - 8));
    EXPECT_EQ(symmetric[i + 32], stored - 8);
    EXPECT_EQ(affine[i], stored - 2);
    EXPECT_EQ(affine[i + 32], 0);
  }
  EXPECT_TRUE(std::signbit(symmetric[8])) << "-2 x 0";
}

TEST(GgufDequantize, EightBits) {
  std::string values;
  for (int i = 0; i < 32; ++i) values += static_cast<char>(i * 8 - 128);
  const auto out = decoded(GgufTypeId::kQ8_0, 32, le(kHalfMinusTwo) + values);
  for (int i = 0; i < 32; ++i) EXPECT_EQ(out[static_cast<std::size_t>(i)], -2.0F * static_cast<float>(i * 8 - 128));
}

// The block types of which a value's bits lie apart, and where.
struct Spread {
  GgufTypeId type;
  std::size_t values;
  std::size_t scale_at;
  std::size_t scales;  // 2 with a minimum
  std::size_t stored_at;
  std::size_t stored_bytes;
  std::size_t bits;
};
constexpr Spread kSpread[] = {
    {GgufTypeId::kQ5_0, 32, 0, 1, 2, 20, 5},     {GgufTypeId::kQ5_1, 32, 0, 2, 4, 20, 5},
    {GgufTypeId::kQ2_K, 256, 80, 2, 16, 64, 2},  {GgufTypeId::kQ3_K, 256, 108, 1, 0, 96, 3},
    {GgufTypeId::kQ4_K, 256, 0, 2, 16, 128, 4},  {GgufTypeId::kQ5_K, 256, 0, 2, 16, 160, 5},
    {GgufTypeId::kQ6_K, 256, 208, 1, 0, 192, 6},
};

TEST(GgufDequantize, EachStoredBitBelongsToOneValue) {
  for (const Spread& spread : kSpread) {
    const GgufTensorType& type = *find_gguf_type(static_cast<std::uint32_t>(spread.type));
    SCOPED_TRACE(type.name);
    ASSERT_EQ(type.block_values, spread.values);
    std::string block(type.block_bytes, '\xFF');  // so that no group has a share of 0 of the scale
    for (std::size_t i = 0; i < spread.scales; ++i) block.replace(spread.scale_at + 2 * i, 2, le(kHalfOne));
    const auto base = decoded(spread.type, spread.values, block);
    std::vector<float> moved(spread.values);
    for (std::size_t bit = 0; bit < spread.stored_bytes * 8; ++bit) {
      std::string flipped = block;
      flipped[spread.stored_at + bit / 8] ^= static_cast<char>(1U << bit % 8);
      const auto out = decoded(spread.type, spread.values, flipped);
      const auto changed = std::ranges::mismatch(out, base);
      ASSERT_NE(changed.in1, out.end()) << "bit " << bit;
      ASSERT_TRUE(std::equal(changed.in1 + 1, out.end(), changed.in2 + 1)) << "bit " << bit;
      moved[static_cast<std::size_t>(changed.in1 - out.begin())] += std::abs(*changed.in1 - *changed.in2);
    }
    // Bits of 1, 2, 4, … times the group's scale.
    for (std::size_t i = 0; i < spread.values; ++i) {
      EXPECT_GT(moved[i], 0) << i;
      EXPECT_EQ(std::fmod(moved[i], (1U << spread.bits) - 1), 0) << i;
    }
  }
}

TEST(GgufDequantize, Floats) {
  EXPECT_EQ(decoded(GgufTypeId::kF32, 2, le(0.1F) + le(-1e-45F)), (std::vector{0.1F, -1e-45F}));
  EXPECT_EQ(decoded(GgufTypeId::kBF16, 2, le(std::uint16_t{0x3F80}) + le(std::uint16_t{0x8001})),
            (std::vector{1.0F, std::bit_cast<float>(0x80010000U)}));
}

// What the bits mean, by the definition.
float half_by_definition(unsigned half) {
  const unsigned exponent = half >> 10 & 31;
  const unsigned fraction = half & 1023;
  if (exponent == 31) return std::bit_cast<float>((half & 0x8000U) << 16 | 0x7F800000U | fraction << 13);
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, int(exponent) - 25);
  return static_cast<float>((half & 0x8000U) != 0 ? -magnitude : magnitude);
}

std::string all_halves() {
  std::string bytes;
  for (unsigned half = 0; half < 65536; ++half) bytes += le(static_cast<std::uint16_t>(half));
  return bytes;
}

TEST(GgufDequantize, EveryHalf) {
  const auto out = decoded(GgufTypeId::kF16, 65536, all_halves());
  for (unsigned half = 0; half < 65536; ++half) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(out[half]), std::bit_cast<std::uint32_t>(half_by_definition(half))) << half;
  }
}

#ifdef __SSE__
TEST(GgufDequantize, DoesNotDependOnTheThreadsDenormalMode) {
  constexpr unsigned kFlushToZero = 0x8000;
  constexpr unsigned kDenormalsAreZero = 0x40;
  const std::string bytes = all_halves();
  const auto expected = decoded(GgufTypeId::kF16, 65536, bytes);
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | kFlushToZero | kDenormalsAreZero);
  const auto out = decoded(GgufTypeId::kF16, 65536, bytes);
  _mm_setcsr(mode);
  for (unsigned half = 0; half < 65536; ++half) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(out[half]), std::bit_cast<std::uint32_t>(expected[half])) << half;
  }
}
#endif

TEST(GgufDequantize, RefusesATypeByName) {
  const Opened file(GgufBytes{}.tensor("t", {32}, kIQ4_NL, std::string(18, 'x')));
  const GgufTensor& tensor = *file->find_tensor("t");
  EXPECT_EQ(tensor.type->name, "IQ4_NL");
  EXPECT_EQ(tensor.bytes.size(), 18U);
  std::vector<float> out(32);
  EXPECT_EQ(error_of([&] { file->dequantize(tensor, out); }),
            "m.gguf: tensor 't': its type IQ4_NL cannot be decoded; supported: F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, "
            "Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, BF16");
}

TEST(GgufDequantize, NeedsRoomForEachValue) {
  const Opened file(GgufBytes{}.tensor("t", {2}, GgufTypeId::kF32, u64(0)));
  std::vector<float> out(3);
  EXPECT_THROW(file->dequantize(*file->find_tensor("t"), out), std::invalid_argument);
}

struct Case {
  const char* name;
  std::string bytes;
  std::string message;  // behind the path
};

std::string case_name(const ::testing::TestParamInfo<Case>& info) {
  return info.param.name;
}

class CorruptGguf : public ::testing::TestWithParam<Case> {};

TEST_P(CorruptGguf, IsNamed) {
  EXPECT_EQ(error_of(GetParam().bytes), "m.gguf: " + GetParam().message);
}

std::string with_alignment(Type type, const std::string& value) {
  return GgufBytes{}.entry("general.alignment", type, value).file();
}

std::string with_tensor(const std::vector<std::uint64_t>& dims, std::uint32_t type, std::size_t data_bytes = 64,
                        std::uint64_t offset = 0) {
  GgufBytes bytes;
  bytes.tensor_at(offset, "t", dims, type);
  bytes.data = std::string(data_bytes, '\0');
  return bytes.file();
}

std::string with_two(const char* first, const char* second, std::uint64_t second_offset) {
  GgufBytes bytes;
  bytes.tensor_at(second_offset, second, {16}, kF32).tensor_at(0, first, {9}, kF32);
  bytes.data = std::string(256, '\0');
  return bytes.file();
}

const std::string kOverflow = "tensor 't': the product of its dimensions overflows";

INSTANTIATE_TEST_SUITE_P(
    Header, CorruptGguf,
    ::testing::Values(
        Case{"Magic", GgufBytes{.magic = "GGML"}.file(), "not a GGUF file: it does not begin with 'GGUF'"},
        Case{"ShorterThanMagic", "GGU", "not a GGUF file: it does not begin with 'GGUF'"},
        Case{"Version1", GgufBytes{.version = 1}.file(), "GGUF version 1 is not supported; versions 2 and 3 are"},
        Case{"Version4", GgufBytes{.version = 4}.file(), "GGUF version 4 is not supported; versions 2 and 3 are"},
        Case{"Version0", GgufBytes{.version = 0}.file(), "GGUF version 0 is not supported; versions 2 and 3 are"},
        Case{"BigEndian", GgufBytes{.version = 0x03000000}.file(),
             "the file is big-endian; convert it to little-endian"},
        Case{"CutOff", GgufBytes{}.file().substr(0, 20), "the file ends too early: 8 bytes needed, 4 left"},
        Case{"EntryCount", GgufBytes{.entry_count = std::uint64_t{1} << 60}.file(),
             "it claims 1152921504606846976 metadata entries, more than the 0 bytes behind its header can hold"},
        Case{"TensorCount", GgufBytes{.tensor_count = 2}.file() + std::string(47, '\0'),
             "it claims 2 tensors, more than the 47 bytes behind its header can hold"}),
    case_name);

INSTANTIATE_TEST_SUITE_P(
    Metadata, CorruptGguf,
    ::testing::Values(
        Case{"KeyPastTheEnd", GgufBytes{.entry_count = 1, .entries = u64(6) + std::string(5, 'k')}.file(),
             "metadata entry 1 of 1: the file ends too early: 6 bytes needed, 5 left"},
        Case{"HugeKey", GgufBytes{.entry_count = 1, .entries = u64(~std::uint64_t{0}) + "kkkkk"}.file(),
             "metadata entry 1 of 1: the file ends too early: 18446744073709551615 bytes needed, 5 left"},
        Case{"SecondEntryMissing",
             GgufBytes{}.entry("a", Type::kString, text(std::string(13, 'x'))).file().replace(16, 1, "\2"),
             "metadata entry 2 of 2: the file ends too early: 8 bytes needed, 0 left"},
        Case{"StringPastTheEnd", GgufBytes{}.entry("k", Type::kString, u64(10) + "short").file(),
             "metadata key 'k': the file ends too early: 10 bytes needed, 5 left"},
        Case{"NumberPastTheEnd", GgufBytes{}.entry("k", Type::kUint64, u32(1)).file(),
             "metadata key 'k': the file ends too early: 8 bytes needed, 4 left"},
        Case{"ArrayPastTheEnd", GgufBytes{}.entry("k", Type::kArray, le(Type::kInt32) + u64(3) + u64(0)).file(),
             "metadata key 'k': an array claims 3 elements, more than the 8 bytes left can hold"},
        Case{"HugeArray", GgufBytes{}.entry("k", Type::kArray, le(Type::kInt64) + u64(std::uint64_t{1} << 61)).file(),
             "metadata key 'k': an array claims 2305843009213693952 elements, more than the 0 bytes left can hold"},
        Case{"HugeArrayOfStrings", GgufBytes{}.entry("k", Type::kArray, le(Type::kString) + u64(1000) + u64(0)).file(),
             "metadata key 'k': an array claims 1000 elements, more than the 8 bytes left can hold"},
        Case{"ArrayElementPastTheEnd",
             GgufBytes{}.entry("k", Type::kArray, array(Type::kString, {text("a"), u64(2)})).file(),
             "metadata key 'k': the file ends too early: 2 bytes needed, 0 left"},
        Case{"NestedTooDeep", GgufBytes{}.entry("k", Type::kArray, nested(9)).file(),
             "metadata key 'k': arrays are nested deeper than 8"},
        Case{"ValueType", GgufBytes{}.entry("k", Type{13}, u64(0)).file(),
             "metadata key 'k': value type 13 is unknown"},
        Case{"ElementType", GgufBytes{}.entry("k", Type::kArray, u32(99) + u64(0)).file(),
             "metadata key 'k': value type 99 is unknown"},
        Case{"Bool", GgufBytes{}.entry("k", Type::kBool, "\2").file(),
             "metadata key 'k': a bool is 2, neither 0 nor 1"},
        Case{"BoolInArray", GgufBytes{}.entry("k", Type::kArray, array(Type::kBool, {"\1", "\xFF"})).file(),
             "metadata key 'k': a bool is 255, neither 0 nor 1"},
        Case{"SameKeyTwice",
             GgufBytes{}
                 .entry("k", Type::kBool, "\1")
                 .entry("other", Type::kBool, "\1")
                 .entry("k", Type::kUint32, u32(1))
                 .file(),
             "metadata key 'k' occurs twice"},
        Case{"UnprintableKey", GgufBytes{}.entry("a\n\xFF" + std::string(100, 'x'), Type::kBool, "\2").file(),
             "metadata key 'a??" + std::string(77, 'x') + "...': a bool is 2, neither 0 nor 1"},
        Case{"AlignmentZero", with_alignment(Type::kUint32, u32(0)), "general.alignment is 0, not a power of two"},
        Case{"AlignmentNoPower", with_alignment(Type::kUint32, u32(48)), "general.alignment is 48, not a power of two"},
        Case{"AlignmentType", with_alignment(Type::kUint64, u64(32)), "general.alignment is no uint32"}),
    case_name);

INSTANTIATE_TEST_SUITE_P(
    Tensors, CorruptGguf,
    ::testing::Values(
        Case{"NamePastTheEnd", GgufBytes{.tensor_count = 1, .tensors = u64(17) + std::string(16, 'n')}.file(),
             "tensor 1 of 1: the file ends too early: 17 bytes needed, 16 left"},
        Case{"InfoPastTheEnd", GgufBytes{.tensor_count = 1, .tensors = text("t") + u32(2) + u64(1) + u32(1)}.file(),
             "tensor 't': the file ends too early: 8 bytes needed, 4 left"},
        Case{"FiveDimensions", with_tensor({1, 1, 1, 1, 1}, kF32),
             "tensor 't': it has 5 dimensions; at most 4 are supported"},
        Case{"EmptyDimension", with_tensor({4, 0}, kF32), "tensor 't': a dimension is 0"},
        Case{"DimensionsOverflow", with_tensor({std::uint64_t{1} << 32, std::uint64_t{1} << 32}, kF32), kOverflow},
        Case{"DimensionsOverflowToSmall", with_tensor({(std::uint64_t{1} << 62) + 1, 4}, kF32), kOverflow},
        Case{"BytesOverflow", with_tensor({std::uint64_t{1} << 62}, kF32), kOverflow},
        Case{"UnknownType", with_tensor({1}, 1000), "tensor 't': its type 1000 is unknown"},
        Case{"RemovedType", with_tensor({32}, 4), "tensor 't': its type 4 is unknown"},
        Case{"RowNoMultiple", with_tensor({48, 2}, kQ4_0),
             "tensor 't': its rows have 48 values, no multiple of the 32 in a block of Q4_0"},
        Case{"ScalarOfBlocks", with_tensor({}, kQ4_0),
             "tensor 't': its rows have 1 values, no multiple of the 32 in a block of Q4_0"},
        Case{"OffsetMisaligned", with_tensor({1}, kF32, 64, 16),
             "tensor 't': its offset 16 is no multiple of the alignment 32"},
        Case{"OffsetPastTheEnd", with_tensor({1}, kF32, 64, 96),
             "tensor 't': its 4 bytes at offset 96 go past the end of the file, which has 64 bytes of data"},
        Case{
            "HugeOffset", with_tensor({1}, kF32, 64, ~std::uint64_t{31}),
            "tensor 't': its 4 bytes at offset 18446744073709551584 go past the end of the file, which has 64 bytes of "
            "data"},
        Case{"DataCutOff", with_tensor({16, 2}, kF32, 127),
             "tensor 't': its 128 bytes at offset 0 go past the end of the file, which has 127 bytes of data"},
        Case{"NoData", with_tensor({1}, kF32, 0),
             "tensor 't': its 4 bytes at offset 0 go past the end of the file, which has 0 bytes of data"},
        Case{"Overlap", with_two("first", "second", 32), "tensors 'first' and 'second' overlap"},
        Case{"SamePlace", with_two("a", "b", 0), "tensors 'b' and 'a' overlap"},
        Case{"SameNameTwice", with_two("t", "t", 64), "tensor 't' occurs twice"}),
    case_name);

TEST_F(GgufOnDisk, IsMapped) {
  const std::string name = write(
      "m.gguf",
      GgufBytes{}.entry("k", Type::kString, text("v")).tensor("t", {2}, GgufTypeId::kF32, le(1.0F) + le(2.0F)).file());
  GgufFile first(name);
  const std::byte* const bytes = first.find_tensor("t")->bytes.data();
  const GgufFile file(std::move(first));
  std::filesystem::remove(name);
  EXPECT_EQ(file.path(), name);
  EXPECT_EQ(file.find_tensor("t")->bytes.data(), bytes);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(bytes) % 32, 0U);
  EXPECT_EQ(std::get<std::string_view>(*file.find("k")), "v");
  EXPECT_EQ(dequantized(file, "t"), (std::vector{1.0F, 2.0F}));
}

TEST_F(GgufOnDisk, ErrorsBeginWithThePath) {
  const std::string name = write("m.gguf", GgufBytes{.version = 9}.file());
  EXPECT_EQ(error_of([&] { GgufFile{name}; }), name + ": GGUF version 9 is not supported; versions 2 and 3 are");
}

TEST_F(GgufOnDisk, RefusesWhatIsNoFile) {
  EXPECT_EQ(error_of([&] { GgufFile{path("missing")}; }), path("missing") + ": cannot open: No such file or directory");
  EXPECT_EQ(error_of([&] { GgufFile{path("")}; }), path("") + ": is a directory, not a file");
  const std::string empty = write("empty", "");
  EXPECT_EQ(error_of([&] { GgufFile{empty}; }), empty + ": the file is empty");
  ASSERT_EQ(::mkfifo(path("fifo").c_str(), 0600), 0);
  EXPECT_EQ(error_of([&] { GgufFile{path("fifo")}; }), path("fifo") + ": is not a regular file");
}

}  // namespace
}  // namespace rts
