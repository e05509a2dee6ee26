#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace rts {

// y as a weighted sum of two numbers, learned from what was seen, the latest most: least squares with exponential
// forgetting (Haykin, "Adaptive Filter Theory", ch. 10), and with a penalty on leaving the weights that were found
// before. So a weight that the latest do not tell stays as it was; and as the sums are kept, not their inverse, which
// rounding can make indefinite, the weights are finite. Numbers are to be scaled to about 1.
class LinearFit {
 public:
  using Vector = std::array<double, 2>;

  void learn(const Vector& x, double y) noexcept {
    ++observations_;
    xx_ = kMemory * xx_ + x[0] * x[0];
    xz_ = kMemory * xz_ + x[0] * x[1];
    zz_ = kMemory * zz_ + x[1] * x[1];
    for (std::size_t i = 0; i < 2; ++i) xy_[i] = kMemory * xy_[i] + x[i] * y;
    const double a = xx_ + kPenalty, d = zz_ + kPenalty, determinant = a * d - xz_ * xz_;
    const Vector right = {xy_[0] + kPenalty * weights_[0], xy_[1] + kPenalty * weights_[1]};
    weights_ = {(d * right[0] - xz_ * right[1]) / determinant, (a * right[1] - xz_ * right[0]) / determinant};
  }

  double at(const Vector& x) const noexcept { return weights_[0] * x[0] + weights_[1] * x[1]; }
  const Vector& weights() const noexcept { return weights_; }
  std::uint64_t observations() const noexcept { return observations_; }

 private:
  static constexpr double kMemory = 0.98;  // half is forgotten in 34 times
  static constexpr double kPenalty = 1e-5;

  Vector weights_{}, xy_{};
  double xx_ = 0, xz_ = 0, zz_ = 0;
  std::uint64_t observations_ = 0;
};

}  // namespace rts
