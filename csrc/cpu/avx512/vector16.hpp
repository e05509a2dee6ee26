#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace rts::cpu::avx512 {

// Sixteen floats in a register.
class Vector16 {
  friend class Integers16;

 public:
  static constexpr std::size_t kLanes = 16;
  static constexpr std::size_t kRegisters = 30;  // that a tile may take, two of the 32 being left for operands
  using TileRows = std::index_sequence<12, 6, 4, 3, 2, 1>;

  Vector16() : value_(_mm512_setzero_ps()) {}
  static Vector16 broadcast(float x) { return Vector16(_mm512_set1_ps(x)); }

  static Vector16 load(const float* from) { return Vector16(_mm512_loadu_ps(from)); }
  static Vector16 load(const std::uint16_t* from) {
    return Vector16(_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
  // The other lanes are 0, and nothing is read for them.
  static Vector16 load_first(const float* from, std::size_t count) {
    return Vector16(_mm512_maskz_loadu_ps(lanes_below(count), from));
  }
  static Vector16 load_eight(const float* from) { return load_first(from, 8); }
  static Vector16 load_eight(const std::uint16_t* from) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return Vector16(_mm512_maskz_cvtph_ps(kAll, _mm256_zextsi128_si256(eight)));
  }

  void store(float* to) const { _mm512_storeu_ps(to, value_); }
  void store(std::uint16_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves()); }
  void store_first(float* to, std::size_t count) const { _mm512_mask_storeu_ps(to, lanes_below(count), value_); }
  void store_eight(float* to) const { store_first(to, 8); }
  void store_eight(std::uint16_t* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(halves()));
  }
  // The nearest integers, ties to even, where they are in the type's range; any where they are not.
  void store_nearest(std::int8_t* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(kAll, nearest()));
  }
  void store_nearest(std::int16_t* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(kAll, nearest()));
  }

  friend Vector16 operator+(Vector16 a, Vector16 b) { return Vector16(_mm512_add_ps(a.value_, b.value_)); }
  friend Vector16 operator-(Vector16 a, Vector16 b) { return Vector16(_mm512_sub_ps(a.value_, b.value_)); }
  friend Vector16 operator*(Vector16 a, Vector16 b) { return Vector16(_mm512_mul_ps(a.value_, b.value_)); }
  friend Vector16 operator/(Vector16 a, Vector16 b) { return Vector16(_mm512_div_ps(a.value_, b.value_)); }
  // a × b + c
  friend Vector16 multiply_add(Vector16 a, Vector16 b, Vector16 c) {
    return Vector16(_mm512_fmadd_ps(a.value_, b.value_, c.value_));
  }
  // `b` where a lane of either is NaN.
  friend Vector16 max(Vector16 a, Vector16 b) { return Vector16(_mm512_maskz_max_ps(kAll, a.value_, b.value_)); }
  // `yes` in the lanes where a < b, so `no` where either is NaN.
  friend Vector16 select_less(Vector16 a, Vector16 b, Vector16 yes, Vector16 no) {
    return Vector16(_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.value_, b.value_, _CMP_LT_OQ), no.value_, yes.value_));
  }
  // `in` in the lanes [begin, end), end being at most 16.
  static Vector16 select_lanes(std::size_t begin, std::size_t end, Vector16 in, Vector16 out) {
    return Vector16(_mm512_mask_blend_ps(_kandn_mask16(lanes_below(begin), lanes_below(end)), out.value_, in.value_));
  }
  // In lane i what is in lane i xor kDistance: a power of two.
  template <std::size_t kDistance>
  friend Vector16 swap_lanes(Vector16 x) {
    if constexpr (kDistance == 8) return Vector16(_mm512_maskz_shuffle_f32x4(kAll, x.value_, x.value_, 0x4E));
    if constexpr (kDistance == 4) return Vector16(_mm512_maskz_shuffle_f32x4(kAll, x.value_, x.value_, 0xB1));
    return Vector16(_mm512_maskz_permute_ps(kAll, x.value_, kDistance == 2 ? 0x4E : 0xB1));
  }
  // 2^n in the lanes whose number is 1.5 × 2^23 + n, n being in -126..127.
  friend Vector16 power_of_two(Vector16 rounded) {
    const __m512i exponents = _mm512_maskz_slli_epi32(kAll, _mm512_castps_si512(rounded.value_), 23);
    return Vector16(_mm512_castsi512_ps(_mm512_add_epi32(exponents, _mm512_set1_epi32(0x3F800000))));
  }

  // Lanes eight apart first, then four, two, and one.
  friend float sum_of_lanes(Vector16 x) {
    const __m256 eight = _mm256_add_ps(x.eight<0>(), x.eight<1>());
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  friend float max_of_lanes(Vector16 x) {
    const __m256 eight = _mm256_max_ps(x.eight<0>(), x.eight<1>());
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }

 private:
  // Of masked instructions, which become the plain ones: GCC 12 takes what its plain intrinsics leave undefined for a
  // use of an uninitialized variable.
  static constexpr __mmask16 kAll = 0xFFFF;

  explicit Vector16(__m512 value) : value_(value) {}

  static __mmask16 lanes_below(std::size_t count) { return static_cast<__mmask16>((1U << count) - 1U); }
  template <int kHalf>
  __m256 eight() const {
    return _mm512_maskz_extractf32x8_ps(static_cast<__mmask8>(kAll), value_, kHalf);
  }
  __m512i nearest() const { return _mm512_maskz_cvtps_epi32(kAll, value_); }
  __m256i halves() const { return _mm512_maskz_cvtps_ph(kAll, value_, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  __m512 value_;
};

}  // namespace rts::cpu::avx512
