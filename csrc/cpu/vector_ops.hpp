#pragma once

#include <cmath>
#include <cstddef>

// Passes over a row, over a vector type. What `lanes` reads past the row's end is 0, and nothing is written there.
namespace rts::cpu {

template <typename Vector>
struct AllLanes {
  Vector load(const float* from) const { return Vector::load(from); }
  void store(Vector x, float* to) const { x.store(to); }
  Vector keep(Vector x) const { return x; }
};

template <typename Vector>
struct FirstLanes {
  std::size_t count;

  Vector load(const float* from) const { return Vector::load_first(from, count); }
  void store(Vector x, float* to) const { x.store_first(to, count); }
  Vector keep(Vector x) const { return Vector::select_lanes(0, count, x, Vector()); }
};

template <typename Vector, typename Pass>
void for_each_vector(std::size_t size, Pass pass) {
  std::size_t i = 0;
  for (; i + Vector::kLanes <= size; i += Vector::kLanes) pass(AllLanes<Vector>(), i);
  if (i < size) pass(FirstLanes<Vector>{size - i}, i);
}

// `add_to(sum, lanes, i)` for each vector, in turns over four sums, none of which waits for another.
template <typename Vector, typename AddTo>
float sum_over(std::size_t size, AddTo add_to) {
  constexpr std::size_t kSums = 4, kStride = kSums * Vector::kLanes;
  Vector sums[kSums];
  std::size_t i = 0;
  for (; i + kStride <= size; i += kStride) {
    for (std::size_t k = 0; k < kSums; ++k) sums[k] = add_to(sums[k], AllLanes<Vector>(), i + k * Vector::kLanes);
  }
  std::size_t next = 0;
  for (; i + Vector::kLanes <= size; i += Vector::kLanes, ++next)
    sums[next] = add_to(sums[next], AllLanes<Vector>(), i);
  if (i < size) sums[next] = add_to(sums[next], FirstLanes<Vector>{size - i}, i);
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename Vector>
void rms_norm_over(const float* x, const float* weight, std::size_t size, float epsilon, float* out) {
  const float squares = sum_over<Vector>(size, [x](Vector sum, auto lanes, std::size_t i) {
    const Vector own = lanes.load(x + i);
    return multiply_add(own, own, sum);
  });
  const Vector factor = Vector::broadcast(1.0F / std::sqrt(squares / static_cast<float>(size) + epsilon));
  for_each_vector<Vector>(size, [=](auto lanes, std::size_t i) {
    lanes.store(lanes.load(x + i) * factor * lanes.load(weight + i), out + i);
  });
}

template <typename Vector>
void layer_norm_over(const float* x, const float* weight, const float* bias, std::size_t size, float epsilon,
                     float* out) {
  const float count = static_cast<float>(size);
  const float sum =
      sum_over<Vector>(size, [x](Vector partial, auto lanes, std::size_t i) { return partial + lanes.load(x + i); });
  const Vector mean = Vector::broadcast(sum / count);
  const float squares = sum_over<Vector>(size, [=](Vector partial, auto lanes, std::size_t i) {
    const Vector centred = lanes.keep(lanes.load(x + i) - mean);
    return multiply_add(centred, centred, partial);
  });
  const Vector factor = Vector::broadcast(1.0F / std::sqrt(squares / count + epsilon));
  for_each_vector<Vector>(size, [=](auto lanes, std::size_t i) {
    const Vector centred = lanes.load(x + i) - mean;
    lanes.store(multiply_add(centred * factor, lanes.load(weight + i), lanes.load(bias + i)), out + i);
  });
}

template <typename Vector>
void rotate_positions_over(float* x, std::size_t size, const float* cosines, const float* sines) {
  const std::size_t half = size / 2;
  for_each_vector<Vector>(half, [=](auto lanes, std::size_t i) {
    const Vector first = lanes.load(x + i), second = lanes.load(x + half + i);
    const Vector cosine = lanes.load(cosines + i), sine = lanes.load(sines + i);
    lanes.store(first * cosine - second * sine, x + i);
    lanes.store(multiply_add(second, cosine, first * sine), x + half + i);
  });
}

template <typename Vector>
void add_over(float* x, const float* y, std::size_t size) {
  for_each_vector<Vector>(
      size, [=](auto lanes, std::size_t i) { lanes.store(lanes.load(x + i) + lanes.load(y + i), x + i); });
}

}  // namespace rts::cpu
