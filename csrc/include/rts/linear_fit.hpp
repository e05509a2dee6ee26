#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace rts {

// y as a weighted sum of two numbers, learned from what was seen, the latest most: recursive least squares with
// exponential forgetting (Haykin, "Adaptive Filter Theory", ch. 10). Numbers are to be scaled so that each accounts for
// about as much of y, of which a fifth is taken for noise: what little tells of a weight changes it little, and what
// was learned of one that nothing tells of is kept, for its uncertainty is bounded.
//
// Neither weight is negative: where noise makes one so, it is 0, and the other what is then the likeliest. What is
// learned goes on from the weights as they are.
class LinearFit {
 public:
  using Vector = std::array<double, 2>;

  void learn(const Vector& x, double y) noexcept {
    ++observations_;
    const Vector px = {dot(covariance_[0], x), dot(covariance_[1], x)};
    const double scale = 1.0 / (1.0 + dot(x, px)), error = y - dot(fitted_, x);
    const Vector gain = {scale * px[0], scale * px[1]};
    for (std::size_t i = 0; i < 2; ++i) fitted_[i] += gain[i] * error;
    // In Joseph's form, (1 - gain xᵀ) P (1 - gain xᵀ)ᵀ + gain gainᵀ: rounding cannot make it indefinite.
    const Matrix keeps = {{{1 - gain[0] * x[0], -gain[0] * x[1]}, {-gain[1] * x[0], 1 - gain[1] * x[1]}}};
    const Matrix before = covariance_;
    for (std::size_t i = 0; i < 2; ++i) {
      const Vector row = {keeps[i][0] * before[0][0] + keeps[i][1] * before[1][0],
                          keeps[i][0] * before[0][1] + keeps[i][1] * before[1][1]};
      for (std::size_t j = 0; j < 2; ++j) covariance_[i][j] = dot(row, keeps[j]) + gain[i] * gain[j];
    }
    weights_ = fitted_;
    for (std::size_t i = 0; i < 2; ++i) {
      if (weights_[i] >= 0) continue;
      const double along = covariance_[1 - i][i] / covariance_[i][i];
      weights_ = {};
      weights_[1 - i] = std::max(0.0, fitted_[1 - i] - along * fitted_[i]);
      break;
    }
    forget();
  }

  // Time has passed: what was learned stays, but is less certain. Each weight's row and column of the matrix grow by as
  // much, so that it stays one of covariances.
  void forget() noexcept {
    Vector growth;
    for (std::size_t i = 0; i < 2; ++i) {
      growth[i] = std::sqrt(std::min(1 / kMemory, kMostUncertain / covariance_[i][i]));
    }
    for (std::size_t i = 0; i < 2; ++i) {
      for (std::size_t j = 0; j < 2; ++j) covariance_[i][j] *= growth[i] * growth[j];
    }
  }

  double at(const Vector& x) const noexcept { return dot(weights_, x); }
  const Vector& weights() const noexcept { return weights_; }
  std::uint64_t observations() const noexcept { return observations_; }

 private:
  using Matrix = std::array<Vector, 2>;

  static constexpr double kMemory = 0.98;       // half is forgotten in 34 times
  static constexpr double kMostUncertain = 25;  // of a weight, in the noise's variance

  static double dot(const Vector& a, const Vector& b) noexcept { return a[0] * b[0] + a[1] * b[1]; }

  Vector fitted_{};   // may be negative
  Vector weights_{};  // the likeliest that are not
  Matrix covariance_{{{kMostUncertain, 0}, {0, kMostUncertain}}};
  std::uint64_t observations_ = 0;
};

}  // namespace rts
