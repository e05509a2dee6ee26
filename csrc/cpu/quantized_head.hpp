#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/attention.hpp"
#include "cpu/quantization.hpp"
#include "cpu/vector_ops.hpp"

// A head's numbers in 8 bits, as KvLayerInt8 has them. The kernels of every instruction set agree to the bit. Functions
// are templates of an instruction set's vector, or static: see quantization.hpp.
namespace rts::cpu {

// How many of a head's numbers are turned together: the largest power of two that divides them, 8 at least.
static constexpr std::size_t turned_together(std::size_t head_dim) noexcept {
  return head_dim & ~(head_dim - 1);
}

// A stage of turn_head() within a vector: sums in the lower lanes of each pair, differences in the higher.
template <std::size_t kDistance, typename Vector>
inline Vector lane_butterflies(Vector x) {
  static constexpr auto kSigns = [] {
    struct {
      float lanes[Vector::kLanes];
    } signs{};
    for (std::size_t lane = 0; lane < Vector::kLanes; ++lane)
      signs.lanes[lane] = (lane & kDistance) == 0 ? 1.0F : -1.0F;
    return signs;
  }();
  return multiply_add(x, Vector::load(kSigns.lanes), swap_lanes<kDistance>(x));
}

// The Walsh-Hadamard transform of each turned_together() numbers of a head, not normalised. `to` may be `from`.
template <typename Vector>
void turn_head(const float* from, std::size_t head_dim, float* to) {
  constexpr std::size_t kEight = 8;
  const auto within_eight = [](Vector x) { return lane_butterflies<4>(lane_butterflies<2>(lane_butterflies<1>(x))); };
  const std::size_t together = turned_together(head_dim);
  if (together < kLanes) {
    for (std::size_t i = 0; i < head_dim; i += kEight) within_eight(Vector::load_eight(from + i)).store_eight(to + i);
    return;
  }
  for (std::size_t i = 0; i < head_dim; i += kLanes) {
    lane_butterflies<8>(within_eight(Vector::load(from + i))).store(to + i);
  }
  for (std::size_t distance = kLanes; distance < together; distance *= 2) {
    for (std::size_t first = 0; first < head_dim; first += 2 * distance) {
      for (std::size_t i = first; i < first + distance; i += kLanes) {
        const Vector a = Vector::load(to + i), b = Vector::load(to + i + distance);
        (a + b).store(to + i);
        (a - b).store(to + i + distance);
      }
    }
  }
}

// Quantizes a head into `to`, which has room for whole vectors; returns the scale, NaN where a number is not finite.
template <typename Vector>
float quantize_head(const float* head, std::size_t head_dim, std::int8_t* to) {
  const Vector zero;
  Vector largest, poison;  // NaN of all that is not finite, 0 of all else
  for_each_vector<Vector>(head_dim, [&](auto lanes, std::size_t i) {
    const Vector x = lanes.load(head + i);
    largest = max(max(x, zero - x), largest);
    poison = multiply_add(x, zero, poison);
  });
  const float magnitude = max_of_lanes(largest);
  const Vector inverse = Vector::broadcast(kLargestValue * inverse_or_zero(magnitude));
  for_each_vector<Vector>(head_dim,
                          [&](auto lanes, std::size_t i) { (lanes.load(head + i) * inverse).store_nearest(to + i); });
  return magnitude * (1.0F / kLargestValue) + sum_of_lanes(poison);
}

}  // namespace rts::cpu
