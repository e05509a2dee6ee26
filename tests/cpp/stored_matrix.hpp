#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "cpu/packed_matrix.hpp"
#include "rts/gguf_types.hpp"
#include "rts/half.hpp"

namespace rts::testing {

inline const GgufTensorType& type_of(GgufTypeId id) {
  return *find_gguf_type(static_cast<std::uint32_t>(id));
}

// Where a type's blocks have numbers of half precision that scale the others.
inline std::vector<std::size_t> halves_in(GgufTypeId id) {
  switch (id) {
    case GgufTypeId::kF32:
    case GgufTypeId::kF16:
    case GgufTypeId::kBF16:
      return {};
    case GgufTypeId::kQ4_1:
    case GgufTypeId::kQ5_1:
    case GgufTypeId::kQ4_K:
    case GgufTypeId::kQ5_K:
      return {0, 2};
    case GgufTypeId::kQ2_K:
      return {80, 82};
    case GgufTypeId::kQ3_K:
      return {108};
    case GgufTypeId::kQ6_K:
      return {208};
    default:
      return {0};
  }
}

// A matrix as a file has it.
struct StoredMatrix {
  StoredMatrix(GgufTypeId id, std::size_t row_count, std::size_t column_count)
      : type(&type_of(id)), rows(row_count), columns(column_count), bytes(rows * row_bytes()) {}

  std::size_t row_bytes() const { return columns / type->block_values * type->block_bytes; }
  cpu::StoredRows stored() const {
    return {.type = type, .bytes = bytes.data(), .row_bytes = row_bytes(), .columns = columns};
  }
  std::vector<float> row(std::size_t number) const {
    std::vector<float> values(columns);
    type->dequantize(bytes.data() + number * row_bytes(), columns / type->block_values, values.data());
    return values;
  }

  const GgufTensorType* type;
  std::size_t rows, columns;
  std::vector<std::byte> bytes;
};

inline StoredMatrix random_matrix(GgufTypeId id, std::size_t rows, std::size_t columns, std::uint64_t seed = 1) {
  StoredMatrix matrix(id, rows, columns);
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0F, 0.05F);
  const auto put = [&](std::size_t at, auto number) { std::memcpy(matrix.bytes.data() + at, &number, sizeof number); };
  const std::size_t block_bytes = matrix.type->block_bytes;
  for (std::size_t at = 0; at < matrix.bytes.size(); at += block_bytes) {
    const float value = normal(random);
    if (id == GgufTypeId::kF32) {
      put(at, value);
    } else if (id == GgufTypeId::kF16) {
      put(at, to_half(value));
    } else if (id == GgufTypeId::kBF16) {
      put(at, static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16));
    } else {
      for (std::size_t i = 0; i < block_bytes; ++i) matrix.bytes[at + i] = static_cast<std::byte>(random());
      for (const std::size_t half : halves_in(id)) put(at + half, to_half(value));
    }
  }
  return matrix;
}

// Of the transform's coefficient of two inputs of a group that are rotated together.
inline bool is_negative(std::size_t i, std::size_t j) {
  return std::popcount((i / cpu::kRotationStride) & (j / cpu::kRotationStride)) % 2 != 0;
}

// A packed matrix with its memory.
struct PackedWeights {
  // `value_bits` where the matrix is not packed as it is.
  explicit PackedWeights(const StoredMatrix& matrix, std::size_t value_bits = 8) {
    const bool is_exact = cpu::packs_exactly(*matrix.type);
    shape = {.outputs = matrix.rows,
             .inputs = matrix.columns,
             .has_minimums = is_exact ? cpu::has_minimums(*matrix.type) : value_bits == 4,
             .value_bits = is_exact ? std::size_t{4} : value_bits};
    std::vector<std::size_t> numbers(matrix.rows);
    std::iota(numbers.begin(), numbers.end(), std::size_t{0});
    multiplier = cpu::multiplier_for(cpu::largest_scale(matrix.stored(), numbers, shape.value_bits));
    memory.resize(shape.bytes() + kAlignment);
    std::vector<float> scratch(matrix.columns);
    for (std::size_t panel = 0; panel < shape.panels(); ++panel) {
      const std::size_t first = panel * cpu::kPanelOutputs;
      const std::size_t count = std::min(cpu::kPanelOutputs, matrix.rows - first);
      cpu::pack_panel(matrix.stored(), {numbers.data() + first, count}, shape, multiplier, scratch,
                      data() + panel * shape.panel_bytes());
    }
  }

  cpu::PackedMatrix packed() const {
    return {.shape = shape, .bytes = data(), .multiplier = multiplier, .bias = bias.empty() ? nullptr : bias.data()};
  }

  // Rotated. Also of outputs and inputs that are padding.
  int value(std::size_t output, std::size_t input) const {
    const std::byte* const group = group_at(output, input / cpu::kGroup);
    const std::size_t i = input % cpu::kGroup;
    if (shape.value_bits == 8) {
      const std::size_t lane = output % cpu::kPanelOutputs;
      return static_cast<int>(group[i / 4 * 4 * cpu::kPanelOutputs + lane * 4 + i % 4]) - static_cast<int>(cpu::kBias);
    }
    int sum = 0;
    for (std::size_t j = i % cpu::kRotationStride; j < cpu::kGroup; j += cpu::kRotationStride) {
      const int four_bits = four_bits_of(group, output % cpu::kPanelOutputs, j) - 8;
      sum += is_negative(i, j) ? -four_bits : four_bits;
    }
    return sum;
  }
  // With the multiplier.
  double scale(std::size_t output, std::size_t group) const { return half(output, group, 0); }
  double minimum(std::size_t output, std::size_t group) const {
    return shape.has_minimums ? half(output, group, 1) : 0;
  }

  cpu::MatrixShape shape;
  float multiplier = 1;
  std::vector<float> bias;

 private:
  static constexpr std::size_t kAlignment = 64;

  const std::byte* data() const {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    return memory.data() + (kAlignment - address % kAlignment) % kAlignment;
  }
  std::byte* data() { return const_cast<std::byte*>(std::as_const(*this).data()); }
  const std::byte* group_at(std::size_t output, std::size_t group) const {
    return data() + output / cpu::kPanelOutputs * shape.panel_bytes() + group * shape.group_bytes();
  }
  // As packed_matrix.hpp describes them, 0 to 15.
  static int four_bits_of(const std::byte* group, std::size_t output, std::size_t input) {
    const std::size_t quad = input / cpu::kQuad, pair = quad % (cpu::kGroup / cpu::kQuad / 2);
    const std::size_t vector = output / cpu::kLanes * (cpu::kGroup / cpu::kQuad / 2) + pair;
    const std::byte both = group[(vector * cpu::kLanes + output % cpu::kLanes) * cpu::kQuad + input % cpu::kQuad];
    return std::to_integer<int>(quad == pair ? both & std::byte{15} : both >> 4);
  }
  double half(std::size_t output, std::size_t group, std::size_t which) const {
    std::uint16_t bits;
    std::memcpy(&bits,
                group_at(output, group) + shape.value_bytes() +
                    (which * cpu::kPanelOutputs + output % cpu::kPanelOutputs) * sizeof bits,
                sizeof bits);
    return static_cast<double>(from_half(bits)) * multiplier;
  }

  std::vector<std::byte> memory;
};

// The transform, not normalised; what is past the end is zero.
inline std::vector<double> rotated(std::span<const float> values) {
  const std::size_t size = (values.size() + cpu::kGroup - 1) / cpu::kGroup * cpu::kGroup;
  std::vector<double> out(size);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::size_t first = i / cpu::kGroup * cpu::kGroup, own = i % cpu::kGroup;
    for (std::size_t j = own % cpu::kRotationStride; j < cpu::kGroup; j += cpu::kRotationStride) {
      out[first + j] += (is_negative(own, j) ? -1.0 : 1.0) * static_cast<double>(values[i]);
    }
  }
  return out;
}

}  // namespace rts::testing
