#include "cpu/packed_matrix.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/quantization.hpp"
#include "rts/half.hpp"

namespace rts::cpu {
namespace {

using GroupValues = std::array<std::int8_t, kGroup>;
using FourBitValues = std::array<std::uint8_t, kGroup>;
constexpr std::uint8_t kFourBitZero = 8;

// A group of a 4-bit type: scale × q + minimum, q in 0..15.
struct FourBitGroup {
  float scale;
  float minimum;
  FourBitValues quants;

  // Of the integers less 8.
  float packed_minimum() const { return minimum + 8.0F * scale; }
};

// The blocks as gguf_types.cpp describes them.
struct BlockQ4_0 {
  static constexpr std::size_t kGroups = 1;
  std::uint16_t scale;
  std::uint8_t pairs[kGroup / 2];
};
struct BlockQ4_1 {
  static constexpr std::size_t kGroups = 1;
  std::uint16_t scale;
  std::uint16_t minimum;
  std::uint8_t pairs[kGroup / 2];
};
struct BlockQ4_K {
  static constexpr std::size_t kGroups = 8;
  std::uint16_t scale;
  std::uint16_t minimum;
  std::uint8_t shares[12];
  std::uint8_t pairs[kGroups * kGroup / 2];
};
static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ4_K) == 144);

FourBitValues unpack_halves(const std::uint8_t (&pairs)[kGroup / 2]) {
  FourBitValues quants;
  for (std::size_t i = 0; i < kGroup / 2; ++i) {
    quants[i] = pairs[i] & 15;
    quants[i + kGroup / 2] = static_cast<std::uint8_t>(pairs[i] >> 4);
  }
  return quants;
}

FourBitGroup group_of(const BlockQ4_0& block, std::size_t) {
  const float scale = from_half(block.scale);
  return {.scale = scale, .minimum = -8.0F * scale, .quants = unpack_halves(block.pairs)};
}

FourBitGroup group_of(const BlockQ4_1& block, std::size_t) {
  return {.scale = from_half(block.scale), .minimum = from_half(block.minimum), .quants = unpack_halves(block.pairs)};
}

FourBitGroup group_of(const BlockQ4_K& block, std::size_t group) {
  const std::uint8_t* const shares = block.shares;
  int scale, minimum;
  if (group < 4) {
    scale = shares[group] & 63;
    minimum = shares[group + 4] & 63;
  } else {
    scale = (shares[group + 4] & 15) | shares[group - 4] >> 6 << 4;
    minimum = shares[group + 4] >> 4 | shares[group] >> 6 << 4;
  }
  FourBitGroup result{.scale = from_half(block.scale) * static_cast<float>(scale),
                      .minimum = -from_half(block.minimum) * static_cast<float>(minimum),
                      .quants = {}};
  const std::uint8_t* const pairs = block.pairs + group / 2 * kGroup;
  const std::size_t shift = group % 2 * 4;
  for (std::size_t i = 0; i < kGroup; ++i) result.quants[i] = pairs[i] >> shift & 15;
  return result;
}

// Calls visit(number, group) for the groups of a row.
template <typename Block, typename Visit>
void visit_groups(const std::byte* row, std::size_t columns, Visit visit) {
  for (std::size_t first = 0; first < columns / kGroup; first += Block::kGroups) {
    Block block;
    std::memcpy(&block, row + first / Block::kGroups * sizeof block, sizeof block);
    for (std::size_t i = 0; i < Block::kGroups; ++i) visit(first + i, group_of(block, i));
  }
}

template <typename Visit>
void visit_four_bit_groups(const StoredRows& rows, std::size_t row, Visit visit) {
  const std::byte* const from = rows.bytes + row * rows.row_bytes;
  switch (rows.type->id) {
    case GgufTypeId::kQ4_0:
      return visit_groups<BlockQ4_0>(from, rows.columns, visit);
    case GgufTypeId::kQ4_1:
      return visit_groups<BlockQ4_1>(from, rows.columns, visit);
    default:
      return visit_groups<BlockQ4_K>(from, rows.columns, visit);
  }
}

void dequantize_row(const StoredRows& rows, std::size_t row, float* out) {
  rows.type->dequantize(rows.bytes + row * rows.row_bytes, rows.columns / rows.type->block_values, out);
}

// One output's column of a panel.
class PanelColumn {
 public:
  PanelColumn(const MatrixShape& shape, std::byte* panel, std::size_t output)
      : shape_(shape), panel_(panel), output_(output) {}

  void set_values(std::size_t group, const GroupValues& values) {
    std::array<std::uint8_t, kGroup> stored;
    for (std::size_t i = 0; i < kGroup; ++i) stored[i] = static_cast<std::uint8_t>(values[i] + int{kBias});
    for (std::size_t i = 0; i < kGroup; i += kQuad) {
      std::memcpy(at(group) + i * kPanelOutputs + output_ * kQuad, stored.data() + i, kQuad);
    }
  }
  void set_four_bits(std::size_t group, const FourBitValues& values) {
    std::byte* const vector = at(group) + output_ / kLanes * kLanes * kGroup / 2;
    for (std::size_t i = 0; i < kGroup / 2; ++i) {
      vector[i / kQuad * kQuad * kLanes + output_ % kLanes * kQuad + i % kQuad] =
          static_cast<std::byte>(values[i] | values[i + kGroup / 2] << 4);
    }
  }
  void set_scale(std::size_t group, std::uint16_t half) { set_half(at(group) + shape_.value_bytes(), half); }
  void set_minimum(std::size_t group, std::uint16_t half) {
    set_half(at(group) + shape_.value_bytes() + kPanelOutputs * sizeof half, half);
  }
  void set_zero(std::size_t group) {
    if (shape_.value_bits == 4) {
      FourBitValues zeros;
      zeros.fill(kFourBitZero);
      set_four_bits(group, zeros);
    } else {
      set_values(group, {});
    }
    set_scale(group, 0);
    if (shape_.has_minimums) set_minimum(group, 0);
  }

 private:
  std::byte* at(std::size_t group) const { return panel_ + group * shape_.group_bytes(); }
  void set_half(std::byte* halves, std::uint16_t half) {
    std::memcpy(halves + output_ * sizeof half, &half, sizeof half);
  }

  const MatrixShape& shape_;
  std::byte* panel_;
  std::size_t output_;
};

// Quantizes a group with the scale as half precision has it; returns that.
std::uint16_t quantize_group(const std::array<float, kGroup>& from, float multiplier, GroupValues& values) {
  std::array<float, kGroup> rotated = from;
  rotate(rotated.data());
  std::int32_t largest_bits = 0;
  for (const float value : rotated) largest_bits = std::max(largest_bits, magnitude_bits(value));
  const std::uint16_t scale = to_half(std::bit_cast<float>(largest_bits) / kLargestValue / multiplier);
  const float inverse = inverse_or_zero(from_half(scale) * multiplier);
  for (std::size_t i = 0; i < kGroup; ++i) {
    values[i] = static_cast<std::int8_t>(nearest(std::clamp(rotated[i] * inverse, -kLargestValue, kLargestValue)));
  }
  return scale;
}

// Quantizes a group to 4 bits: the range of its values first, then by turns the scale and minimum that fit the integers
// best, and the integers that fit those best. Each turn lowers the squared error,
// but for the rounding of scale and minimum to half precision that follows; three leave little to be gained.
FourBitGroup quantize_to_four_bits(std::span<const float> values) {
  constexpr int kTurns = 3;
  constexpr float kLargest = 15.0F;
  const auto [least, most] = std::ranges::minmax(values);
  FourBitGroup group{.scale = (most - least) / kLargest, .minimum = least, .quants = {}};
  group.quants.fill(kFourBitZero);
  const auto count = static_cast<double>(values.size());
  for (int turn = 0;; ++turn) {
    const float inverse = inverse_or_zero(group.scale);
    double q_sum = 0, qq_sum = 0, x_sum = 0, qx_sum = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::int32_t q = nearest(std::clamp((values[i] - group.minimum) * inverse, 0.0F, kLargest));
      group.quants[i] = static_cast<std::uint8_t>(q);
      const double quant = q, value = values[i];
      q_sum += quant;
      qq_sum += quant * quant;
      x_sum += value;
      qx_sum += quant * value;
    }
    const double spread = count * qq_sum - q_sum * q_sum;
    if (turn == kTurns || spread <= 0) return group;
    const double scale = (count * qx_sum - q_sum * x_sum) / spread;
    if (scale <= 0) return group;
    group.scale = static_cast<float>(scale);
    group.minimum = static_cast<float>((x_sum - scale * q_sum) / count);
  }
}

}  // namespace

bool packs_exactly(const GgufTensorType& type) noexcept {
  return type.id == GgufTypeId::kQ4_0 || has_minimums(type);
}

bool has_minimums(const GgufTensorType& type) noexcept {
  return type.id == GgufTypeId::kQ4_1 || type.id == GgufTypeId::kQ4_K;
}

float largest_scale(const StoredRows& rows, std::span<const std::size_t> row_numbers, std::size_t value_bits) {
  std::int32_t largest_bits = 0;
  const auto look_at = [&](float value) { largest_bits = std::max(largest_bits, magnitude_bits(value)); };
  const bool is_exact = packs_exactly(*rows.type);
  std::vector<float> values(is_exact ? 0 : rows.columns);
  for (const std::size_t row : row_numbers) {
    if (is_exact) {
      visit_four_bit_groups(rows, row, [&](std::size_t, const FourBitGroup& group) {
        look_at(group.scale);
        look_at(group.packed_minimum());
      });
    } else {
      dequantize_row(rows, row, values.data());
      for (const float value : values) look_at(value);
    }
  }
  float largest = std::bit_cast<float>(largest_bits);
  // A rotated value is a sum of so many. Of 4 bits, the scale and the value in the middle are within the values' range,
  // or hardly outside where that fits them better.
  if (!is_exact) largest *= value_bits == 4 ? 2.0F : kRotation;
  if (!std::isfinite(largest)) return std::numeric_limits<float>::quiet_NaN();
  return is_exact || value_bits == 4 ? largest : largest / kLargestValue;
}

float multiplier_for(float largest_scale) noexcept {
  constexpr int kTop = 15, kLeast = -126;  // exponents: half precision ends at 2^16, normal floats begin at 2^-126
  if (!(largest_scale > 0)) return 1.0F;
  int exponent;
  std::frexp(largest_scale, &exponent);
  return std::ldexp(1.0F, std::max(exponent - kTop, kLeast));
}

void pack_panel(const StoredRows& rows, std::span<const std::size_t> row_numbers, const MatrixShape& shape,
                float multiplier, std::span<float> scratch, std::byte* panel) {
  for (std::size_t output = 0; output < kPanelOutputs; ++output) {
    PanelColumn column(shape, panel, output);
    const auto set_four_bits = [&](std::size_t number, const FourBitGroup& group) {
      column.set_four_bits(number, group.quants);
      column.set_scale(number, to_half(group.scale / multiplier));
      if (shape.has_minimums) column.set_minimum(number, to_half(group.packed_minimum() / multiplier));
    };
    if (output >= row_numbers.size()) {
      for (std::size_t group = 0; group < shape.groups(); ++group) column.set_zero(group);
    } else if (packs_exactly(*rows.type)) {
      visit_four_bit_groups(rows, row_numbers[output], set_four_bits);
    } else {
      dequantize_row(rows, row_numbers[output], scratch.data());
      for (std::size_t group = 0; group < shape.groups(); ++group) {
        const std::size_t first = group * kGroup;
        std::array<float, kGroup> from{};
        const std::size_t count = std::min(kGroup, rows.columns - first);
        std::copy_n(scratch.data() + first, count, from.begin());
        if (shape.value_bits == 4) {
          set_four_bits(group, quantize_to_four_bits({from.data(), count}));
          continue;
        }
        GroupValues values;
        column.set_scale(group, quantize_group(from, multiplier, values));
        column.set_values(group, values);
      }
    }
  }
}

}  // namespace rts::cpu
