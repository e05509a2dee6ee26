#include "rts/request_intake.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

namespace rts {

namespace {

// What the sampler and the scheduler can work with; NaN is within no bounds.
bool usable(const SamplingParams& params) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  const auto within = [](float value, float low, float high) { return value >= low && value <= high; };
  return params.max_tokens >= 1 && params.min_tokens >= 0 && params.min_tokens <= params.max_tokens &&
         params.top_logprobs <= kMaxTopLogprobs && within(params.temperature, 0, kLargest) &&
         within(params.top_p, 0, 1) && within(params.min_p, 0, 1) &&
         within(params.repetition_penalty, std::numeric_limits<float>::min(), kLargest) &&
         within(params.presence_penalty, -kLargest, kLargest) && within(params.frequency_penalty, -kLargest, kLargest);
}

}  // namespace

bool take_request(const SubmitRecord& record, const Vocabulary& vocabulary, std::uint32_t max_context,
                  Sequence& sequence) {
  const SubmitHeader& header = record.header;
  sequence.priority = header.priority;
  sequence.sampling = header.sampling;
  sequence.extra_key = header.extra_key;
  sequence.prompt_tokens = header.prompt_tokens;
  if (!record.valid || static_cast<int>(header.priority) >= kPriorities || !usable(header.sampling)) return false;
  if (header.generated_tokens >= static_cast<std::uint32_t>(header.sampling.max_tokens)) return false;
  const std::size_t ids = record.ids.size() / sizeof(std::int32_t);
  if (header.prompt_tokens == 0 || ids >= max_context) return false;
  sequence.tokens.resize(ids);
  std::memcpy(sequence.tokens.data(), record.ids.data(), record.ids.size());
  sequence.published = header.generated_tokens;
  const auto known = [size = static_cast<std::int64_t>(vocabulary.size())](std::int32_t id) {
    return id >= 0 && id < size;
  };
  if (!std::ranges::all_of(sequence.tokens, known)) return false;

  const auto usable_stop = [](const std::string& stop) { return !stop.empty() && stop.size() <= kMaxStopBytes; };
  if (record.stops.size() > kMaxStopStrings || !std::ranges::all_of(record.stops, usable_stop)) return false;
  if (!record.stops.empty()) sequence.stop_matcher = StopMatcher(record.stops);

  const auto usable_bias = [&](const TokenBias& entry) {
    return known(entry.token) && entry.bias >= -kMaxTokenBias && entry.bias <= kMaxTokenBias;
  };
  if (record.logit_bias.size() > kMaxBiasedTokens || !std::ranges::all_of(record.logit_bias, usable_bias)) return false;
  if (record.stop_token_ids.size() > kMaxStopTokenIds || !std::ranges::all_of(record.stop_token_ids, known)) {
    return false;
  }
  sequence.logit_bias = record.logit_bias;
  sequence.stop_token_ids = record.stop_token_ids;
  return true;
}

}  // namespace rts
