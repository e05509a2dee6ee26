#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu/quantization.hpp"
#include "cpu/quantized_rows.hpp"

namespace rts::cpu {

// Kernels::quantize in loops that compilers make vectors of. Static, as all of quantization.hpp is.
static void quantize_rows(const float* values, std::size_t columns, std::size_t stride, std::size_t rows,
                          const QuantizedRows& out, std::size_t first_row) noexcept {
  constexpr std::int32_t kInfinity = 0x7F800000;
  const std::size_t groups = out.groups();
  for (std::size_t row = 0; row < rows; ++row) {
    const float* const from = values + row * stride;
    std::int8_t* const to = out.values + (first_row + row) * out.inputs;
    const std::size_t at = (first_row + row) * groups;
    for (std::size_t group = 0; group < groups; ++group) {
      const std::size_t first = group * kGroup;
      float rotated[kGroup] = {};
      std::copy_n(from + first, std::min(kGroup, columns - first), rotated);
      rotate(rotated);
      // The first of a transform is the sum of all.
      static_assert(kRotationStride == 4);
      out.sums[at + group] = (rotated[0] + rotated[1]) + (rotated[2] + rotated[3]);

      std::int32_t largest_bits = 0;
      for (const float value : rotated) largest_bits = std::max(largest_bits, magnitude_bits(value));
      const float largest = std::bit_cast<float>(largest_bits);
      const bool is_finite = largest_bits < kInfinity;
      out.scales[at + group] =
          is_finite ? largest * (1.0F / (kRotation * kLargestValue)) : std::numeric_limits<float>::quiet_NaN();

      const float inverse = kLargestValue * inverse_or_zero(largest);
      std::int32_t sum = 0;
      for (std::size_t i = 0; i < kGroup; ++i) {
        const std::int32_t value = is_finite ? nearest(rotated[i] * inverse) : 0;
        sum += value;
        to[first + i] = static_cast<std::int8_t>(value);
      }
      out.corrections[at + group] = -static_cast<std::int32_t>(kBias) * sum;
    }
  }
}

}  // namespace rts::cpu
