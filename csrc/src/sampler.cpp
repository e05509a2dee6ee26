#include "rts/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "rts/philox.hpp"
#include "rts/vector_math.hpp"

namespace rts {

Sampler::Sampler(std::uint32_t vocabulary, std::vector<std::int32_t> eos_ids)
    : weights_(vocabulary),
      block_sums_((vocabulary + kWeightBlock - 1) / kWeightBlock),
      candidates_(vocabulary),
      adjusted_(vocabulary),
      found_(vocabulary),
      counts_(vocabulary),
      eos_ids_(std::move(eos_ids)) {}

Sampler::Choice Sampler::sample(std::span<const float> logits, const SamplingParams& params,
                                std::span<const std::int32_t> tokens, std::uint32_t prompt_tokens,
                                std::uint32_t position, const Constraints& constraints) {
  const float best_logit = max_or_nan(logits);
  if (!std::isfinite(best_logit)) return {};
  const std::span<const float> scores = adjusted(logits, params, tokens, prompt_tokens, position, constraints);
  const float best = scores.data() != logits.data() ? max_or_nan(scores) : best_logit;
  if (!std::isfinite(best)) return {};

  Choice choice;
  if (params.temperature < kGreedyBelow) {
    choice.token = static_cast<std::int32_t>(find_first(scores, best));
  } else {
    const double total = exp_weights(scores, best, 1.0F / params.temperature, weights_, block_sums_);
    choice.token = draw(params, total, uniform(params.seed, position));
  }
  if (params.has(SamplingParams::kLogprobs)) tell_logprobs(logits, best_logit, params.top_logprobs, choice);
  return choice;
}

// The logits themselves where nothing changes them; else one pass over the vocabulary, and one a token that is named.
std::span<const float> Sampler::adjusted(std::span<const float> logits, const SamplingParams& params,
                                         std::span<const std::int32_t> tokens, std::uint32_t prompt_tokens,
                                         std::uint32_t position, const Constraints& constraints) {
  const bool penalises =
      params.repetition_penalty != 1.0F || params.presence_penalty != 0.0F || params.frequency_penalty != 0.0F;
  const bool goes_on = params.must_go_on(position) && !(eos_ids_.empty() && constraints.stop_token_ids.empty());
  const bool masks = !constraints.allowed.empty();
  if (!penalises && !goes_on && !masks && constraints.logit_bias.empty()) return logits;

  if (masks) {
    copy_allowed(logits, constraints.allowed, adjusted_);
  } else {
    std::ranges::copy(logits, adjusted_.begin());
  }
  for (const TokenBias& entry : constraints.logit_bias) adjusted_[static_cast<std::size_t>(entry.token)] += entry.bias;
  if (penalises) penalise(params, tokens, prompt_tokens);
  if (goes_on) {
    rule_out(eos_ids_);
    rule_out(constraints.stop_token_ids);
  }
  return adjusted_;
}

void Sampler::rule_out(std::span<const std::int32_t> tokens) {
  for (const std::int32_t token : tokens) {
    adjusted_[static_cast<std::size_t>(token)] = -std::numeric_limits<float>::infinity();
  }
}

// Repetition as in CTRL (Keskar et al. 2019), over prompt and answer; presence and frequency over the answer.
void Sampler::penalise(const SamplingParams& params, std::span<const std::int32_t> tokens,
                       std::uint32_t prompt_tokens) {
  const float repetition = params.repetition_penalty;
  if (repetition != 1.0F) {
    for (const std::int32_t token : tokens) {
      std::uint32_t& seen = counts_[static_cast<std::size_t>(token)];
      if (seen++ != 0) continue;
      float& score = adjusted_[static_cast<std::size_t>(token)];
      score = score > 0 ? score / repetition : score * repetition;
    }
    for (const std::int32_t token : tokens) counts_[static_cast<std::size_t>(token)] = 0;
  }
  if (params.presence_penalty != 0.0F || params.frequency_penalty != 0.0F) {
    const std::span<const std::int32_t> generated = tokens.subspan(prompt_tokens);
    for (const std::int32_t token : generated) {
      float& score = adjusted_[static_cast<std::size_t>(token)];
      if (counts_[static_cast<std::size_t>(token)]++ == 0) score -= params.presence_penalty;
      score -= params.frequency_penalty;
    }
    for (const std::int32_t token : generated) counts_[static_cast<std::size_t>(token)] = 0;
  }
}

void Sampler::tell_logprobs(std::span<const float> logits, float best, std::uint32_t top_logprobs, Choice& choice) {
  const double log_total = std::log(exp_weights(logits, best, 1.0F, weights_, block_sums_));
  const auto logprob = [&](float logit) { return static_cast<float>(static_cast<double>(logit) - best - log_total); };
  choice.logprob = logprob(logits[static_cast<std::size_t>(choice.token)]);
  if (top_logprobs == 0) return;
  const std::size_t wanted = std::min(top_logprobs, kMaxTopLogprobs);
  const std::span<Candidate> best_tokens = best_of(logits, wanted, -std::numeric_limits<float>::infinity());
  std::ranges::sort(best_tokens, std::less<>());
  for (std::size_t i = 0; i < best_tokens.size(); ++i) top_[i] = {best_tokens[i].token, logprob(best_tokens[i].weight)};
  choice.top = std::span(top_).first(best_tokens.size());
}

std::int32_t Sampler::draw(const SamplingParams& params, double total, double u) {
  const std::size_t vocabulary = weights_.size();
  const bool cuts_k = params.top_k > 0 && static_cast<std::size_t>(params.top_k) < vocabulary;
  if (!cuts_k && params.top_p >= 1.0F && params.min_p <= 0.0F) return draw_from_all(u * total);
  std::span<Candidate> kept;
  if (cuts_k) {
    // What is ruled out has no weight, and is no candidate.
    kept = best_of(weights_, static_cast<std::size_t>(params.top_k), 0.0F);
    total = sum(kept);
    const auto worse = std::ranges::partition(kept, [&](const Candidate& c) { return c.weight >= params.min_p; });
    kept = kept.first(kept.size() - worse.size());
  } else {
    // Tokens under this share weigh less than 1 - top_p together, so none of them is in the nucleus; the best weighs 1.
    const double outside = (1.0 - std::min(params.top_p, 1.0F)) * total / static_cast<double>(vocabulary);
    const float least = std::max(static_cast<float>(outside), params.min_p);
    kept = all_above(params.top_p < 1.0F ? nucleus_bar(params.top_p * total, least) : least);
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

// A weight that all of the nucleus have, and few others: the largest power of two whose betters weigh `mass` together,
// found by some four passes that cost less than the candidates which they spare; `least` where there is none above it.
float Sampler::nucleus_bar(double mass, float least) const {
  constexpr double kMargin = 1e-5;  // beyond what the sums' rounding, in float within a block, can make up
  // 2^-none is too much, 2^-enough is not; the least is not either.
  int none = 0, enough = std::max(-std::ilogb(std::max(least, std::numeric_limits<float>::min())), 1);
  const int all = enough;
  while (enough - none > 1) {
    const int middle = none + (enough - none) / 2;
    const bool suffices = sum_above(weights_, std::ldexp(1.0F, -middle)) >= mass * (1 + kMargin);
    (suffices ? enough : none) = middle;
  }
  return enough == all ? least : std::ldexp(1.0F, -enough);
}

std::span<Sampler::Candidate> Sampler::all_above(float threshold) {
  const std::size_t count = find_above(weights_, threshold, found_);
  for (std::size_t i = 0; i < count; ++i) {
    candidates_[i] = {weights_[static_cast<std::size_t>(found_[i])], found_[i]};
  }
  return std::span(candidates_).first(count);
}

// One pass: whenever twice as many as are wanted have come, the worse half goes, and raises the bar for those to come.
std::span<Sampler::Candidate> Sampler::best_of(std::span<const float> values, std::size_t wanted, float bar) {
  std::size_t count = 0;
  const auto cut = [&] {
    if (count <= wanted) return;
    const auto begin = candidates_.begin(), last = begin + static_cast<std::ptrdiff_t>(wanted) - 1;
    std::nth_element(begin, last, begin + static_cast<std::ptrdiff_t>(count));
    count = wanted;
    bar = last->weight;
  };
  for (std::size_t token = 0; token < values.size(); ++token) {
    if (values[token] <= bar) continue;
    candidates_[count++] = {values[token], static_cast<std::int32_t>(token)};
    if (count >= 2 * wanted) cut();
  }
  cut();
  return std::span(candidates_).first(count);
}

}  // namespace rts
