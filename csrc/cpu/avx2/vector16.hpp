#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace rts::cpu::avx2 {

// Sixteen floats in two registers.
class Vector16 {
  friend class Integers16;

 public:
  static constexpr std::size_t kLanes = 16;
  static constexpr std::size_t kRegisters = 7;  // pairs that a tile may take, one of the eight being left for operands
  using TileRows = std::index_sequence<6, 4, 3, 2, 1>;

  Vector16() : low_(_mm256_setzero_ps()), high_(_mm256_setzero_ps()) {}
  static Vector16 broadcast(float x) { return Vector16(_mm256_set1_ps(x), _mm256_set1_ps(x)); }

  static Vector16 load(const float* from) { return Vector16(_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)); }
  static Vector16 load(const std::uint16_t* from) { return Vector16(from_halves(from), from_halves(from + 8)); }
  // The other lanes are 0, and nothing is read for them.
  static Vector16 load_first(const float* from, std::size_t count) {
    return Vector16(_mm256_maskload_ps(from, lanes_below(count, 0)),
                    _mm256_maskload_ps(from + 8, lanes_below(count, 8)));
  }
  static Vector16 load_eight(const float* from) { return Vector16(_mm256_loadu_ps(from), _mm256_setzero_ps()); }
  static Vector16 load_eight(const std::uint16_t* from) { return Vector16(from_halves(from), _mm256_setzero_ps()); }

  void store(float* to) const {
    _mm256_storeu_ps(to, low_);
    _mm256_storeu_ps(to + 8, high_);
  }
  void store(std::uint16_t* to) const {
    to_halves(low_, to);
    to_halves(high_, to + 8);
  }
  void store_first(float* to, std::size_t count) const {
    _mm256_maskstore_ps(to, lanes_below(count, 0), low_);
    _mm256_maskstore_ps(to + 8, lanes_below(count, 8), high_);
  }
  void store_eight(float* to) const { _mm256_storeu_ps(to, low_); }
  void store_eight(std::uint16_t* to) const { to_halves(low_, to); }
  // The nearest integers, ties to even, where they are in the type's range; any where they are not.
  void store_nearest(std::int8_t* to) const {
    const __m256i pairs = nearest_in_16_bits();
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
  }
  void store_nearest(std::int16_t* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), nearest_in_16_bits());
  }

  friend Vector16 operator+(Vector16 a, Vector16 b) {
    return Vector16(_mm256_add_ps(a.low_, b.low_), _mm256_add_ps(a.high_, b.high_));
  }
  friend Vector16 operator-(Vector16 a, Vector16 b) {
    return Vector16(_mm256_sub_ps(a.low_, b.low_), _mm256_sub_ps(a.high_, b.high_));
  }
  friend Vector16 operator*(Vector16 a, Vector16 b) {
    return Vector16(_mm256_mul_ps(a.low_, b.low_), _mm256_mul_ps(a.high_, b.high_));
  }
  friend Vector16 operator/(Vector16 a, Vector16 b) {
    return Vector16(_mm256_div_ps(a.low_, b.low_), _mm256_div_ps(a.high_, b.high_));
  }
  // a × b + c
  friend Vector16 multiply_add(Vector16 a, Vector16 b, Vector16 c) {
    return Vector16(_mm256_fmadd_ps(a.low_, b.low_, c.low_), _mm256_fmadd_ps(a.high_, b.high_, c.high_));
  }
  // `b` where a lane of either is NaN.
  friend Vector16 max(Vector16 a, Vector16 b) {
    return Vector16(_mm256_max_ps(a.low_, b.low_), _mm256_max_ps(a.high_, b.high_));
  }
  // `yes` in the lanes where a < b, so `no` where either is NaN.
  friend Vector16 select_less(Vector16 a, Vector16 b, Vector16 yes, Vector16 no) {
    return Vector16(_mm256_blendv_ps(no.low_, yes.low_, _mm256_cmp_ps(a.low_, b.low_, _CMP_LT_OQ)),
                    _mm256_blendv_ps(no.high_, yes.high_, _mm256_cmp_ps(a.high_, b.high_, _CMP_LT_OQ)));
  }
  // `in` in the lanes [begin, end), end being at most 16.
  static Vector16 select_lanes(std::size_t begin, std::size_t end, Vector16 in, Vector16 out) {
    const auto select = [=](__m256 own_in, __m256 own_out, int first) {
      const __m256i lanes = _mm256_andnot_si256(lanes_below(begin, first), lanes_below(end, first));
      return _mm256_blendv_ps(own_out, own_in, _mm256_castsi256_ps(lanes));
    };
    return Vector16(select(in.low_, out.low_, 0), select(in.high_, out.high_, 8));
  }
  // In lane i what is in lane i xor kDistance: a power of two.
  template <std::size_t kDistance>
  friend Vector16 swap_lanes(Vector16 x) {
    if constexpr (kDistance == 8) return Vector16(x.high_, x.low_);
    const auto swap = [](__m256 own) {
      if constexpr (kDistance == 4) return _mm256_permute2f128_ps(own, own, 1);
      return _mm256_permute_ps(own, kDistance == 2 ? 0x4E : 0xB1);
    };
    return Vector16(swap(x.low_), swap(x.high_));
  }
  // 2^n in the lanes whose number is 1.5 × 2^23 + n, n being in -126..127.
  friend Vector16 power_of_two(Vector16 rounded) {
    const auto power = [](__m256 own) {
      const __m256i exponents = _mm256_slli_epi32(_mm256_castps_si256(own), 23);
      return _mm256_castsi256_ps(_mm256_add_epi32(exponents, _mm256_set1_epi32(0x3F800000)));
    };
    return Vector16(power(rounded.low_), power(rounded.high_));
  }

  // Lanes eight apart first, then four, two, and one.
  friend float sum_of_lanes(Vector16 x) {
    const __m256 eight = _mm256_add_ps(x.low_, x.high_);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  friend float max_of_lanes(Vector16 x) {
    const __m256 eight = _mm256_max_ps(x.low_, x.high_);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }

 private:
  Vector16(__m256 low, __m256 high) : low_(low), high_(high) {}

  // All ones in the lanes `first`.. that are less than `count`.
  static __m256i lanes_below(std::size_t count, int first) {
    const __m256i lanes = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
  }
  __m256i nearest_in_16_bits() const {
    const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(low_), _mm256_cvtps_epi32(high_));
    return _mm256_permute4x64_epi64(packed, 0xD8);  // it packed each half of 128 bits for itself
  }
  static __m256 from_halves(const std::uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static void to_halves(__m256 x, std::uint16_t* to) {
    const __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  }

  __m256 low_, high_;
};

}  // namespace rts::cpu::avx2
