#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/packed_matrix.hpp"

namespace rts::cpu {

// Rows of activations, rotated and quantized to 8 bits, a scale for each row's groups of kGroup. It owns no memory;
// each array begins at a multiple of 64 bytes. Inputs past the row's own are zero up to a whole group.
struct QuantizedRows {
  std::size_t inputs = 0;               // a multiple of kGroup
  std::int8_t* values = nullptr;        // [rows][inputs], in -127..127
  float* scales = nullptr;              // [rows][groups]: the largest magnitude / 127 / kRotation
  std::int32_t* corrections = nullptr;  // [rows][groups]: -kBias × the sum of the group's values
  float* sums = nullptr;                // [rows][groups]: the sum of the group's inputs, neither rotated nor quantized

  std::size_t groups() const { return inputs / kGroup; }
};

}  // namespace rts::cpu
