#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/avx512/vector16.hpp"
#include "cpu/multiply_panels.hpp"

// Products of 4-bit weights with few rows, where memory decides: the weights are multiplied as they are.
namespace rts::cpu::avx512 {

// Few rows of activations, turned back into the basis of 4-bit weights: a sum of rotated weights times activations is
// one of weights times rotated activations, the same integer. Those take 11 bits: `high` × 128 + `low`.
class TurnedRows {
 public:
  static constexpr std::size_t kMostRows = 3;
  static constexpr std::size_t kMostInputs = 16384;

  TurnedRows(const QuantizedRows& input, std::size_t rows) noexcept : inputs_(input.inputs) {
    for (std::size_t row = 0; row < rows; ++row) {
      for (std::size_t group = 0; group < input.groups(); ++group) turn(input.values, row, group);
    }
  }

  const std::int8_t* low(std::size_t row) const { return low_ + row * inputs_; }
  const std::int8_t* high(std::size_t row) const { return high_ + row * inputs_; }
  // What the weights' offset of 8 amounts to.
  const std::int32_t* corrections(std::size_t row) const { return corrections_ + row * inputs_ / kGroup; }

 private:
  void turn(const std::int8_t* values, std::size_t row, std::size_t group) noexcept {
    const std::size_t at = row * inputs_ + group * kGroup;
    const std::int8_t* const from = values + at;
    __m512i x = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    const auto stage = [&](__mmask32 negated, __m512i swapped) {
      x = _mm512_add_epi16(swapped, _mm512_mask_sub_epi16(x, negated, _mm512_setzero_si512(), x));
    };
    stage(0xFFFF0000, _mm512_shuffle_i64x2(x, x, 0x4E));
    stage(0xFF00FF00, _mm512_shuffle_i64x2(x, x, 0xB1));
    stage(0xF0F0F0F0, _mm512_shuffle_epi32(x, _MM_PERM_BADC));
    const __m512i half = _mm512_set1_epi16(64);
    const __m512i low = _mm512_sub_epi16(_mm512_and_si512(_mm512_add_epi16(x, half), _mm512_set1_epi16(127)), half);
    const __m512i high = _mm512_srai_epi16(_mm512_sub_epi16(x, low), 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low_ + at), _mm512_cvtepi16_epi8(low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high_ + at), _mm512_cvtepi16_epi8(high));
    // The sum of a transform is kRotation times its first.
    corrections_[at / kGroup] = -8 * std::int32_t{kRotation} * (from[0] + from[1] + from[2] + from[3]);
  }

  std::size_t inputs_;
  alignas(kCacheLine) std::int8_t low_[kMostRows * kMostInputs];
  alignas(kCacheLine) std::int8_t high_[kMostRows * kMostInputs];
  std::int32_t corrections_[kMostRows * kMostInputs / kGroup];
};

// A panel by few rows: its 4-bit weights go through registers once, in the order in which they lie in memory. `next` is
// where the next panel lies.
template <std::size_t kRows, bool kHasMinimums>
inline void multiply_few(const PackedMatrix& matrix, const std::byte* panel, const std::byte* next,
                         const QuantizedRows& input, const TurnedRows& turned, float* sums) noexcept {
  constexpr std::size_t kAhead = 4096;  // memory is fetched: between 512 and 8192, 1024 and more do equally well
  constexpr std::size_t kVectors = kPanelOutputs / kLanes, kQuads = kGroup / kQuad;
  constexpr MatrixShape kShape{.has_minimums = kHasMinimums, .value_bits = 4};
  const __m512i nibble = _mm512_set1_epi8(15);
  const std::size_t groups = matrix.shape.groups();
  __m512 results[kRows][kVectors];
#pragma GCC unroll 3
  for (std::size_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (std::size_t v = 0; v < kVectors; ++v) results[row][v] = _mm512_setzero_ps();
  }
  const std::byte* const end = panel + groups * kShape.group_bytes();
  const std::byte* ahead = panel + kAhead;
  for (std::size_t group = 0; group < groups; ++group, panel += kShape.group_bytes(), ahead += kShape.group_bytes()) {
    if (ahead >= end && ahead < end + kShape.group_bytes()) ahead = next;
    for (std::size_t at = 0; at < kShape.group_bytes(); at += kCacheLine) __builtin_prefetch(ahead + at);
#pragma GCC unroll 2
    for (std::size_t v = 0; v < kVectors; ++v) {
      __m512i low[kRows], high[kRows];
#pragma GCC unroll 3
      for (std::size_t row = 0; row < kRows; ++row) {
        low[row] = _mm512_set1_epi32(turned.corrections(row)[group]);
        high[row] = _mm512_setzero_si512();
      }
#pragma GCC unroll 4
      for (std::size_t i = 0; i < kQuads / 2; ++i) {
        const __m512i pairs = _mm512_load_si512(panel + (v * kQuads / 2 + i) * kQuad * kLanes);
        const __m512i quads[2] = {_mm512_and_si512(pairs, nibble),
                                  _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble)};
#pragma GCC unroll 2
        for (std::size_t half = 0; half < 2; ++half) {
#pragma GCC unroll 3
          for (std::size_t row = 0; row < kRows; ++row) {
            std::int32_t of_low, of_high;
            const std::size_t at = group * kGroup + (half * kQuads / 2 + i) * kQuad;
            std::memcpy(&of_low, turned.low(row) + at, sizeof of_low);
            std::memcpy(&of_high, turned.high(row) + at, sizeof of_high);
            low[row] = _mm512_dpbusd_epi32(low[row], quads[half], _mm512_set1_epi32(of_low));
            high[row] = _mm512_dpbusd_epi32(high[row], quads[half], _mm512_set1_epi32(of_high));
          }
        }
      }
      const auto halves = [&](std::size_t which) {
        const std::byte* const at =
            panel + kShape.value_bytes() + (which * kPanelOutputs + v * kLanes) * sizeof(std::uint16_t);
        return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(at)));
      };
      const __m512 scale = halves(0);
#pragma GCC unroll 3
      for (std::size_t row = 0; row < kRows; ++row) {
        const std::size_t at = row * groups + group;
        const __m512i products = _mm512_add_epi32(_mm512_slli_epi32(high[row], 7), low[row]);
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(input.scales[at]));
        results[row][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), both, results[row][v]);
        if constexpr (kHasMinimums) {
          results[row][v] = _mm512_fmadd_ps(halves(1), _mm512_set1_ps(input.sums[at]), results[row][v]);
        }
      }
    }
  }
#pragma GCC unroll 3
  for (std::size_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (std::size_t v = 0; v < kVectors; ++v) {
      _mm512_store_ps(sums + row * kPanelOutputs + v * kLanes, results[row][v]);
    }
  }
}

template <bool kHasMinimums>
inline constexpr decltype(&multiply_few<1, true>) kFew[] = {
    multiply_few<1, kHasMinimums>, multiply_few<2, kHasMinimums>, multiply_few<3, kHasMinimums>};

inline void multiply_few_rows(const PackedMatrix& matrix, const PanelRange& panels, const QuantizedRows& input,
                              std::size_t rows, Epilogue epilogue, float* out, std::size_t stride) noexcept {
  const TurnedRows turned(input, rows);
  const auto multiply = (matrix.shape.has_minimums ? kFew<true> : kFew<false>)[rows - 1];
  const std::size_t panel_bytes = matrix.shape.panel_bytes();
  for (std::size_t panel = panels.begin; panel < panels.end; ++panel) {
    alignas(kCacheLine) float sums[TurnedRows::kMostRows * kPanelOutputs];
    const std::byte* const from = matrix.bytes + panel * panel_bytes;
    const bool is_last = panel + 1 == panels.end && !panels.next.empty();
    multiply(matrix, from, is_last ? panels.next.data() : from + panel_bytes, input, turned, sums);
    const PanelOutputs<Vector16> to(matrix, panel, epilogue);
    for (std::size_t row = 0; row < rows; ++row) to.write_row(sums + row * kPanelOutputs, out + row * stride);
  }
}

}  // namespace rts::cpu::avx512
