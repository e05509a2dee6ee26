#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

namespace rts {

// What a step takes, learned from those that were run: a constant, so much for each decoding sequence and so much for
// each position of a prompt.
//
// Recursive least squares with exponential forgetting (Haykin, "Adaptive Filter Theory", ch. 10), on numbers scaled to
// about 1. A step that takes several times what was foreseen (a page fault, another program) counts as no more than
// that, and what was learned of a weight that is not excited is kept: its uncertainty is bounded. A step without
// prompts leaves what their positions cost as it is, which is then "considered" and not estimated (Schmidt,
// "Application of State-Space Methods to Navigation Problems", 1966): noise would carry it away, and certainty with it.
class StepCost {
 public:
  void observe(std::uint32_t decoding, std::uint32_t prompt_positions, std::int64_t step_ns) noexcept {
    const Vector x = features(decoding, prompt_positions);
    double y = static_cast<double>(step_ns) / kUnitNs;
    const double foreseen = dot(weights_, x);
    if (observed_ >= kTrustedAfter) y = std::min(y, kOutlier * std::max(foreseen, kLeastMs));
    ++observed_;

    const std::size_t estimated = prompt_positions == 0 ? kPosition : kSize;
    Vector gain{}, growth{1, 1, 1};
    for (std::size_t i = 0; i < kSize; ++i) gain[i] = dot(covariance_[i], x);
    const double scale = 1.0 / (kMemory + dot(x, gain));
    for (std::size_t i = 0; i < estimated; ++i) weights_[i] += scale * gain[i] * (y - foreseen);
    for (std::size_t i = 0; i < kSize; ++i) {
      for (std::size_t j = 0; j < kSize; ++j) {
        if (i < estimated || j < estimated) covariance_[i][j] -= scale * gain[i] * gain[j];
      }
    }
    // Each weight's by itself: its rows and columns grow by as much, so that the matrix stays one of covariances.
    for (std::size_t i = 0; i < estimated; ++i) {
      growth[i] = std::sqrt(std::min(1 / kMemory, kMostUncertain / covariance_[i][i]));
    }
    for (std::size_t i = 0; i < kSize; ++i) {
      for (std::size_t j = 0; j < kSize; ++j) covariance_[i][j] *= growth[i] * growth[j];
    }
  }

  // Of a step without prompts.
  double decode_ns(std::uint32_t decoding) const noexcept {
    return std::max(0.0, dot(weights_, features(decoding, 0))) * kUnitNs;
  }
  // How many positions of prompts keep a step with so many decoding sequences within the time; `most` while too little
  // is known, or where they cost nothing.
  std::uint32_t prompt_positions_within(std::int64_t step_ns, std::uint32_t decoding,
                                        std::uint32_t most) const noexcept {
    const double each_ns = weights_[kPosition] / kPositions * kUnitNs;
    if (observed_ < kTrustedAfter || each_ns <= 0) return most;
    const double positions = (static_cast<double>(step_ns) - decode_ns(decoding)) / each_ns;
    return static_cast<std::uint32_t>(std::clamp(positions, 0.0, static_cast<double>(most)));
  }

 private:
  static constexpr std::size_t kSize = 3, kPosition = 2;  // weights, and which of them is a position's
  using Vector = std::array<double, kSize>;

  static constexpr double kUnitNs = 1e6, kDecoding = 32, kPositions = 512;  // what the numbers are scaled by
  static constexpr double kMemory = 0.98;                                   // half is forgotten in 34 steps
  static constexpr double kMostUncertain = 1e4;
  static constexpr double kOutlier = 4, kLeastMs = 0.05;
  static constexpr std::uint64_t kTrustedAfter = 8;

  static double dot(const Vector& a, const Vector& b) noexcept { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
  static Vector features(std::uint32_t decoding, std::uint32_t positions) noexcept {
    return {1.0, decoding / kDecoding, positions / kPositions};
  }

  Vector weights_{};
  std::array<Vector, kSize> covariance_{{{1e4, 0, 0}, {0, 1e4, 0}, {0, 0, 1e4}}};
  std::uint64_t observed_ = 0;
};

}  // namespace rts
