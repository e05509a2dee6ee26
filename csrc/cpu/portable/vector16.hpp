#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/quantization.hpp"
#include "rts/half.hpp"

namespace rts::cpu::portable {

// Sixteen floats in the 16-byte vectors that every processor has. Nothing is fused: a sum of a product rounds twice.
class Vector16 {
 public:
  static constexpr std::size_t kLanes = 16;
  // A tile has more sums than there are registers: to keep them in the first-level cache costs less than to convert a
  // key or a value for fewer rows (16 queries of 3 heads: 13.6 GFLOP/s; with 4 rows a tile 7.6).
  static constexpr std::size_t kRegisters = 4;
  using TileRows = std::index_sequence<12, 6, 4, 3, 2, 1>;

  Vector16() : parts_{} {}
  static Vector16 broadcast(float x) {
    return of_parts([x](std::size_t) { return Four{x, x, x, x}; });
  }

  static Vector16 load(const float* from) {
    Vector16 x;
    std::memcpy(x.parts_, from, sizeof x.parts_);
    return x;
  }
  static Vector16 load(const std::uint16_t* from) {
    float lanes[kLanes];
    for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] = from_half(from[lane]);
    return load(lanes);
  }
  // The other lanes are 0, and nothing is read for them.
  static Vector16 load_first(const float* from, std::size_t count) {
    float lanes[kLanes] = {};
    std::memcpy(lanes, from, count * sizeof(float));
    return load(lanes);
  }
  static Vector16 load_eight(const float* from) { return load_first(from, 8); }
  static Vector16 load_eight(const std::uint16_t* from) {
    std::uint16_t halves[kLanes] = {};
    std::memcpy(halves, from, sizeof halves / 2);
    return load(halves);
  }

  void store(float* to) const { std::memcpy(to, parts_, sizeof parts_); }
  void store(std::uint16_t* to) const {
    float lanes[kLanes];
    store(lanes);
    for (std::size_t lane = 0; lane < kLanes; ++lane) to[lane] = to_half(lanes[lane]);
  }
  void store_first(float* to, std::size_t count) const { std::memcpy(to, parts_, count * sizeof(float)); }
  void store_eight(float* to) const { store_first(to, 8); }
  void store_eight(std::uint16_t* to) const {
    std::uint16_t halves[kLanes];
    store(halves);
    std::memcpy(to, halves, sizeof halves / 2);
  }

  // The nearest integers, ties to even, where they are in the type's range; any where they are not.
  template <typename Integer>
  void store_nearest(Integer* to) const {
    static_assert(sizeof(Integer) <= sizeof(std::int16_t));
    float lanes[kLanes];
    store(lanes);
    for (std::size_t lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<Integer>(nearest(lanes[lane]));
  }

  friend Vector16 operator+(Vector16 a, Vector16 b) {
    return of_parts([&](std::size_t i) { return a.parts_[i] + b.parts_[i]; });
  }
  friend Vector16 operator-(Vector16 a, Vector16 b) {
    return of_parts([&](std::size_t i) { return a.parts_[i] - b.parts_[i]; });
  }
  friend Vector16 operator*(Vector16 a, Vector16 b) {
    return of_parts([&](std::size_t i) { return a.parts_[i] * b.parts_[i]; });
  }
  friend Vector16 operator/(Vector16 a, Vector16 b) {
    return of_parts([&](std::size_t i) { return a.parts_[i] / b.parts_[i]; });
  }
  // a × b + c
  friend Vector16 multiply_add(Vector16 a, Vector16 b, Vector16 c) {
    return of_parts([&](std::size_t i) { return a.parts_[i] * b.parts_[i] + c.parts_[i]; });
  }
  // `b` where a lane of either is NaN.
  friend Vector16 max(Vector16 a, Vector16 b) {
    return of_parts([&](std::size_t i) { return a.parts_[i] > b.parts_[i] ? a.parts_[i] : b.parts_[i]; });
  }
  // `yes` in the lanes where a < b, so `no` where either is NaN.
  friend Vector16 select_less(Vector16 a, Vector16 b, Vector16 yes, Vector16 no) {
    return of_parts([&](std::size_t i) { return a.parts_[i] < b.parts_[i] ? yes.parts_[i] : no.parts_[i]; });
  }
  // `in` in the lanes [begin, end), end being at most 16.
  static Vector16 select_lanes(std::size_t begin, std::size_t end, Vector16 in, Vector16 out) {
    float lanes[kLanes], others[kLanes];
    in.store(lanes);
    out.store(others);
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      if (lane < begin || lane >= end) lanes[lane] = others[lane];
    }
    return load(lanes);
  }
  // In lane i what is in lane i xor kDistance: a power of two.
  template <std::size_t kDistance>
  friend Vector16 swap_lanes(Vector16 x) {
    if constexpr (kDistance >= 4) return of_parts([&](std::size_t i) { return x.parts_[i ^ kDistance / 4]; });
    return of_parts([&](std::size_t i) {
      const Four own = x.parts_[i];
      return kDistance == 2 ? Four{own[2], own[3], own[0], own[1]} : Four{own[1], own[0], own[3], own[2]};
    });
  }
  // 2^n in the lanes whose number is 1.5 × 2^23 + n, n being in -126..127.
  friend Vector16 power_of_two(Vector16 rounded) {
    return of_parts([&](std::size_t i) {
      return std::bit_cast<Four>((std::bit_cast<FourBits>(rounded.parts_[i]) << 23) + 0x3F800000U);
    });
  }

  // Lanes eight apart first, then four, two, and one.
  friend float sum_of_lanes(Vector16 x) {
    const Four four = (x.parts_[0] + x.parts_[2]) + (x.parts_[1] + x.parts_[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
  friend float max_of_lanes(Vector16 x) {
    float lanes[kLanes];
    x.store(lanes);
    float largest = lanes[0];
    for (const float lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
  }

 private:
  using Four = float __attribute__((vector_size(16)));
  using FourBits = std::uint32_t __attribute__((vector_size(16)));

  template <typename PartOf>
  static Vector16 of_parts(PartOf part_of) {
    Vector16 x;
    x.parts_[0] = part_of(0);
    x.parts_[1] = part_of(1);
    x.parts_[2] = part_of(2);
    x.parts_[3] = part_of(3);
    return x;
  }

  Four parts_[4];
};

}  // namespace rts::cpu::portable
