#include "rts/gguf_types.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "rts/half.hpp"

namespace rts {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read as it lies in memory");

// Each loop below is one that gcc turns into SSE4.1 (2e9 values a second and core): a constant trip count or a plain
// stride, masks for branches, and a block copied to a local first, which `out` cannot alias.

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
// The fifth bit of value i is bit i of `high`.
struct BlockQ5_0 {
  std::uint16_t scale;
  std::uint8_t high[kBlock / 8];
  std::uint8_t pairs[kBlock / 2];
};
struct BlockQ5_1 {
  std::uint16_t scale;
  std::uint16_t minimum;
  std::uint8_t high[kBlock / 8];
  std::uint8_t pairs[kBlock / 2];
};
static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ8_0) == 34);
static_assert(sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24);

// The K types: groups of 16 or 32 values have a small integer each that is the group's share of the block's scale.
// Bit fields of 32 neighbouring values lie in 32 neighbouring bytes: the first 32 values' in the lowest bits.
constexpr std::size_t kSuperBlock = 256;
constexpr std::size_t kRun = 32;

struct BlockQ2_K {
  std::uint8_t scales[kSuperBlock / 16];  // low halves; high halves are minima
  std::uint8_t quads[kSuperBlock / 4];
  std::uint16_t scale;
  std::uint16_t minimum;
};
struct BlockQ3_K {
  std::uint8_t high[kSuperBlock / 8];
  std::uint8_t quads[kSuperBlock / 4];
  std::uint8_t scales[12];
  std::uint16_t scale;
};
struct BlockQ4_K {
  std::uint16_t scale;
  std::uint16_t minimum;
  std::uint8_t scales[12];
  std::uint8_t pairs[kSuperBlock / 2];
};
struct BlockQ5_K {
  std::uint16_t scale;
  std::uint16_t minimum;
  std::uint8_t scales[12];
  std::uint8_t high[kSuperBlock / 8];
  std::uint8_t pairs[kSuperBlock / 2];
};
struct BlockQ6_K {
  std::uint8_t pairs[kSuperBlock / 2];
  std::uint8_t high[kSuperBlock / 4];
  std::int8_t scales[kSuperBlock / 16];
  std::uint16_t scale;
};
static_assert(sizeof(BlockQ2_K) == 84 && sizeof(BlockQ3_K) == 110 && sizeof(BlockQ4_K) == 144);
static_assert(sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210);

template <typename Block, std::size_t kValues = kBlock, typename Decode>
inline void convert_blocks(const std::byte* from, std::size_t blocks, float* out, Decode decode) {
  for (std::size_t i = 0; i < blocks; ++i) {
    Block block;
    std::memcpy(&block, from + i * sizeof block, sizeof block);
    decode(block, out + i * kValues);
  }
}

// scale × value is exact (11 bits × at most 8; in the K types × 12 with the group's), so a compiler that fuses the
// addition changes nothing.

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

// The stored values of a block of five bits, below 32.
template <typename Block>
inline void join_fifth_bits(const Block& block, std::uint8_t (&stored)[kBlock]) {
  for (std::size_t i = 0; i < kBlock / 2; ++i) {
    const std::uint8_t first = block.high[i / 8];
    const std::uint8_t second = block.high[i / 8 + 2];
    const auto bit = static_cast<std::uint8_t>(1U << i % 8);
    stored[i] = static_cast<std::uint8_t>((block.pairs[i] & 15) | ((first & bit) != 0 ? 16 : 0));
    stored[i + kBlock / 2] = static_cast<std::uint8_t>((block.pairs[i] >> 4) | ((second & bit) != 0 ? 16 : 0));
  }
}

void dequantize_q5_0(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_blocks<BlockQ5_0>(from, blocks, out, [](const BlockQ5_0& block, float* values) {
    const float scale = from_half(block.scale);
    std::uint8_t stored[kBlock];
    join_fifth_bits(block, stored);
    for (std::size_t i = 0; i < kBlock; ++i) values[i] = scale * static_cast<float>(stored[i] - 16);
  });
}

void dequantize_q5_1(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_blocks<BlockQ5_1>(from, blocks, out, [](const BlockQ5_1& block, float* values) {
    const float scale = from_half(block.scale);
    const float minimum = from_half(block.minimum);
    std::uint8_t stored[kBlock];
    join_fifth_bits(block, stored);
    for (std::size_t i = 0; i < kBlock; ++i) values[i] = scale * static_cast<float>(stored[i]) + minimum;
  });
}

void dequantize_q2_k(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_blocks<BlockQ2_K, kSuperBlock>(from, blocks, out, [](const BlockQ2_K& block, float* values) {
    const float scale = from_half(block.scale);
    const float minimum = from_half(block.minimum);
    for (std::size_t group = 0; group < kSuperBlock / 16; ++group) {
      const float group_scale = scale * static_cast<float>(block.scales[group] & 15);
      const float group_minimum = minimum * static_cast<float>(block.scales[group] >> 4);
      const std::uint8_t* const quads = block.quads + group / 8 * kRun + group % 2 * 16;
      const std::size_t shift = group / 2 % 4 * 2;
      for (std::size_t i = 0; i < 16; ++i) {
        values[group * 16 + i] = group_scale * static_cast<float>(quads[i] >> shift & 3) - group_minimum;
      }
    }
  });
}

void dequantize_q3_k(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_blocks<BlockQ3_K, kSuperBlock>(from, blocks, out, [](const BlockQ3_K& block, float* values) {
    const float scale = from_half(block.scale);
    for (std::size_t group = 0; group < kSuperBlock / 16; ++group) {
      const int low = block.scales[group % 8] >> group / 8 * 4 & 15;
      const int high = block.scales[8 + group % 4] >> group / 4 * 2 & 3;
      const float group_scale = scale * static_cast<float>((low | high << 4) - 32);
      const std::uint8_t* const quads = block.quads + group / 8 * kRun + group % 2 * 16;
      const std::uint8_t* const thirds = block.high + group % 2 * 16;
      const std::size_t shift = group / 2 % 4 * 2;
      const std::size_t third_shift = group / 2;
      for (std::size_t i = 0; i < 16; ++i) {
        const int stored = (quads[i] >> shift & 3) | (thirds[i] >> third_shift & 1) << 2;
        values[group * 16 + i] = group_scale * static_cast<float>(stored - 4);
      }
    }
  });
}

// Q4_K's and Q5_K's shares of scale and minimum, six bits each: those of the first four groups in whole bytes, whose
// two highest bits belong to the other four.
struct Shares {
  int scale;
  int minimum;
};
inline Shares shares_of(const std::uint8_t (&scales)[12], std::size_t group) {
  if (group < 4) return {scales[group] & 63, scales[group + 4] & 63};
  return {(scales[group + 4] & 15) | scales[group - 4] >> 6 << 4, scales[group + 4] >> 4 | scales[group] >> 6 << 4};
}

void dequantize_q4_k(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_blocks<BlockQ4_K, kSuperBlock>(from, blocks, out, [](const BlockQ4_K& block, float* values) {
    const float scale = from_half(block.scale);
    const float minimum = from_half(block.minimum);
    for (std::size_t group = 0; group < kSuperBlock / kRun; ++group) {
      const Shares shares = shares_of(block.scales, group);
      const float group_scale = scale * static_cast<float>(shares.scale);
      const float group_minimum = minimum * static_cast<float>(shares.minimum);
      const std::uint8_t* const pairs = block.pairs + group / 2 * kRun;
      const std::size_t shift = group % 2 * 4;
      for (std::size_t i = 0; i < kRun; ++i) {
        values[group * kRun + i] = group_scale * static_cast<float>(pairs[i] >> shift & 15) - group_minimum;
      }
    }
  });
}

void dequantize_q5_k(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_blocks<BlockQ5_K, kSuperBlock>(from, blocks, out, [](const BlockQ5_K& block, float* values) {
    const float scale = from_half(block.scale);
    const float minimum = from_half(block.minimum);
    for (std::size_t group = 0; group < kSuperBlock / kRun; ++group) {
      const Shares shares = shares_of(block.scales, group);
      const float group_scale = scale * static_cast<float>(shares.scale);
      const float group_minimum = minimum * static_cast<float>(shares.minimum);
      const std::uint8_t* const pairs = block.pairs + group / 2 * kRun;
      const std::size_t shift = group % 2 * 4;
      for (std::size_t i = 0; i < kRun; ++i) {
        const int stored = (pairs[i] >> shift & 15) | (block.high[i] >> group & 1) << 4;
        values[group * kRun + i] = group_scale * static_cast<float>(stored) - group_minimum;
      }
    }
  });
}

void dequantize_q6_k(const std::byte* from, std::size_t blocks, float* out) noexcept {
  convert_blocks<BlockQ6_K, kSuperBlock>(from, blocks, out, [](const BlockQ6_K& block, float* values) {
    const float scale = from_half(block.scale);
    for (std::size_t group = 0; group < kSuperBlock / 16; ++group) {
      const float group_scale = scale * static_cast<float>(block.scales[group]);
      const std::uint8_t* const pairs = block.pairs + group / 8 * 64 + group % 4 * 16;
      const std::uint8_t* const high = block.high + group / 8 * kRun + group % 2 * 16;
      const std::size_t shift = group / 4 % 2 * 4;
      const std::size_t high_shift = group / 2 % 4 * 2;
      for (std::size_t i = 0; i < 16; ++i) {
        const int stored = (pairs[i] >> shift & 15) | (high[i] >> high_shift & 3) << 4;
        values[group * 16 + i] = group_scale * static_cast<float>(stored - 32);
      }
    }
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
    {GgufTypeId::kQ5_0, "Q5_0", kBlock, sizeof(BlockQ5_0), dequantize_q5_0},
    {GgufTypeId::kQ5_1, "Q5_1", kBlock, sizeof(BlockQ5_1), dequantize_q5_1},
    {GgufTypeId::kQ8_0, "Q8_0", kBlock, sizeof(BlockQ8_0), dequantize_q8_0},
    {other(9), "Q8_1", 32, 40, nullptr},
    {GgufTypeId::kQ2_K, "Q2_K", kSuperBlock, sizeof(BlockQ2_K), dequantize_q2_k},
    {GgufTypeId::kQ3_K, "Q3_K", kSuperBlock, sizeof(BlockQ3_K), dequantize_q3_k},
    {GgufTypeId::kQ4_K, "Q4_K", kSuperBlock, sizeof(BlockQ4_K), dequantize_q4_k},
    {GgufTypeId::kQ5_K, "Q5_K", kSuperBlock, sizeof(BlockQ5_K), dequantize_q5_k},
    {GgufTypeId::kQ6_K, "Q6_K", kSuperBlock, sizeof(BlockQ6_K), dequantize_q6_k},
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

std::string decoded_gguf_types() {
  std::string names;
  for (const GgufTensorType& type : kTypes) {
    if (type.dequantize == nullptr) continue;
    if (!names.empty()) names += ", ";
    names += type.name;
  }
  return names;
}

}  // namespace rts
