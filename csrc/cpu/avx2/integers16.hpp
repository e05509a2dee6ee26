#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "cpu/avx2/vector16.hpp"

namespace rts::cpu::avx2 {

// Sixteen sums of products of integers in two registers. Bytes become words, whose products cannot overflow.
class Integers16 {
 public:
  static constexpr std::size_t kRegisters = 5;  // pairs that a tile may take of the eight: an operand takes two
  using TileRows = std::index_sequence<4, 3, 2, 1>;

  // A quad, or a pair, for each lane.
  struct Quads {
    Quads() = default;
    explicit Quads(const std::byte* from) {
      for (std::size_t half = 0; half < 2; ++half) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + half);
        even[half] = _mm256_and_si256(bytes, _mm256_set1_epi16(0xFF));
        odd[half] = _mm256_srli_epi16(bytes, 8);
      }
    }

    __m256i even[2], odd[2];  // bytes of a quad
  };
  struct Pairs {
    Pairs() = default;
    explicit Pairs(const std::byte* from) {
      for (std::size_t half = 0; half < 2; ++half) {
        words[half] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + half));
      }
    }

    __m256i words[2];
  };

  Integers16() : Integers16(broadcast(0)) {}
  static Integers16 broadcast(std::int32_t x) { return Integers16(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }

  // Adds the products of a lane's four unsigned bytes with four signed ones, the same for all lanes.
  friend Integers16 add_products(Integers16 sums, const Quads& quads, std::int32_t bytes) {
    const __m256i all = _mm256_set1_epi32(bytes);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), odd = _mm256_srai_epi16(all, 8);
    const auto products = [&](std::size_t half) {
      return _mm256_add_epi32(_mm256_madd_epi16(quads.even[half], even), _mm256_madd_epi16(quads.odd[half], odd));
    };
    return Integers16(_mm256_add_epi32(sums.low_, products(0)), _mm256_add_epi32(sums.high_, products(1)));
  }
  // Adds the products of a lane's two bytes with two words, all signed.
  friend Integers16 add_products(Integers16 sums, const Pairs& pairs, std::int32_t words) {
    const __m256i all = _mm256_set1_epi32(words);
    return Integers16(_mm256_add_epi32(sums.low_, _mm256_madd_epi16(pairs.words[0], all)),
                      _mm256_add_epi32(sums.high_, _mm256_madd_epi16(pairs.words[1], all)));
  }

  Vector16 to_floats() const { return Vector16(_mm256_cvtepi32_ps(low_), _mm256_cvtepi32_ps(high_)); }

 private:
  Integers16(__m256i low, __m256i high) : low_(low), high_(high) {}

  __m256i low_, high_;
};

}  // namespace rts::cpu::avx2
