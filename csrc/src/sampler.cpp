#include "rts/sampler.hpp"

#include <algorithm>
#include <cmath>

#include "rts/philox.hpp"
#include "rts/vector_math.hpp"

namespace rts {

Sampler::Sampler(std::uint32_t vocabulary)
    : weights_(vocabulary),
      block_sums_((vocabulary + kWeightBlock - 1) / kWeightBlock),
      candidates_(vocabulary),
      adjusted_(vocabulary),
      counts_(vocabulary) {}

Sampler::Choice Sampler::sample(std::span<const float> logits, const SamplingParams& params,
                                std::span<const std::int32_t> tokens, std::uint32_t prompt_tokens,
                                std::uint32_t position) {
  float best = max_or_nan(logits);
  if (!std::isfinite(best)) return {};
  const std::span<const float> scores = penalised(logits, params, tokens, prompt_tokens);
  if (scores.data() != logits.data()) best = max_or_nan(scores);
  if (!std::isfinite(best)) return {};

  Choice choice;
  if (params.temperature < kGreedyBelow) {
    choice.token = static_cast<std::int32_t>(find_first(scores, best));
  } else {
    const double total = exp_weights(scores, best, 1.0F / params.temperature, weights_, block_sums_);
    choice.token = draw(params, total, uniform(params.seed, position));
  }
  if (params.has(SamplingParams::kLogprobs)) choice.logprob = logprob(logits, choice.token);
  return choice;
}

// Repetition as in CTRL (Keskar et al. 2019), over prompt and answer; presence and frequency over the answer.
std::span<const float> Sampler::penalised(std::span<const float> logits, const SamplingParams& params,
                                          std::span<const std::int32_t> tokens, std::uint32_t prompt_tokens) {
  const float repetition = params.repetition_penalty;
  const bool counts = params.presence_penalty != 0.0F || params.frequency_penalty != 0.0F;
  if (repetition == 1.0F && !counts) return logits;
  std::ranges::copy(logits, adjusted_.begin());
  const std::span<const std::int32_t> generated = tokens.subspan(prompt_tokens);
  if (repetition != 1.0F) {
    for (const std::int32_t token : tokens) {
      std::uint32_t& seen = counts_[static_cast<std::size_t>(token)];
      if (seen++ != 0) continue;
      float& score = adjusted_[static_cast<std::size_t>(token)];
      score = score > 0 ? score / repetition : score * repetition;
    }
    for (const std::int32_t token : tokens) counts_[static_cast<std::size_t>(token)] = 0;
  }
  if (counts) {
    for (const std::int32_t token : generated) {
      float& score = adjusted_[static_cast<std::size_t>(token)];
      if (counts_[static_cast<std::size_t>(token)]++ == 0) score -= params.presence_penalty;
      score -= params.frequency_penalty;
    }
    for (const std::int32_t token : generated) counts_[static_cast<std::size_t>(token)] = 0;
  }
  return adjusted_;
}

float Sampler::logprob(std::span<const float> logits, std::int32_t token) {
  const float best = max_or_nan(logits);
  const double total = exp_weights(logits, best, 1.0F, weights_, block_sums_);
  const double score = static_cast<double>(logits[static_cast<std::size_t>(token)]) - best;
  return static_cast<float>(score - std::log(total));
}

std::int32_t Sampler::draw(const SamplingParams& params, double total, double u) {
  const std::size_t vocabulary = weights_.size();
  const bool cuts_k = params.top_k > 0 && static_cast<std::size_t>(params.top_k) < vocabulary;
  if (!cuts_k && params.top_p >= 1.0F && params.min_p <= 0.0F) return draw_from_all(u * total);
  std::span<Candidate> kept;
  if (cuts_k) {
    kept = best_of_all(static_cast<std::size_t>(params.top_k));
    total = sum(kept);
    const auto worse = std::ranges::partition(kept, [&](const Candidate& c) { return c.weight >= params.min_p; });
    kept = kept.first(kept.size() - worse.size());
  } else {
    // Tokens under this share weigh less than 1 - top_p together, so none of them is in the nucleus; the best weighs 1.
    const double outside = (1.0 - std::min(params.top_p, 1.0F)) * total / static_cast<double>(vocabulary);
    kept = all_above(std::max(static_cast<float>(outside), params.min_p));
  }
  if (params.top_p < 1.0F) kept = best_that_weigh(params.top_p * total, kept);
  return best_that_weigh(u * sum(kept), kept).back().token;
}

std::int32_t Sampler::draw_from_all(double target) const {
  // The last block and token that can be drawn: rounding may carry the target past the end of what has weight.
  std::size_t last_block = 0;
  for (std::size_t block = 0; block < block_sums_.size(); ++block) {
    if (block_sums_[block] == 0.0) continue;
    last_block = block;
    if (target < block_sums_[block]) break;
    target -= block_sums_[block];
  }
  const std::size_t start = last_block * kWeightBlock;
  const std::size_t end = std::min(weights_.size(), start + kWeightBlock);
  std::size_t last = start;
  for (std::size_t token = start; token < end; ++token) {
    if (weights_[token] == 0.0F) continue;
    last = token;
    target -= weights_[token];
    if (target < 0) break;
  }
  return static_cast<std::int32_t>(last);
}

double Sampler::sum(std::span<const Candidate> candidates) {
  double total = 0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  return total;
}

// A half that lies inside or outside as a whole is never sorted: O(n), however many there are.
std::span<Sampler::Candidate> Sampler::best_that_weigh(double mass, std::span<Candidate> candidates) {
  std::size_t begin = 0, end = candidates.size();
  while (end - begin > 1) {
    const std::size_t middle = begin + (end - begin) / 2;
    const auto at = candidates.begin();
    std::nth_element(at + static_cast<std::ptrdiff_t>(begin), at + static_cast<std::ptrdiff_t>(middle),
                     at + static_cast<std::ptrdiff_t>(end));
    const double better = sum(candidates.subspan(begin, middle - begin));
    if (better >= mass) {
      end = middle;
    } else {
      mass -= better;
      begin = middle;
    }
  }
  return candidates.first(end);
}

std::span<Sampler::Candidate> Sampler::all_above(float threshold) {
  std::size_t count = 0;
  for (std::size_t token = 0; token < weights_.size(); ++token) {
    // Written in any case and counted if wanted: a branch here is mispredicted.
    candidates_[count] = {weights_[token], static_cast<std::int32_t>(token)};
    count += weights_[token] >= threshold ? 1 : 0;
  }
  return std::span(candidates_).first(count);
}

// One pass: whenever twice as many as are wanted have come, the worse half goes, and raises the bar for those to come.
std::span<Sampler::Candidate> Sampler::best_of_all(std::size_t wanted) {
  std::size_t count = 0;
  float bar = 0.0F;  // what is ruled out has no weight, and is no candidate
  const auto cut = [&] {
    if (count <= wanted) return;
    const auto begin = candidates_.begin(), last = begin + static_cast<std::ptrdiff_t>(wanted) - 1;
    std::nth_element(begin, last, begin + static_cast<std::ptrdiff_t>(count));
    count = wanted;
    bar = last->weight;
  };
  for (std::size_t token = 0; token < weights_.size(); ++token) {
    if (weights_[token] <= bar) continue;
    candidates_[count++] = {weights_[token], static_cast<std::int32_t>(token)};
    if (count >= 2 * wanted) cut();
  }
  cut();
  return std::span(candidates_).first(count);
}

}  // namespace rts
