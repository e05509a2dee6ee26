#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "rts/request.hpp"

namespace rts {

// Chooses a token from a row of logits: penalties, temperature, top-k, top-p of what that leaves, min-p, then a draw.
// What it draws depends on the logits, the parameters, the seed and the position alone, so a sequence's tokens are the
// same whatever else is in the batch and however often it is started again. No allocation once warm; single-threaded.
class Sampler {
 public:
  struct Choice {
    std::int32_t token = -1;  // -1: the logits, as they are or penalised, hold NaN or +infinity or rule out every token
    float logprob = 0.0F;     // of the model, before penalties and temperature; computed where kLogprobs asks for it
  };

  explicit Sampler(std::uint32_t vocabulary);

  // `logits` has one value a token of the vocabulary; `tokens` is the sequence, its first `prompt_tokens` the prompt's,
  // and holds only ids of the vocabulary; `position` is the index of the token to be drawn among the generated ones.
  //
  // Ties go to the lowest id. A temperature under kGreedyBelow is greedy: it would carry the logits out of float32.
  static constexpr float kGreedyBelow = 1e-5F;
  Choice sample(std::span<const float> logits, const SamplingParams& params, std::span<const std::int32_t> tokens,
                std::uint32_t prompt_tokens, std::uint32_t position);

 private:
  struct Candidate {
    float weight;
    std::int32_t token;
    // The better one first; by id where they are the same, so that the order is total.
    friend bool operator<(const Candidate& a, const Candidate& b) {
      return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
    }
  };

  std::span<const float> penalised(std::span<const float> logits, const SamplingParams& params,
                                   std::span<const std::int32_t> tokens, std::uint32_t prompt_tokens);
  float logprob(std::span<const float> logits, std::int32_t token);
  std::int32_t draw(const SamplingParams& params, double total, double u);
  std::int32_t draw_from_all(double target) const;
  std::span<Candidate> all_above(float threshold);
  std::span<Candidate> best_of_all(std::size_t wanted);
  // The best candidates, as many as it takes to weigh `mass` together; the last of them is the one that completes it.
  static std::span<Candidate> best_that_weigh(double mass, std::span<Candidate> candidates);
  static double sum(std::span<const Candidate> candidates);

  std::vector<float> weights_;
  std::vector<double> block_sums_;
  std::vector<Candidate> candidates_;
  std::vector<float> adjusted_;
  std::vector<std::uint32_t> counts_;  // of each token so far; zero between calls
};

}  // namespace rts
