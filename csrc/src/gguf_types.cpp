#include "rts/gguf_types.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

namespace rts {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read as it lies in memory");

// Each loop below is one that gcc turns into SSE4.1 (2e9 values a second and core): a constant trip count or a plain
// stride, masks for branches, and a block copied to a local first, which `out` cannot alias.

constexpr std::uint32_t kHalfInfinity = 31U << 23;  // binary16's exponents, where binary32 has its own
constexpr std::uint32_t kHalfNormal = 1U << 23;     // what is less is a denormal
constexpr std::uint32_t kRebias = (127U - 15U) << 23;

// `value` where a < b, else 0, for a and b below 2^31. gcc 12 makes a branch of a conditional, and no vector code.
inline std::uint32_t if_less(std::uint32_t a, std::uint32_t b, std::uint32_t value) {
  return value & static_cast<std::uint32_t>(static_cast<std::int32_t>(a - b) >> 31);
}

// A denormal gets the least exponent and so a leading one, which is then subtracted; all others subtract 0. Neither
// side nor the difference ever is a binary32 denormal: threads that flush those to zero get the same values.
inline float from_half(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000U) << 16;
  const std::uint32_t magnitude = (half & 0x7FFFU) << 13;
  const std::uint32_t minuend = magnitude + kRebias + if_less(magnitude, kHalfNormal, kHalfNormal);
  const std::uint32_t subtrahend = if_less(magnitude, kHalfNormal, kRebias + kHalfNormal);
  const float finite = std::bit_cast<float>(minuend) - std::bit_cast<float>(subtrahend);
  const std::uint32_t to_infinity = if_less(kHalfInfinity - 1, magnitude, kRebias);
  return std::bit_cast<float>(sign | (std::bit_cast<std::uint32_t>(finite) + to_infinity));
}

// The 16-bit values, and what the bits of one are as a float.
template <typename Convert>
inline void convert_words(const std::byte* from, std::size_t count, float* out, Convert convert) {
  for (std::size_t i = 0; i < count; ++i) {
    std::uint16_t word;
    std::memcpy(&word, from + i * sizeof word, sizeof word);
    out[i] = convert(word);
  }
}

void dequantize_f32(const std::byte* from, std::size_t blocks, float* out) noexcept {
  std::memcpy(out, from, blocks * sizeof(float));
}

void dequantize_f16(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_words(from, blocks, out, [](std::uint16_t half) { return from_half(half); });
}

void dequantize_bf16(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_words(from, blocks, out,
                [](std::uint16_t upper) { return std::bit_cast<float>(static_cast<std::uint32_t>(upper) << 16); });
}

constexpr std::size_t kBlock = 32;

// The low halves of a block's bytes are its first 16 values, the high halves the others.
struct BlockQ4_0 {
  std::uint16_t scale;
  std::uint8_t pairs[kBlock / 2];
};
struct BlockQ4_1 {
  std::uint16_t scale;
  std::uint16_t minimum;
  std::uint8_t pairs[kBlock / 2];
};
struct BlockQ8_0 {
  std::uint16_t scale;
  std::int8_t values[kBlock];
};
static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ8_0) == 34);

template <typename Block, typename Decode>
inline void convert_blocks(const std::byte* from, std::size_t blocks, float* out, Decode decode) {
  for (std::size_t i = 0; i < blocks; ++i) {
    Block block;
    std::memcpy(&block, from + i * sizeof block, sizeof block);
    decode(block, out + i * kBlock);
  }
}

// scale × value is exact (11 bits × at most 8), so a compiler that fuses the addition changes nothing.

void dequantize_q4_0(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_blocks<BlockQ4_0>(from, blocks, out, [](const BlockQ4_0& block, float* values) {
    const float scale = from_half(block.scale);
    for (std::size_t i = 0; i < kBlock / 2; ++i) {
      values[i] = scale * static_cast<float>((block.pairs[i] & 15) - 8);
      values[i + kBlock / 2] = scale * static_cast<float>((block.pairs[i] >> 4) - 8);
    }
  });
}

void dequantize_q4_1(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_blocks<BlockQ4_1>(from, blocks, out, [](const BlockQ4_1& block, float* values) {
    const float scale = from_half(block.scale);
    const float minimum = from_half(block.minimum);
    for (std::size_t i = 0; i < kBlock / 2; ++i) {
      values[i] = scale * static_cast<float>(block.pairs[i] & 15) + minimum;
      values[i + kBlock / 2] = scale * static_cast<float>(block.pairs[i] >> 4) + minimum;
    }
  });
}

void dequantize_q8_0(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_blocks<BlockQ8_0>(from, blocks, out, [](const BlockQ8_0& block, float* values) {
    const float scale = from_half(block.scale);
    for (std::size_t i = 0; i < kBlock; ++i) values[i] = scale * static_cast<float>(block.values[i]);
  });
}

constexpr GgufTypeId other(std::uint32_t id) {
  return static_cast<GgufTypeId>(id);
}

constexpr GgufTensorType kTypes[] = {
    {GgufTypeId::kF32, "F32", 1, 4, dequantize_f32},
    {GgufTypeId::kF16, "F16", 1, 2, dequantize_f16},
    {GgufTypeId::kQ4_0, "Q4_0", kBlock, sizeof(BlockQ4_0), dequantize_q4_0},
    {GgufTypeId::kQ4_1, "Q4_1", kBlock, sizeof(BlockQ4_1), dequantize_q4_1},
    {other(6), "Q5_0", 32, 22, nullptr},
    {other(7), "Q5_1", 32, 24, nullptr},
    {GgufTypeId::kQ8_0, "Q8_0", kBlock, sizeof(BlockQ8_0), dequantize_q8_0},
    {other(9), "Q8_1", 32, 40, nullptr},
    {other(10), "Q2_K", 256, 84, nullptr},
    {other(11), "Q3_K", 256, 110, nullptr},
    {other(12), "Q4_K", 256, 144, nullptr},
    {other(13), "Q5_K", 256, 176, nullptr},
    {other(14), "Q6_K", 256, 210, nullptr},
    {other(15), "Q8_K", 256, 292, nullptr},
    {other(16), "IQ2_XXS", 256, 66, nullptr},
    {other(17), "IQ2_XS", 256, 74, nullptr},
    {other(18), "IQ3_XXS", 256, 98, nullptr},
    {other(19), "IQ1_S", 256, 50, nullptr},
    {other(20), "IQ4_NL", 32, 18, nullptr},
    {other(21), "IQ3_S", 256, 110, nullptr},
    {other(22), "IQ2_S", 256, 82, nullptr},
    {other(23), "IQ4_XS", 256, 136, nullptr},
    {other(24), "I8", 1, 1, nullptr},
    {other(25), "I16", 1, 2, nullptr},
    {other(26), "I32", 1, 4, nullptr},
    {other(27), "I64", 1, 8, nullptr},
    {other(28), "F64", 1, 8, nullptr},
    {other(29), "IQ1_M", 256, 56, nullptr},
    {GgufTypeId::kBF16, "BF16", 1, 2, dequantize_bf16},
    {other(34), "TQ1_0", 256, 54, nullptr},
    {other(35), "TQ2_0", 256, 66, nullptr},
    {other(39), "MXFP4", 32, 17, nullptr},
    {other(40), "NVFP4", 64, 36, nullptr},
    {other(41), "Q1_0", 128, 18, nullptr},
};

}  // namespace

const GgufTensorType* find_gguf_type(std::uint32_t id) noexcept {
  const auto* const found = std::ranges::find(kTypes, other(id), &GgufTensorType::id);
  return found == std::ranges::end(kTypes) ? nullptr : found;
}

}  // namespace rts
