#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "rts/request.hpp"
#include "rts/top_logprobs.hpp"

namespace rts {

// Chooses a token from a row of logits, in this order: bias, penalties, masks; then either the best of what that
// leaves, or temperature, top-k, top-p of what that leaves, min-p and a draw. It is the order of transformers
// (generation/utils.py, _get_logits_processor); vLLM's (v1/sample/sampler.py) has min-p in front of top-k. Ruled out
// stays ruled out: where in the first three steps that happens makes no difference.
//
// What it draws depends on the logits, the parameters, the seed and the position alone, so a sequence's tokens are the
// same whatever else is in the batch and however often it is started again. No allocation once warm; single-threaded.
class Sampler {
 public:
  struct Choice {
    std::int32_t token = -1;  // -1: the logits, as they are or penalised, hold NaN or +infinity or rule out every token
    // Of the model, before bias, penalties, masks and temperature; computed where kLogprobs asks for them.
    float logprob = 0.0F;
    // The best first; fewer than were asked for where the model gives no more a probability. Valid until the next call.
    std::span<const TopLogprob> top;
  };

  // What a sequence wants beside its parameters. It holds only ids of the vocabulary.
  struct Constraints {
    std::span<const TokenBias> logit_bias = {};
    std::span<const std::int32_t> stop_token_ids = {};  // ruled out, like those that end any sequence, by min_tokens
    std::span<const std::uint32_t> allowed = {};  // a bit a token, from the lowest of each word; empty: every token is
  };

  // `eos_ids`, of the vocabulary, end any sequence.
  explicit Sampler(std::uint32_t vocabulary, std::vector<std::int32_t> eos_ids = {});

  // `logits` has one value a token of the vocabulary; `tokens` is the sequence, its first `prompt_tokens` the prompt's,
  // and holds only ids of the vocabulary; `position` is the index of the token to be drawn among the generated ones.
  //
  // Ties go to the lowest id. A temperature under kGreedyBelow is greedy: it would carry the logits out of float32.
  static constexpr float kGreedyBelow = 1e-5F;
  Choice sample(std::span<const float> logits, const SamplingParams& params, std::span<const std::int32_t> tokens,
                std::uint32_t prompt_tokens, std::uint32_t position, const Constraints& constraints);
  Choice sample(std::span<const float> logits, const SamplingParams& params, std::span<const std::int32_t> tokens,
                std::uint32_t prompt_tokens, std::uint32_t position) {
    return sample(logits, params, tokens, prompt_tokens, position, {});
  }

 private:
  struct Candidate {
    float weight;
    std::int32_t token;
    // The better one first; by id where they are the same, so that the order is total.
    friend bool operator<(const Candidate& a, const Candidate& b) {
      return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
    }
  };

  std::span<const float> adjusted(std::span<const float> logits, const SamplingParams& params,
                                  std::span<const std::int32_t> tokens, std::uint32_t prompt_tokens,
                                  std::uint32_t position, const Constraints& constraints);
  void penalise(const SamplingParams& params, std::span<const std::int32_t> tokens, std::uint32_t prompt_tokens);
  void rule_out(std::span<const std::int32_t> tokens);
  void tell_logprobs(std::span<const float> logits, float best, std::uint32_t top_logprobs, Choice& choice);
  std::int32_t draw(const SamplingParams& params, double total, double u);
  std::int32_t draw_from_all(double target) const;
  float nucleus_bar(double mass, float least) const;
  std::span<Candidate> all_above(float threshold);
  // Those `wanted` that have the largest values, in no order; only values above `bar` count.
  std::span<Candidate> best_of(std::span<const float> values, std::size_t wanted, float bar);
  // The best candidates, as many as it takes to weigh `mass` together; the last of them is the one that completes it.
  static std::span<Candidate> best_that_weigh(double mass, std::span<Candidate> candidates);
  static double sum(std::span<const Candidate> candidates);

  std::vector<float> weights_;
  std::vector<double> block_sums_;
  std::vector<Candidate> candidates_;
  std::vector<float> adjusted_;
  std::vector<std::int32_t> found_;
  std::vector<std::uint32_t> counts_;  // of each token so far; zero between calls
  std::vector<std::int32_t> eos_ids_;
  std::array<TopLogprob, kMaxTopLogprobs> top_;
};

}  // namespace rts
