#include <immintrin.h>

#include <cstring>

#include "cpu/avx512/few_rows.hpp"
#include "cpu/avx512/vector16.hpp"
#include "cpu/instruction_sets.hpp"
#include "cpu/multiply_panels.hpp"

namespace rts::cpu::avx512 {
namespace {

// The integer sums begin at the corrections, so that the bias of the unsigned weights costs nothing.
template <std::size_t kRows, std::size_t kPanels, bool kHasMinimums>
void multiply_tile(const Tile& tile, float* sums) noexcept {
  constexpr std::size_t kVectors = kPanels * kPanelOutputs / kLanes;
  const std::size_t inputs = tile.input->inputs, groups = tile.input->groups();
  const std::size_t first = tile.first_row * groups + tile.first_group;
  const std::int8_t* values = tile.input->values + first * kGroup;
  const std::int32_t* corrections = tile.input->corrections + first;
  const float* row_scales = tile.input->scales + first;
  const float* row_sums = tile.input->sums + first;
  const std::byte* weights = tile.weights;
  const float* scales = tile.scales;
  const float* minimums = tile.minimums;
  const std::byte* next = tile.next;
  const auto panel_of = [&](std::size_t v) { return v / 2 * tile.panel_bytes; };

  __m512 results[kRows][kVectors];
#pragma GCC unroll 8
  for (std::size_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v) results[row][v] = _mm512_load_ps(sums + (row * kVectors + v) * kLanes);
  }
  for (std::size_t group = 0; group < tile.groups; ++group) {
    prefetch_next(tile, next);
    __m512i products[kRows][kVectors];
#pragma GCC unroll 8
    for (std::size_t row = 0; row < kRows; ++row) {
      const __m512i correction = _mm512_set1_epi32(corrections[row * groups + group]);
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v) products[row][v] = correction;
    }
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kGroup; i += kQuad) {
      __m512i quads[kVectors];
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v) {
        quads[v] = _mm512_load_si512(weights + panel_of(v) + i * kPanelOutputs + v % 2 * kQuad * kLanes);
        asm("" : "+v"(quads[v]));  // or GCC loads it again for another row
      }
#pragma GCC unroll 8
      for (std::size_t row = 0; row < kRows; ++row) {
        std::int32_t quad;
        std::memcpy(&quad, values + row * inputs + i, sizeof quad);
        const __m512i broadcast = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
        for (std::size_t v = 0; v < kVectors; ++v) {
          products[row][v] = _mm512_dpbusd_epi32(products[row][v], quads[v], broadcast);
        }
      }
    }
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v) {
      __m512 scale = _mm512_load_ps(scales + v * kLanes);
      asm("" : "+v"(scale));
#pragma GCC unroll 8
      for (std::size_t row = 0; row < kRows; ++row) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(row_scales[row * groups + group]));
        results[row][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[row][v]), both, results[row][v]);
      }
      if constexpr (kHasMinimums) {
        __m512 minimum = _mm512_load_ps(minimums + v * kLanes);
        asm("" : "+v"(minimum));
#pragma GCC unroll 8
        for (std::size_t row = 0; row < kRows; ++row) {
          const __m512 sum = _mm512_set1_ps(row_sums[row * groups + group]);
          results[row][v] = _mm512_fmadd_ps(minimum, sum, results[row][v]);
        }
      }
    }
    values += kGroup;
    weights += tile.group_bytes;
    scales += kVectors * kLanes;
    minimums += kVectors * kLanes;
  }
#pragma GCC unroll 8
  for (std::size_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v) _mm512_store_ps(sums + (row * kVectors + v) * kLanes, results[row][v]);
  }
}

// As many rows as there are registers for: 12 sums of integers, to hide the latency of 5 cycles of two additions each
// cycle, and 12 of floats. Two panels share what is loaded of the activations, and loads are scarce: an Ice Lake core
// whose other hardware thread is busy does 1.3 of them a cycle where there is one for each two products.
template <bool kHasMinimums>
constexpr MultiplyTile kOnePanel[] = {multiply_tile<1, 1, kHasMinimums>, multiply_tile<2, 1, kHasMinimums>,
                                      multiply_tile<3, 1, kHasMinimums>, multiply_tile<4, 1, kHasMinimums>,
                                      multiply_tile<5, 1, kHasMinimums>, multiply_tile<6, 1, kHasMinimums>};
template <bool kHasMinimums>
constexpr MultiplyTile kTwoPanels[] = {multiply_tile<1, 2, kHasMinimums>, multiply_tile<2, 2, kHasMinimums>,
                                       multiply_tile<3, 2, kHasMinimums>};
constexpr TileTable kTiles = {.one_panel = kOnePanel<false>, .two_panels = kTwoPanels<false>};
constexpr TileTable kTilesWithMinimums = {.one_panel = kOnePanel<true>, .two_panels = kTwoPanels<true>};

}  // namespace

void multiply(const PackedMatrix& matrix, const PanelRange& panels, const QuantizedRows& input, std::size_t rows,
              Epilogue epilogue, float* out, std::size_t stride) noexcept {
  if (matrix.shape.value_bits == 4 && rows > 0 && rows <= TurnedRows::kMostRows &&
      input.inputs <= TurnedRows::kMostInputs) {
    return multiply_few_rows(matrix, panels, input, rows, epilogue, out, stride);
  }
  const TileTable& tiles = matrix.shape.has_minimums ? kTilesWithMinimums : kTiles;
  PanelMultiplier<Vector16>(tiles, matrix, input, epilogue, out, stride).multiply(panels, rows);
}

}  // namespace rts::cpu::avx512
