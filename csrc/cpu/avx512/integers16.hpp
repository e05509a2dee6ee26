#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "cpu/avx512/vector16.hpp"

namespace rts::cpu::avx512 {

// Sixteen sums of products of integers in a register. The products are in assembly: where the intrinsics are called,
// GCC 12 copies and spills a tile's sums, and 128 positions that attend to 2,000 take the default model 190 ms and not
// 130.
class Integers16 {
 public:
  static constexpr std::size_t kRegisters = Vector16::kRegisters;
  using TileRows = Vector16::TileRows;

  // A quad, or a pair, for each lane.
  struct Quads {
    Quads() = default;
    explicit Quads(const std::byte* from) : bytes(_mm512_loadu_si512(from)) {}

    __m512i bytes;
  };
  struct Pairs {
    Pairs() = default;
    explicit Pairs(const std::byte* from)
        : words(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))) {}

    __m512i words;
  };

  Integers16() : value_(_mm512_setzero_si512()) {}
  static Integers16 broadcast(std::int32_t x) { return Integers16(_mm512_set1_epi32(x)); }

  // Adds the products of a lane's four unsigned bytes with four signed ones, the same for all lanes.
  friend Integers16 add_products(Integers16 sums, Quads quads, std::int32_t bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums.value_) : "v"(quads.bytes), "v"(_mm512_set1_epi32(bytes)));
    return sums;
  }
  // Adds the products of a lane's two bytes with two words, all signed.
  friend Integers16 add_products(Integers16 sums, Pairs pairs, std::int32_t words) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sums.value_) : "v"(pairs.words), "v"(_mm512_set1_epi32(words)));
    return sums;
  }

  Vector16 to_floats() const { return Vector16(_mm512_maskz_cvtepi32_ps(Vector16::kAll, value_)); }

 private:
  explicit Integers16(__m512i value) : value_(value) {}

  __m512i value_;
};

}  // namespace rts::cpu::avx512
