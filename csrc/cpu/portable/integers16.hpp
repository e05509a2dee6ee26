#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/portable/vector16.hpp"

namespace rts::cpu::portable {

// Sixteen sums of products of integers, in loops that compilers make vectors of.
class Integers16 {
 public:
  static constexpr std::size_t kLanes = Vector16::kLanes;
  static constexpr std::size_t kRegisters = Vector16::kRegisters;
  using TileRows = Vector16::TileRows;

  // A quad, or a pair, for each lane.
  struct Quads {
    Quads() = default;
    explicit Quads(const std::byte* from) {
      std::uint32_t packed[kLanes];
      std::memcpy(packed, from, sizeof packed);
      for (std::size_t i = 0; i < 4; ++i) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
          numbers[i][lane] = static_cast<std::int32_t>(packed[lane] >> 8 * i & 0xFF);
        }
      }
    }

    std::int32_t numbers[4][kLanes];
  };
  struct Pairs {
    Pairs() = default;
    explicit Pairs(const std::byte* from) {
      std::uint16_t packed[kLanes];
      std::memcpy(packed, from, sizeof packed);
      for (std::size_t i = 0; i < 2; ++i) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
          numbers[i][lane] = static_cast<std::int8_t>(packed[lane] >> 8 * i);
        }
      }
    }

    std::int32_t numbers[2][kLanes];
  };

  static Integers16 broadcast(std::int32_t x) {
    Integers16 all;
    for (std::int32_t& lane : all.lanes_) lane = x;
    return all;
  }

  // Adds the products of a lane's four unsigned bytes with four signed ones, the same for all lanes.
  friend Integers16 add_products(Integers16 sums, const Quads& quads, std::int32_t bytes) {
    std::int8_t by[4];
    std::memcpy(by, &bytes, sizeof by);
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      sums.lanes_[lane] += quads.numbers[0][lane] * by[0] + quads.numbers[1][lane] * by[1] +
                           quads.numbers[2][lane] * by[2] + quads.numbers[3][lane] * by[3];
    }
    return sums;
  }
  // Adds the products of a lane's two bytes with two words, all signed.
  friend Integers16 add_products(Integers16 sums, const Pairs& pairs, std::int32_t words) {
    std::int16_t by[2];
    std::memcpy(by, &words, sizeof by);
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      sums.lanes_[lane] += pairs.numbers[0][lane] * by[0] + pairs.numbers[1][lane] * by[1];
    }
    return sums;
  }

  Vector16 to_floats() const {
    float floats[kLanes];
    for (std::size_t lane = 0; lane < kLanes; ++lane) floats[lane] = static_cast<float>(lanes_[lane]);
    return Vector16::load(floats);
  }

 private:
  std::int32_t lanes_[kLanes] = {};
};

}  // namespace rts::cpu::portable
