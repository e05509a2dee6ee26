#include "rts/sampler.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "rts/philox.hpp"
#include "rts/vector_math.hpp"

namespace rts {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Row = std::vector<float>;
using Tokens = std::vector<std::int32_t>;

std::int32_t sample(const Row& logits, const SamplingParams& params, std::uint32_t position = 0,
                    const Tokens& tokens = {}, std::uint32_t prompt_tokens = 0) {
  Sampler sampler(static_cast<std::uint32_t>(logits.size()));
  return sampler.sample(logits, params, tokens, prompt_tokens, position).token;
}

std::int32_t sample(const Row& logits, const SamplingParams& params, const Sampler::Constraints& constraints,
                    std::uint32_t position = 0) {
  Sampler sampler(static_cast<std::uint32_t>(logits.size()));
  return sampler.sample(logits, params, {}, 0, position, constraints).token;
}

// A row's mask with those tokens allowed.
std::vector<std::uint32_t> mask_of(std::size_t vocabulary, const Tokens& allowed) {
  std::vector<std::uint32_t> words((vocabulary + 31) / 32);
  for (const std::int32_t token : allowed) words[static_cast<std::size_t>(token) / 32] |= 1U << (token % 32);
  return words;
}

SamplingParams greedy() {
  SamplingParams params;
  params.temperature = 0;
  return params;
}

Row random_row(std::mt19937_64& random, std::size_t vocabulary, float spread) {
  std::normal_distribution<float> values(0.0F, spread);
  Row row(vocabulary);
  for (float& value : row) value = values(random);
  return row;
}

// The definition, in double and by sorting everything.
class Reference {
 public:
  // `ruled_out` as the masks and min_tokens leave it.
  Reference(const Row& logits, const SamplingParams& params, const Tokens& tokens, std::uint32_t prompt_tokens,
            std::span<const TokenBias> biases = {}, const Tokens& ruled_out = {})
      : scores_(penalised(biased(logits, biases), params, tokens, prompt_tokens)),
        weights_(scores_.size()),
        order_(scores_.size()) {
    for (const std::int32_t token : ruled_out) scores_[static_cast<std::size_t>(token)] = -kInfinity;
    const float best = *std::max_element(scores_.begin(), scores_.end());
    for (std::size_t i = 0; i < scores_.size(); ++i) {
      weights_[i] = std::exp((static_cast<double>(scores_[i]) - best) / params.temperature);
    }
    std::iota(order_.begin(), order_.end(), 0);
    const bool cuts_k = params.top_k > 0 && static_cast<std::size_t>(params.top_k) < scores_.size();
    if (!cuts_k && params.top_p >= 1 && params.min_p <= 0) return;  // drawn in the order of the ids
    std::stable_sort(order_.begin(), order_.end(), [this](auto a, auto b) { return score(a) > score(b); });
    if (cuts_k) order_.resize(static_cast<std::size_t>(params.top_k));
    if (params.top_p < 1) cut_nucleus(params.top_p * mass());
    if (params.min_p > 0) {
      std::erase_if(order_, [&](std::int32_t token) { return note(weight(token), params.min_p) < params.min_p; });
    }
  }

  // Nothing where float's rounding decides.
  std::optional<std::int32_t> draw(double u) const {
    if (is_close_) return std::nullopt;
    const double target = u * mass();
    double sum = 0;
    for (const std::int32_t token : order_) {
      sum += weight(token);
      if (std::abs(sum - target) < kClose * mass()) return std::nullopt;
      if (target < sum) return token;
    }
    return std::nullopt;
  }

  // Whether float may order them otherwise: they differ, but by less than their weights' error.
  bool swappable(std::int32_t a, std::int32_t b) const {
    return score(a) != score(b) && std::abs(weight(a) - weight(b)) < 1e-6 * weight(b);
  }
  const Tokens& kept() const { return order_; }
  const Row& scores() const { return scores_; }
  double share(std::int32_t token) const { return weight(token) / mass(); }

 private:
  static constexpr double kClose = 1e-5;

  static Row biased(Row logits, std::span<const TokenBias> biases) {
    for (const TokenBias& entry : biases) logits[static_cast<std::size_t>(entry.token)] += entry.bias;
    return logits;
  }

  static Row penalised(const Row& logits, const SamplingParams& params, const Tokens& tokens,
                       std::uint32_t prompt_tokens) {
    Row scores = logits;
    for (std::size_t id = 0; id < scores.size(); ++id) {
      const auto token = static_cast<std::int32_t>(id);
      const auto answer = tokens.begin() + prompt_tokens;
      const auto times = std::count(answer, tokens.end(), token);
      if (std::find(tokens.begin(), tokens.end(), token) != tokens.end()) {
        scores[id] = scores[id] > 0 ? scores[id] / params.repetition_penalty : scores[id] * params.repetition_penalty;
      }
      if (times > 0) scores[id] -= params.presence_penalty;
      for (std::ptrdiff_t i = 0; i < times; ++i) scores[id] -= params.frequency_penalty;
    }
    return scores;
  }

  void cut_nucleus(double wanted) {
    const double all = mass();
    double sum = 0;
    std::size_t count = 0;
    do {
      sum += weight(order_[count++]);
      if (std::abs(sum - wanted) < kClose * all) is_close_ = true;
    } while (sum < wanted && count < order_.size());
    order_.resize(count);
  }

  double note(double value, double border) {
    if (std::abs(value - border) < kClose * border) is_close_ = true;
    return value;
  }
  float score(std::int32_t token) const { return scores_[static_cast<std::size_t>(token)]; }
  double weight(std::int32_t token) const { return weights_[static_cast<std::size_t>(token)]; }
  double mass() const {
    return std::accumulate(order_.begin(), order_.end(), 0.0,
                           [this](double sum, std::int32_t token) { return sum + weight(token); });
  }

  Row scores_;
  std::vector<double> weights_;
  Tokens order_;
  bool is_close_ = false;
};

TEST(Sampler, GreedyTakesTheLowestIdOfTheBest) {
  EXPECT_EQ(sample({1, 3, 2, 3}, greedy()), 1);
  EXPECT_EQ(sample(Row(1000, 0.5F), greedy()), 0);
  Row row(500, -kInfinity);
  row[300] = row[400] = -1e30F;
  EXPECT_EQ(sample(row, greedy()), 300);
}

TEST(Sampler, TopKOfOneTakesTheLowestIdOfTheBest) {
  SamplingParams params;
  params.top_k = 1;
  for (std::uint32_t position = 0; position < 50; ++position) {
    EXPECT_EQ(sample({1, 3, 2, 3}, params, position), 1);
    EXPECT_EQ(sample(Row(1000, 0.5F), params, position), 0);
  }
}

TEST(Sampler, ATinyTemperatureIsGreedy) {
  SamplingParams params;
  const Row row{-1e30F, 2.0F, 1e30F, 1e30F};
  for (const float temperature : {1e-45F, 1e-30F, 0.99F * Sampler::kGreedyBelow, Sampler::kGreedyBelow, 1e-4F}) {
    params.temperature = temperature;
    for (std::uint32_t position = 0; position < 50; ++position) {
      const std::int32_t token = sample(row, params, position);
      if (temperature < Sampler::kGreedyBelow) {
        EXPECT_EQ(token, 2) << temperature;
      } else {
        EXPECT_TRUE(token == 2 || token == 3) << temperature;  // they weigh the same at any temperature
      }
    }
  }
}

TEST(Sampler, RefusesLogitsThatAreNoDistribution) {
  for (const bool is_greedy : {true, false}) {
    SamplingParams params = is_greedy ? greedy() : SamplingParams{};
    for (const std::size_t vocabulary : {1, 16, 100}) {
      Row row(vocabulary, 1.0F);
      for (const float bad : {kNan, kInfinity}) {
        row.back() = bad;
        EXPECT_EQ(sample(row, params), -1) << bad;
      }
      EXPECT_EQ(sample(Row(vocabulary, -kInfinity), params), -1);
    }
  }
}

// A finite logit that a penalty carries out of float32 leaves nothing to choose by.
TEST(Sampler, RefusesWhatAPenaltyMakesInfinite) {
  for (const bool is_greedy : {true, false}) {
    SamplingParams params = is_greedy ? greedy() : SamplingParams{};
    params.repetition_penalty = 0.01F;
    EXPECT_EQ(sample({1.0F, 3e38F, 2.0F}, params, 0, {1}, 1), -1);
    params = is_greedy ? greedy() : SamplingParams{};
    params.repetition_penalty = 10.0F;
    EXPECT_EQ(sample({-kInfinity, -3e38F}, params, 0, {1}, 1), -1);
  }
}

TEST(Sampler, RepetitionCountsPromptAndAnswerOnce) {
  SamplingParams params = greedy();
  params.repetition_penalty = 2.0F;
  EXPECT_EQ(sample({4.0F, 3.0F, 1.9F}, params, 0, {0, 0, 0}, 3), 1);  // 4 → 2, and not 0.5
  EXPECT_EQ(sample({4.0F, 1.5F, 1.9F}, params, 0, {0, 0, 0}, 1), 0);
  EXPECT_EQ(sample({-1.0F, -1.5F}, params, 0, {0}, 0), 1);  // -1 → -2: a penalty pushes down on both sides of zero
}

TEST(Sampler, PresenceAndFrequencyCountTheAnswerOnly) {
  SamplingParams params = greedy();
  params.presence_penalty = 1.0F;
  EXPECT_EQ(sample({2.0F, 1.5F}, params, 0, {0, 0, 0}, 3), 0);
  EXPECT_EQ(sample({2.0F, 1.5F}, params, 0, {0, 0, 0}, 2), 1);
  EXPECT_EQ(sample({3.0F, 1.5F}, params, 0, {0, 0, 0}, 0), 0);
  params = greedy();
  params.frequency_penalty = 0.5F;
  EXPECT_EQ(sample({3.0F, 1.7F}, params, 0, {0, 0}, 0), 0);
  EXPECT_EQ(sample({3.0F, 1.7F}, params, 0, {0, 0, 0}, 0), 1);
  params.frequency_penalty = -0.5F;
  EXPECT_EQ(sample({3.0F, 2.7F}, params, 0, {1}, 0), 1);
}

TEST(Sampler, PenaltiesOfOneCallDoNotReachTheNext) {
  SamplingParams params = greedy();
  params.presence_penalty = params.frequency_penalty = 1.0F;
  params.repetition_penalty = 1.5F;
  Sampler sampler(3);
  const Row row{3.0F, 2.5F, 2.0F};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(sampler.sample(row, params, Tokens{0, 1, 0}, 1, 0).token, 2);
    EXPECT_EQ(sampler.sample(row, params, Tokens{}, 0, 0).token, 0);
    EXPECT_EQ(sampler.sample(row, params, Tokens{0}, 0, 0).token, 1);
  }
}

TEST(Sampler, TopPOfZeroKeepsTheBest) {
  SamplingParams params;
  params.top_p = 0;
  for (std::uint32_t position = 0; position < 100; ++position)
    EXPECT_EQ(sample({0.1F, 0.2F, 0.15F}, params, position), 1);
}

TEST(Sampler, SwitchesThatCutNothingChangeNothing) {
  std::mt19937_64 random(7);
  const Row row = random_row(random, 3000, 3.0F);
  SamplingParams off, on;
  on.top_k = 3000;
  on.top_p = 1.0F;
  for (std::uint32_t position = 0; position < 100; ++position) {
    EXPECT_EQ(sample(row, on, position), sample(row, off, position));
  }
  on.top_k = 4000;
  EXPECT_EQ(sample(row, on, 5), sample(row, off, 5));
  on.top_k = -1;
  EXPECT_EQ(sample(row, on, 5), sample(row, off, 5));
}

TEST(Sampler, MinPIsAShareOfTheBest) {
  SamplingParams params;
  params.min_p = 0.5F;
  const Row row{std::log(1.0F), std::log(0.51F), std::log(0.49F), std::log(0.6F)};
  std::vector<int> drawn(4);
  for (std::uint32_t position = 0; position < 2000; ++position) {
    ++drawn[static_cast<std::size_t>(sample(row, params, position))];
  }
  EXPECT_GT(drawn[0], 0);
  EXPECT_GT(drawn[1], 0);
  EXPECT_EQ(drawn[2], 0);
  EXPECT_GT(drawn[3], 0);
  params.min_p = 1.0F;
  for (std::uint32_t position = 0; position < 100; ++position) EXPECT_EQ(sample(row, params, position), 0);
}

// Rows with ties, with tokens ruled out, flat and peaked; every switch alone and with the others.
TEST(Sampler, DrawsWhatTheDefinitionDraws) {
  const char* const given = std::getenv("RTS_SEED");
  const std::uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  SCOPED_TRACE("RTS_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto one_in = [&](std::uint64_t n) { return random() % n == 0; };
  const auto between = [&](float low, float high) { return std::uniform_real_distribution<float>(low, high)(random); };
  int compared = 0, close = 0;
  for (int round = 0; round < 600; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    const std::size_t vocabulary = one_in(4) ? 1 + random() % 20 : 20 + random() % 2500;
    Row row = random_row(random, vocabulary, between(0.1F, 6.0F));
    if (one_in(3)) std::ranges::for_each(row, [](float& value) { value = std::round(value); });
    if (one_in(3)) {
      for (std::size_t i = 1; i < vocabulary; ++i) row[i] = one_in(2) ? row[i] : -kInfinity;
    }
    SamplingParams params;
    params.seed = random();
    params.temperature = one_in(3) ? 1.0F : between(0.1F, 3.0F);
    if (one_in(2)) params.top_k = static_cast<std::int32_t>(1 + random() % (one_in(2) ? 50 : vocabulary));
    if (one_in(2)) params.top_p = between(0.0F, 1.0F);
    if (one_in(3)) params.min_p = between(0.001F, 1.0F);
    if (one_in(3)) params.repetition_penalty = between(0.5F, 2.0F);
    if (one_in(3)) params.presence_penalty = between(-2.0F, 2.0F);
    if (one_in(3)) params.frequency_penalty = between(-2.0F, 2.0F);
    Tokens tokens(random() % 30);
    for (std::int32_t& token : tokens)
      token = static_cast<std::int32_t>(random() % std::min<std::size_t>(vocabulary, 40));
    const auto prompt_tokens = static_cast<std::uint32_t>(tokens.empty() ? 0 : random() % tokens.size());

    // Token 0 is never ruled out, by whatever.
    const auto other_token = [&] { return static_cast<std::int32_t>(1 + random() % (vocabulary - 1)); };
    std::vector<TokenBias> biases(one_in(2) || vocabulary == 1 ? 0 : random() % 30);
    for (TokenBias& entry : biases) entry = {other_token(), between(-5.0F, 5.0F)};
    Tokens eos(one_in(2) || vocabulary == 1 ? 0 : 2), stops(one_in(2) || vocabulary == 1 ? 0 : random() % 9),
        allowed{0};
    std::ranges::generate(eos, other_token);
    std::ranges::generate(stops, other_token);
    std::vector<std::uint32_t> mask;
    if (one_in(3)) {
      for (std::size_t id = 1; id < vocabulary; ++id) {
        if (one_in(2)) allowed.push_back(static_cast<std::int32_t>(id));
      }
      mask = mask_of(vocabulary, allowed);
    }
    params.min_tokens = one_in(2) ? 10 : 0;
    const Sampler::Constraints constraints{.logit_bias = biases, .stop_token_ids = stops, .allowed = mask};
    const auto reference_at = [&](std::uint32_t position) {
      Tokens ruled_out;
      if (!mask.empty()) {
        for (std::size_t id = 0; id < vocabulary; ++id) {
          const auto token = static_cast<std::int32_t>(id);
          if (!std::ranges::binary_search(allowed, token)) ruled_out.push_back(token);
        }
      }
      if (static_cast<std::int32_t>(position) < params.min_tokens) {
        ruled_out.insert(ruled_out.end(), eos.begin(), eos.end());
        ruled_out.insert(ruled_out.end(), stops.begin(), stops.end());
      }
      return Reference(row, params, tokens, prompt_tokens, biases, ruled_out);
    };

    Sampler sampler(static_cast<std::uint32_t>(vocabulary), eos);
    const Reference references[]{reference_at(0), reference_at(19)};
    for (std::uint32_t position = 0; position < 20; ++position) {
      const Reference& reference = references[position < 10 ? 0 : 1];
      const std::int32_t token = sampler.sample(row, params, tokens, prompt_tokens, position, constraints).token;
      ASSERT_GE(token, 0);
      ASSERT_GT(row[static_cast<std::size_t>(token)], -kInfinity);
      const auto expected = reference.draw(uniform(params.seed, position));
      if (!expected) {
        ++close;
        continue;
      }
      ++compared;
      ASSERT_TRUE(token == *expected || reference.swappable(token, *expected))
          << token << ", not " << *expected << ", at position " << position << " of " << reference.kept().size();
    }
    SamplingParams best = params;
    best.temperature = 0;
    for (const std::uint32_t position : {0U, 19U}) {
      const Row& scores = references[position == 0 ? 0 : 1].scores();
      ASSERT_EQ(sampler.sample(row, best, tokens, prompt_tokens, position, constraints).token,
                std::max_element(scores.begin(), scores.end()) - scores.begin());
    }
  }
  EXPECT_LT(close, compared / 20);
}

TEST(Sampler, FrequenciesAreThoseOfTheDistribution) {
  std::mt19937_64 random(11);
  const Row row = random_row(random, 1500, 1.5F);
  for (const float top_p : {1.0F, 0.9F, 0.3F}) {
    SamplingParams params;
    params.seed = 5;
    params.temperature = 0.9F;
    params.top_p = top_p;
    const Reference reference(row, params, {}, 0);
    constexpr std::uint32_t kDraws = 8000;
    std::vector<double> drawn(row.size());
    Sampler sampler(1500);
    for (std::uint32_t position = 0; position < kDraws; ++position) {
      ++drawn[static_cast<std::size_t>(sampler.sample(row, params, {}, 0, position).token)];
    }
    // Tokens too rare for a bin of their own share one.
    double chi_square = 0, rare = 0, rare_expected = 0;
    int bins = 0;
    const auto add = [&](double count, double expected) {
      chi_square += (count - expected) * (count - expected) / expected;
      ++bins;
    };
    double in_kept = 0;
    for (const std::int32_t token : reference.kept()) {
      const double count = drawn[static_cast<std::size_t>(token)], expected = reference.share(token) * kDraws;
      in_kept += count;
      if (expected >= 10) {
        add(count, expected);
      } else {
        rare += count;
        rare_expected += expected;
      }
    }
    if (rare_expected >= 10) add(rare, rare_expected);
    ASSERT_GT(bins, 20);
    EXPECT_EQ(in_kept, kDraws) << "a token outside the nucleus was drawn at top_p " << top_p;
    const double degrees = bins - 1;  // p = 0.001 by Wilson and Hilferty
    const double limit = degrees * std::pow(1 - 2 / (9 * degrees) + 3.09 * std::sqrt(2 / (9 * degrees)), 3);
    EXPECT_LT(chi_square, limit) << "top_p " << top_p << ", " << bins << " bins";
  }
}

TEST(Sampler, ATokenWithoutWeightIsNeverDrawn) {
  for (const std::size_t vocabulary : {40, 2 * 1024, 3 * 1024 + 1}) {
    Row row(vocabulary, -kInfinity);
    const Tokens possible{7, static_cast<std::int32_t>(vocabulary) - 9};
    for (const std::int32_t token : possible) row[static_cast<std::size_t>(token)] = 0;
    row[3] = -200.0F;  // its weight is under the smallest that counts
    Sampler sampler(static_cast<std::uint32_t>(vocabulary));
    for (const std::int32_t top_k : {0, 5, 30}) {
      for (const float top_p : {1.0F, 0.999F}) {
        SamplingParams params;
        params.top_k = top_k;
        params.top_p = top_p;
        bool drawn[2] = {};
        for (std::uint32_t position = 0; position < 500; ++position) {
          const std::int32_t token = sampler.sample(row, params, {}, 0, position).token;
          ASSERT_TRUE(token == possible[0] || token == possible[1]) << token;
          drawn[token == possible[1]] = true;
        }
        EXPECT_TRUE(drawn[0] && drawn[1]);
      }
    }
  }
}

TEST(Sampler, DependsOnSeedAndPositionAlone) {
  std::mt19937_64 random(13);
  const Row row = random_row(random, 2000, 1.0F), other = random_row(random, 2000, 5.0F);
  Sampler used(2000);
  Tokens by_seed[2];
  for (const std::uint64_t seed : {1, 2}) {
    SamplingParams params;
    params.seed = seed;
    for (std::uint32_t position = 0; position < 100; ++position) {
      const std::int32_t token = sample(row, params, position);
      by_seed[seed - 1].push_back(token);
      SamplingParams elsewhere = params;
      elsewhere.top_k = 10;
      used.sample(other, elsewhere, {}, 0, position * 3);
      ASSERT_EQ(used.sample(row, params, {}, 0, position).token, token);
    }
  }
  EXPECT_NE(by_seed[0], by_seed[1]);
  EXPECT_GT(std::count_if(by_seed[0].begin(), by_seed[0].end(), [&](auto token) { return token != by_seed[0][0]; }),
            90);
}

TEST(Sampler, LogprobIsTheModelsBeforePenaltiesAndTemperature) {
  std::mt19937_64 random(17);
  for (const float spread : {0.1F, 3.0F, 30.0F}) {
    const Row row = random_row(random, 5000, spread);
    const float best = *std::max_element(row.begin(), row.end());
    double total = 0;
    for (const float value : row) total += std::exp(static_cast<double>(value) - best);
    Sampler sampler(5000);
    for (std::uint32_t position = 0; position < 50; ++position) {
      SamplingParams params;
      params.temperature = static_cast<float>(position % 5) * 0.7F;
      params.top_p = position % 2 != 0 ? 0.8F : 1.0F;
      params.presence_penalty = 1.0F;
      params.repetition_penalty = 1.3F;
      const Tokens tokens{1, 2, 3, 4};
      EXPECT_EQ(sampler.sample(row, params, tokens, 2, position).logprob, 0.0F) << "none was asked for";
      params.flags = SamplingParams::kLogprobs;
      const Sampler::Choice choice = sampler.sample(row, params, tokens, 2, position);
      const double exact = row[static_cast<std::size_t>(choice.token)] - best - std::log(total);
      ASSERT_NEAR(choice.logprob, exact, 1e-6 * std::max(1.0, std::abs(exact)));
    }
  }
}

TEST(Sampler, ABiasIsAddedToTheLogit) {
  const Row row{1.0F, 2.0F, 3.0F};
  const std::vector<TokenBias> biases{{0, 1.5F}, {2, -100.0F}};
  EXPECT_EQ(sample(row, greedy(), {.logit_bias = biases}), 0);
  EXPECT_EQ(sample(row, greedy(), {.logit_bias = std::span(biases).last(1)}), 1);
  EXPECT_EQ(sample({-kInfinity, 2.0F, 3.0F}, greedy(), {.logit_bias = biases}), 1) << "what is ruled out stays so";
}

// Penalties see the biased logit: 0.5 → -1.5 is multiplied, where it would have been divided.
TEST(Sampler, BiasComesBeforePenalties) {
  SamplingParams params = greedy();
  params.repetition_penalty = 2.0F;
  const std::vector<TokenBias> biases{{0, -2.0F}};
  Sampler sampler(2);
  EXPECT_EQ(sampler.sample(Row{0.5F, -2.0F}, params, Tokens{0}, 1, 0, {.logit_bias = biases}).token, 1);
  EXPECT_EQ(sampler.sample(Row{0.5F, -3.5F}, params, Tokens{0}, 1, 0, {.logit_bias = biases}).token, 0);
}

TEST(Sampler, NothingEndsTheAnswerBeforeMinTokens) {
  constexpr std::int32_t kEos = 2;
  const Row row{1.0F, 2.0F, 5.0F, 4.0F};
  const Tokens stops{3};
  Sampler sampler(4, {kEos});
  for (const float temperature : {0.0F, 0.7F}) {
    SamplingParams params;
    params.temperature = temperature;
    params.min_tokens = 3;
    bool ended = false;
    for (std::uint32_t position = 0; position < 40; ++position) {
      const std::int32_t token = sampler.sample(row, params, {}, 0, position, {.stop_token_ids = stops}).token;
      const bool ends = token == kEos || token == stops[0];
      ASSERT_FALSE(ends && position < 3) << position;
      ended = ended || ends;
    }
    EXPECT_TRUE(ended);
    EXPECT_EQ(sampler.sample(Row{1.0F, 2.0F, 5.0F, 6.0F}, greedy(), {}, 0, 3, {.stop_token_ids = stops}).token, 3);
  }
}

TEST(Sampler, AMaskAllowsItsTokensOnly) {
  std::mt19937_64 random(19);
  for (const std::size_t vocabulary : {1, 31, 32, 33, 64, 500, 2049}) {
    const Row row = random_row(random, vocabulary, 2.0F);
    const auto last = static_cast<std::int32_t>(vocabulary) - 1;
    const Tokens allowed{last / 2, last};
    const std::vector<std::uint32_t> mask = mask_of(vocabulary, allowed);
    const float scores[2] = {row[static_cast<std::size_t>(allowed[0])], row[static_cast<std::size_t>(allowed[1])]};
    EXPECT_EQ(sample(row, greedy(), {.allowed = mask}), allowed[scores[1] > scores[0] ? 1 : 0]) << vocabulary;
    bool drawn[2] = {};
    SamplingParams params;
    params.temperature = 2.0F;
    for (std::uint32_t position = 0; position < 300; ++position) {
      const std::int32_t token = sample(row, params, {.allowed = mask}, position);
      ASSERT_TRUE(token == allowed[0] || token == allowed[1]) << token << " of " << vocabulary;
      drawn[token == allowed[1]] = true;
    }
    EXPECT_TRUE(drawn[1] && (drawn[0] || vocabulary == 1)) << vocabulary;
    const std::vector<std::uint32_t> every(mask.size(), ~0U);
    EXPECT_EQ(sample(row, greedy(), {.allowed = every}), sample(row, greedy()));
  }
}

TEST(Sampler, WhatIsRuledOutAltogetherIsRefused) {
  const Row row{1.0F, 2.0F};
  const std::vector<std::uint32_t> none(1), second{2};
  const Tokens stops{1};
  for (SamplingParams params : {greedy(), SamplingParams{}}) {
    EXPECT_EQ(sample(row, params, {.allowed = none}), -1);
    EXPECT_EQ(sample(row, params, {.allowed = second}), 1);
    params.min_tokens = 1;
    EXPECT_EQ(sample(row, params, {.stop_token_ids = stops, .allowed = second}), -1);
    EXPECT_EQ(sample(row, params, {.stop_token_ids = stops, .allowed = second}, 1), 1);
    // A mask does not hide what is wrong with the logits.
    EXPECT_EQ(sample({kNan, 2.0F}, params, {.allowed = second}, 1), -1);
  }
}

TEST(Sampler, TopLogprobsAreTheBestOfTheModelsOwn) {
  std::mt19937_64 random(23);
  for (const std::size_t vocabulary : {5, 100, 5000}) {
    Row row = random_row(random, vocabulary, 2.0F);
    std::ranges::for_each(row, [](float& value) { value = std::round(2 * value) / 2; });  // with ties
    Tokens order(vocabulary);
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(
        order, [&](auto a, auto b) { return row[static_cast<std::size_t>(a)] > row[static_cast<std::size_t>(b)]; });
    double total = 0;
    for (const float value : row) total += std::exp(static_cast<double>(value));
    Sampler sampler(static_cast<std::uint32_t>(vocabulary));
    const std::vector<TokenBias> biases{{order.back(), 100.0F}};
    for (const std::uint32_t wanted : {0U, 1U, 4U, kMaxTopLogprobs}) {
      SamplingParams params;
      params.temperature = 0.3F;
      params.presence_penalty = 2.0F;
      params.flags = SamplingParams::kLogprobs;
      params.top_logprobs = wanted;
      const Sampler::Choice choice = sampler.sample(row, params, Tokens{order[0]}, 0, 0, {.logit_bias = biases});
      EXPECT_EQ(choice.token, order.back()) << "the bias decides";
      ASSERT_EQ(choice.top.size(), std::min<std::size_t>(wanted, vocabulary));
      for (std::size_t i = 0; i < choice.top.size(); ++i) {
        EXPECT_EQ(choice.top[i].token, order[i]);
        EXPECT_NEAR(choice.top[i].logprob, row[static_cast<std::size_t>(order[i])] - std::log(total), 2e-6);
      }
      params.flags = 0;
      EXPECT_TRUE(sampler.sample(row, params, {}, 0, 0).top.empty()) << "without logprobs";
    }
  }
}

TEST(Sampler, TopLogprobsLeaveOutWhatHasNoProbability) {
  SamplingParams params = greedy();
  params.flags = SamplingParams::kLogprobs;
  params.top_logprobs = 3;
  Sampler sampler(4);
  const Sampler::Choice choice = sampler.sample(Row{-kInfinity, 1.0F, -kInfinity, 1.0F}, params, {}, 0, 0);
  ASSERT_EQ(choice.top.size(), 2U);
  EXPECT_EQ(choice.top[0].token, 1);
  EXPECT_EQ(choice.top[1].token, 3);
  EXPECT_EQ(choice.top[1].logprob, choice.logprob);
}

// Rows of the size that models have, where a bar keeps most tokens from being candidates at all.
TEST(Sampler, ABarInFrontOfTheNucleusChangesNoDraw) {
  std::mt19937_64 random(29);
  int compared = 0;
  for (const float spread : {0.01F, 1.0F, 4.0F}) {
    const Row row = random_row(random, 50'000, spread);
    Sampler sampler(50'000);
    for (const float top_p : {0.01F, 0.6F, 0.95F, 0.9999F}) {
      SamplingParams params;
      params.top_p = top_p;
      const Reference reference(row, params, {}, 0);
      for (std::uint32_t position = 0; position < 50; ++position) {
        const std::int32_t token = sampler.sample(row, params, {}, 0, position).token;
        const auto expected = reference.draw(uniform(params.seed, position));
        if (!expected) continue;
        ++compared;
        ASSERT_TRUE(token == *expected || reference.swappable(token, *expected)) << top_p << " of spread " << spread;
      }
    }
  }
  EXPECT_GT(compared, 100);
}

TEST(Sampler, AVocabularyOfOneHasOneChoice) {
  for (const float top_p : {0.0F, 0.5F, 1.0F}) {
    SamplingParams params;
    params.top_p = top_p;
    params.flags = SamplingParams::kLogprobs;
    Sampler sampler(1);
    const Sampler::Choice choice = sampler.sample(Row{-5.0F}, params, {}, 0, 0);
    EXPECT_EQ(choice.token, 0);
    EXPECT_EQ(choice.logprob, 0.0F);
  }
}

}  // namespace
}  // namespace rts
