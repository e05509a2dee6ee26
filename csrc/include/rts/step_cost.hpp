#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include "rts/linear_fit.hpp"

namespace rts {

// Of prompts, in a step.
struct PromptWork {
  std::uint32_t positions = 0;
  std::uint64_t pairs = 0;  // of a position and one that it attends to

  PromptWork() = default;
  PromptWork(std::uint32_t start, std::uint32_t count) noexcept
      : positions(count), pairs(std::uint64_t{count} * start + std::uint64_t{count} * (count + 1) / 2) {}

  PromptWork& operator+=(const PromptWork& other) noexcept {
    positions += other.positions;
    pairs += other.pairs;
    return *this;
  }
};

// What a step takes, learned from those that were run: a constant and so much for each decoding sequence; and for
// prompts so much a position, and so much for each that it attends to: at a context of 2,000 that is most of it.
//
// What decoding takes is learned from steps without prompts alone, and then taken from the others before they tell what
// prompts take. Where all four were fitted at once, a prompt that was read beside the same streams for seconds let its
// growing cost pass for theirs, and who may be slowed down by a factor was slowed down ever more. A step that takes
// several times what was foreseen (a page fault, another program) counts as no more than that.
class StepCost {
 public:
  void observe(std::uint32_t decoding, const PromptWork& prompts, std::int64_t step_ns) noexcept {
    double ms = static_cast<double>(step_ns) / kNsInMs;
    const double foreseen = decoding_.at(of_decoding(decoding)) + prompts_.at(of_prompts(prompts));
    if (is_known()) ms = std::min(ms, kOutlier * std::max(foreseen, kLeastMs));
    if (prompts.positions == 0) {
      decoding_.learn(of_decoding(decoding), ms);
      prompts_.forget();  // after hours without one, the next says more than all before
      since_decoding_alone_ = 0;
      return;
    }
    prompts_.learn(of_prompts(prompts), ms - decode_ns(decoding) / kNsInMs);
    if (decoding > 0) {
      ++since_decoding_alone_;
      most_positions_ = std::max({kFirstPositions, 2 * prompts.positions, most_positions_ / 2});
    }
  }

  // Of a step without prompts.
  double decode_ns(std::uint32_t decoding) const noexcept { return decoding_.at(of_decoding(decoding)) * kNsInMs; }

  // What prompts add to that.
  double prompts_ns(const PromptWork& prompts) const noexcept { return prompts_.at(of_prompts(prompts)) * kNsInMs; }

  // Whether it is time for a step without prompts, or it would not be known any more what one takes.
  bool needs_decoding_alone() const noexcept {
    return since_decoding_alone_ >= kMostTogether || (prompts_.observations() > 0 && decoding_.observations() == 0);
  }

  // How many positions of a prompt, from `start` on, take so long; `most` while too little is known.
  std::uint32_t positions_within(double ns, std::uint32_t start, std::uint32_t most) const noexcept {
    const auto [position, pair] = prompts_.weights();
    const double each_ms = position / kPositions, deeper_ms = pair / kPairs;
    const double first_ms = each_ms + deeper_ms * start, ms = std::max(0.0, ns / kNsInMs);
    if (!is_known() || first_ms + deeper_ms <= 0) return most;
    if (ms <= 0) return 0;
    // n · first + n² / 2 · deeper = ms
    const double root = std::sqrt(first_ms * first_ms + 2 * deeper_ms * ms);
    return static_cast<std::uint32_t>(std::min(2 * ms / (first_ms + root), static_cast<double>(most)));
  }

  // Twice as many positions as were lately read beside decoding sequences: where they take more than is foreseen, that
  // shows in time.
  std::uint32_t most_beside_decoding() const noexcept {
    return is_known() ? most_positions_ : std::numeric_limits<std::uint32_t>::max();
  }

 private:
  static constexpr double kNsInMs = 1e6;
  static constexpr double kDecoding = 32, kPositions = 16, kPairs = 16 * 1024;  // that numbers are scaled by
  static constexpr double kOutlier = 4, kLeastMs = 0.05;
  static constexpr std::uint32_t kMostTogether = 32;  // steps with prompts: one without costs them 3 %
  static constexpr std::uint32_t kFirstPositions = 16;

  static LinearFit::Vector of_decoding(std::uint32_t decoding) noexcept { return {1.0, decoding / kDecoding}; }
  static LinearFit::Vector of_prompts(const PromptWork& prompts) noexcept {
    return {prompts.positions / kPositions, static_cast<double>(prompts.pairs) / kPairs};
  }
  bool is_known() const noexcept { return decoding_.observations() > 0 && prompts_.observations() > 0; }

  LinearFit decoding_, prompts_;
  std::uint32_t since_decoding_alone_ = 0;
  std::uint32_t most_positions_ = kFirstPositions;
};

}  // namespace rts
