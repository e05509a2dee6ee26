#include "rts/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "rts/philox.hpp"
#include "rts/vector_math.hpp"

namespace rts {

Sampler::Sampler(std::uint32_t vocabulary)
    : weights_(vocabulary),
      block_sums_((vocabulary + kWeightBlock - 1) / kWeightBlock),
      adjusted_(vocabulary),
      counts_(vocabulary) {
  candidates_.reserve(vocabulary);
}

Sampler::Choice Sampler::sample(std::span<const float> logits, const SamplingParams& params,
                                std::span<const std::int32_t> tokens, std::uint32_t prompt_tokens,
                                std::uint32_t position) {
  float best = max_or_nan(logits);
  if (!std::isfinite(best)) return {};
  const std::span<const float> scores = penalised(logits, params, tokens, prompt_tokens);
  if (scores.data() != logits.data()) best = max_or_nan(scores);

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
  const double score = logits[static_cast<std::size_t>(token)] - best;
  return static_cast<float>(score - std::log(total));
}

std::int32_t Sampler::draw(const SamplingParams& params, double total, double u) {
  const std::size_t vocabulary = weights_.size();
  const bool cuts_k = params.top_k > 0 && static_cast<std::size_t>(params.top_k) < vocabulary;
  if (!cuts_k && params.top_p >= 1.0F && params.min_p <= 0.0F) return draw_from_all(u * total);
  if (cuts_k) {
    keep_best(static_cast<std::size_t>(params.top_k));
    total = 0;
    for (const Candidate& candidate : candidates_) total += candidate.weight;
  } else {
    // Tokens under this share weigh less than 1 - top_p together, so none of them is in the nucleus; the best weighs 1.
    const double outside = (1.0 - std::min(params.top_p, 1.0F)) * total / static_cast<double>(vocabulary);
    keep_above(std::max(static_cast<float>(outside), params.min_p));
  }
  return draw_from_candidates(params, total, u);
}

std::int32_t Sampler::draw_from_all(double target) const {
  std::size_t block = 0;
  while (block + 1 < block_sums_.size() && target >= block_sums_[block]) target -= block_sums_[block++];
  const std::size_t start = block * kWeightBlock;
  const std::size_t end = std::min(weights_.size(), start + kWeightBlock);
  std::size_t last = start;  // the last one that can be drawn: rounding may carry the target past the block's end
  for (std::size_t token = start; token < end; ++token) {
    if (weights_[token] == 0.0F) continue;
    last = token;
    target -= weights_[token];
    if (target < 0) break;
  }
  return static_cast<std::int32_t>(last);
}

std::int32_t Sampler::draw_from_candidates(const SamplingParams& params, double mass, double u) {
  // The nucleus is a few tokens of the candidates: a heap gives them in order without sorting the others.
  const auto worse = [](const Candidate& a, const Candidate& b) { return b < a; };
  const auto begin = candidates_.begin();
  auto end = candidates_.end();
  std::make_heap(begin, end, worse);
  const double wanted = params.top_p >= 1.0F ? std::numeric_limits<double>::infinity() : params.top_p * mass;
  double kept = 0;
  // Taken ones gather at the end, the best last.
  do {
    if (begin->weight < params.min_p) break;
    kept += begin->weight;
    std::pop_heap(begin, end, worse);
    --end;
  } while (kept < wanted && end != begin);

  double target = u * kept;
  auto at = candidates_.end();
  while (--at != end) {
    target -= at->weight;
    if (target < 0) break;
  }
  return at->token;
}

void Sampler::keep_above(float threshold) {
  candidates_.clear();
  for (std::size_t token = 0; token < weights_.size(); ++token) {
    if (weights_[token] >= threshold) candidates_.push_back({weights_[token], static_cast<std::int32_t>(token)});
  }
}

// One pass: whenever twice as many as are wanted have come, the worse half goes, and raises the bar for those to come.
void Sampler::keep_best(std::size_t count) {
  candidates_.clear();
  float bar = 0.0F;  // what is ruled out has no weight, and is no candidate
  const auto cut = [&] {
    if (candidates_.size() <= count) return;
    std::ranges::nth_element(candidates_, candidates_.begin() + static_cast<std::ptrdiff_t>(count) - 1, std::less<>{});
    candidates_.resize(count);
    bar = candidates_.back().weight;
  };
  for (std::size_t token = 0; token < weights_.size(); ++token) {
    if (weights_[token] <= bar) continue;
    candidates_.push_back({weights_[token], static_cast<std::int32_t>(token)});
    if (candidates_.size() >= 2 * count) cut();
  }
  cut();
}

}  // namespace rts
