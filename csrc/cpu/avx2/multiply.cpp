#include <immintrin.h>

#include <cstring>

#include "cpu/avx2/vector16.hpp"
#include "cpu/instruction_sets.hpp"
#include "cpu/multiply_panels.hpp"

namespace rts::cpu::avx2 {
namespace {

constexpr std::size_t kWidth = 8;                         // outputs of a register
constexpr std::size_t kVectors = kPanelOutputs / kWidth;  // of a panel

// Products of pairs of 16-bit numbers, which cannot overflow: the bytes of even numbers of a quad and those of odd
// ones, the weights' without a sign.
template <std::size_t kRows, bool kHasMinimums>
void multiply_tile(const Tile& tile, float* sums) noexcept {
  const QuantizedRows& input = *tile.input;
  const __m256i kEven = _mm256_set1_epi16(0xFF);
  const std::byte* weights = tile.weights;
  const float* scales = tile.scales;
  const float* minimums = tile.minimums;
  const std::byte* next = tile.next;
  for (std::size_t group = 0; group < tile.groups; ++group) {
    const auto at = [&](std::size_t row) { return (tile.first_row + row) * input.groups() + tile.first_group + group; };
    prefetch_next(tile, next);
    __m256i products[kRows][kVectors];
#pragma GCC unroll 2
    for (std::size_t row = 0; row < kRows; ++row) {
      const __m256i correction = _mm256_set1_epi32(input.corrections[at(row)]);
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v) products[row][v] = correction;
    }
    for (std::size_t i = 0; i < kGroup; i += kQuad) {
      __m256i even_values[kRows], odd_values[kRows];
#pragma GCC unroll 2
      for (std::size_t row = 0; row < kRows; ++row) {
        std::int32_t quad;
        std::memcpy(&quad, input.values + at(row) * kGroup + i, sizeof quad);
        const __m256i broadcast = _mm256_set1_epi32(quad);
        even_values[row] = _mm256_srai_epi16(_mm256_slli_epi16(broadcast, 8), 8);
        odd_values[row] = _mm256_srai_epi16(broadcast, 8);
      }
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v) {
        const __m256i quads =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + i * kPanelOutputs + v * kQuad * kWidth));
        const __m256i even = _mm256_and_si256(quads, kEven), odd = _mm256_srli_epi16(quads, 8);
#pragma GCC unroll 2
        for (std::size_t row = 0; row < kRows; ++row) {
          const __m256i pairs =
              _mm256_add_epi32(_mm256_madd_epi16(even, even_values[row]), _mm256_madd_epi16(odd, odd_values[row]));
          products[row][v] = _mm256_add_epi32(products[row][v], pairs);
        }
      }
    }
#pragma GCC unroll 2
    for (std::size_t row = 0; row < kRows; ++row) {
      const __m256 row_scale = _mm256_set1_ps(input.scales[at(row)]);
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v) {
        float* const sum = sums + row * kPanelOutputs + v * kWidth;
        const __m256 both = _mm256_mul_ps(_mm256_load_ps(scales + v * kWidth), row_scale);
        __m256 result = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[row][v]), both, _mm256_load_ps(sum));
        if constexpr (kHasMinimums) {
          const __m256 row_sum = _mm256_set1_ps(input.sums[at(row)]);
          result = _mm256_fmadd_ps(_mm256_load_ps(minimums + v * kWidth), row_sum, result);
        }
        _mm256_store_ps(sum, result);
      }
    }
    weights += tile.group_bytes;
    scales += kPanelOutputs;
    minimums += kPanelOutputs;
  }
}

template <bool kHasMinimums>
constexpr MultiplyTile kOnePanel[] = {multiply_tile<1, kHasMinimums>, multiply_tile<2, kHasMinimums>};
constexpr TileTable kTiles = {.one_panel = kOnePanel<false>, .two_panels = {}};
constexpr TileTable kTilesWithMinimums = {.one_panel = kOnePanel<true>, .two_panels = {}};

}  // namespace

void multiply(const PackedMatrix& matrix, const PanelRange& panels, const QuantizedRows& input, std::size_t rows,
              Epilogue epilogue, float* out, std::size_t stride) noexcept {
  const TileTable& tiles = matrix.shape.has_minimums ? kTilesWithMinimums : kTiles;
  PanelMultiplier<Vector16>(tiles, matrix, input, epilogue, out, stride).multiply(panels, rows);
}

}  // namespace rts::cpu::avx2
