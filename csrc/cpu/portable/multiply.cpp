#include <cstring>

#include "cpu/instruction_sets.hpp"
#include "cpu/multiply_panels.hpp"
#include "cpu/portable/vector16.hpp"

namespace rts::cpu::portable {
namespace {

// Every loop is over the panel's outputs, which become vectors.
template <std::size_t kRows, bool kHasMinimums>
void multiply_tile(const Tile& tile, float* sums) noexcept {
  const QuantizedRows& input = *tile.input;
  const std::byte* weights = tile.weights;
  const std::byte* next = tile.next;
  float results[kRows][kPanelOutputs];
  std::memcpy(results, sums, sizeof results);
  for (std::size_t group = tile.first_group; group < tile.first_group + tile.groups; ++group) {
    const auto at = [&](std::size_t row) { return (tile.first_row + row) * input.groups() + group; };
    prefetch_next(tile, next);
    std::int32_t products[kRows][kPanelOutputs];
    for (std::size_t row = 0; row < kRows; ++row) {
      const std::int32_t correction = input.corrections[at(row)];
      for (std::int32_t& product : products[row]) product = correction;
    }
    for (std::size_t quad = 0; quad < kGroup; quad += kQuad, weights += kQuad * kPanelOutputs) {
      std::uint32_t packed[kPanelOutputs];
      std::memcpy(packed, weights, sizeof packed);
      std::int32_t values[kQuad][kPanelOutputs];
      for (std::size_t i = 0; i < kQuad; ++i) {
        for (std::size_t output = 0; output < kPanelOutputs; ++output) {
          values[i][output] = static_cast<std::int32_t>(packed[output] >> 8 * i & 0xFF);
        }
      }
      for (std::size_t row = 0; row < kRows; ++row) {
        const std::int8_t* const from = input.values + at(row) * kGroup + quad;
        for (std::size_t output = 0; output < kPanelOutputs; ++output) {
          products[row][output] += values[0][output] * from[0] + values[1][output] * from[1] +
                                   values[2][output] * from[2] + values[3][output] * from[3];
        }
      }
    }
    const float* const scales = tile.scales + (group - tile.first_group) * kPanelOutputs;
    for (std::size_t row = 0; row < kRows; ++row) {
      const float scale = input.scales[at(row)];
      for (std::size_t output = 0; output < kPanelOutputs; ++output) {
        results[row][output] += static_cast<float>(products[row][output]) * (scales[output] * scale);
      }
    }
    if constexpr (kHasMinimums) {
      const float* const minimums = tile.minimums + (group - tile.first_group) * kPanelOutputs;
      for (std::size_t row = 0; row < kRows; ++row) {
        const float sum = input.sums[at(row)];
        for (std::size_t output = 0; output < kPanelOutputs; ++output) results[row][output] += minimums[output] * sum;
      }
    }
    weights += tile.group_bytes - kGroup * kPanelOutputs;
  }
  std::memcpy(sums, results, sizeof results);
}

template <bool kHasMinimums>
constexpr MultiplyTile kOnePanel[] = {multiply_tile<1, kHasMinimums>, multiply_tile<2, kHasMinimums>,
                                      multiply_tile<3, kHasMinimums>, multiply_tile<4, kHasMinimums>};
constexpr TileTable kTiles = {.one_panel = kOnePanel<false>, .two_panels = {}};
constexpr TileTable kTilesWithMinimums = {.one_panel = kOnePanel<true>, .two_panels = {}};

}  // namespace

void multiply(const PackedMatrix& matrix, const PanelRange& panels, const QuantizedRows& input, std::size_t rows,
              Epilogue epilogue, float* out, std::size_t stride) noexcept {
  const TileTable& tiles = matrix.shape.has_minimums ? kTilesWithMinimums : kTiles;
  PanelMultiplier<Vector16>(tiles, matrix, input, epilogue, out, stride).multiply(panels, rows);
}

}  // namespace rts::cpu::portable
