#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "rts/gguf_types.hpp"

// A weight matrix as the kernels read it: integers, a scale for every 32 neighbours along the inputs, in the basis that
// activations are rotated to before they are quantized.
//
// The rotation is the Walsh-Hadamard transform of 8 of a group's inputs, 4 apart. It spreads an outlier among the
// activations over 8 of them, which takes two thirds of the error out of 8-bit activations (SmolLM2-135M, one scale
// per 32: mean KL 0.0057 without, 0.0021 with it). 4-bit weights are stored as they are, and rotated where they are
// used: that makes integers of 8 bits without any loss, a sum of 8 values from -8 to 7 with signs. Others can be
// quantized to 4 bits, with minimums.
namespace rts::cpu {

inline constexpr std::size_t kGroup = 32;          // inputs that share a scale
inline constexpr std::size_t kRotation = 8;        // inputs that are rotated together
inline constexpr std::size_t kRotationStride = 4;  // how far apart they are
inline constexpr std::size_t kQuad = 4;            // neighbouring inputs that are multiplied at once
inline constexpr std::size_t kLanes = 16;          // outputs side by side in a vector
inline constexpr std::size_t kPanelOutputs = 32;   // outputs of a panel, the unit of work: two vectors
inline constexpr std::size_t kBias = 128;          // what is added to an 8-bit value, so that it is stored unsigned

struct MatrixShape {
  std::size_t outputs = 0;
  std::size_t inputs = 0;
  bool has_minimums = false;
  std::size_t value_bits = 8;

  std::size_t groups() const { return (inputs + kGroup - 1) / kGroup; }
  std::size_t panels() const { return (outputs + kPanelOutputs - 1) / kPanelOutputs; }
  // [group]: values, then scales and, where there are, minimums, [kPanelOutputs] each, of IEEE half precision.
  // Values of 8 bits are [kGroup / kQuad][kPanelOutputs][kQuad], rotated. Those of 4 bits, 8 more than they are, are
  // [kPanelOutputs / kLanes][kGroup / kQuad / 2][kLanes][kQuad]: of each pair of quads that are half a group apart, the
  // first is in the lower halves of the bytes.
  constexpr std::size_t value_bytes() const { return kPanelOutputs * kGroup * value_bits / 8; }
  constexpr std::size_t group_bytes() const { return value_bytes() + kPanelOutputs * (has_minimums ? 4 : 2); }
  std::size_t panel_bytes() const { return groups() * group_bytes(); }
  std::size_t bytes() const { return panels() * panel_bytes(); }
};

// With q a rotated value, s a scale, m a minimum, x the input and Rx the rotated input over kRotation:
//   y[output] = multiplier × Σ over groups of ( s × Σ q Rx  +  m × Σ x ).
// What lies past the outputs or inputs in the last panel or group is zero. It owns no memory.
struct PackedMatrix {
  MatrixShape shape;
  const std::byte* bytes = nullptr;  // [panels][panel_bytes], at a multiple of 64
  float multiplier = 1.0F;           // a power of two that keeps scales and minimums in half precision's range
  const float* bias = nullptr;       // [outputs], or none
};

// Rows of a stored matrix: whole blocks of `type`, row_bytes apart.
struct StoredRows {
  const GgufTensorType* type = nullptr;
  const std::byte* bytes = nullptr;
  std::size_t row_bytes = 0;
  std::size_t columns = 0;  // a multiple of type->block_values
};

// Whether a type's values go into the packed form as they are: 4-bit ones, as integers and their scales and minimums.
bool packs_exactly(const GgufTensorType& type) noexcept;
bool has_minimums(const GgufTensorType& type) noexcept;

// Two passes, so that any number of threads can pack the panels of a matrix: `largest_scale` of all its rows gives the
// multiplier, and pack_panel writes one panel. largest_scale bounds the magnitudes of scales and minimums from above,
// and is NaN where a value of the rows is not finite or too large: the caller's to refuse.
float largest_scale(const StoredRows& rows, std::span<const std::size_t> row_numbers, std::size_t value_bits);
float multiplier_for(float largest_scale) noexcept;
// `row_numbers` are those of `rows` that become the panel's outputs, at most kPanelOutputs. `scratch` has room for
// rows.columns floats.
void pack_panel(const StoredRows& rows, std::span<const std::size_t> row_numbers, const MatrixShape& shape,
                float multiplier, std::span<float> scratch, std::byte* panel);

}  // namespace rts::cpu
