#include "rts/publisher.hpp"

#include <algorithm>

namespace rts {

Publisher::Publisher(std::shared_ptr<const Vocabulary> vocabulary) : vocabulary_(std::move(vocabulary)) {
  decoded_.reserve(2 * kMaxTokenRecordBytes);
  released_.reserve(2 * kMaxTokenRecordBytes);
  spelled_.reserve(max_top_logprobs_bytes(kMaxTopLogprobs));
}

FinishReason Publisher::publish(Sequence& sequence, TokenWriter& writer, std::int32_t token, float logprob, bool last,
                                std::span<const TopLogprob> top) {
  const bool special = vocabulary_->special(token);
  const bool goes_on = sequence.sampling.must_go_on(sequence.published);
  const bool ends = !goes_on && is_end(sequence, token);
  decoded_.clear();
  released_.clear();
  sequence.detokenizer.push(vocabulary_->bytes(token), decoded_);
  if (ends || last) sequence.detokenizer.flush(decoded_);
  bool stopped = false;
  if (goes_on) [[unlikely]] {
    released_.append(decoded_);
  } else {
    stopped = sequence.stop_matcher.push(decoded_, released_);
    if ((ends || last) && !stopped) sequence.stop_matcher.flush(released_);
  }

  TokenHeader header;
  header.index = sequence.published++;
  header.token_id = token;
  header.logprob = logprob;
  header.flags = special ? TokenHeader::kSpecial : 0;
  if (top.empty()) [[likely]] {
    writer.write_token(header, released_);
  } else {
    spell(top);
    writer.write_token(header, released_, spelled_);
  }
  return ends || stopped ? FinishReason::kStop : FinishReason::kNone;
}

bool Publisher::is_end(const Sequence& sequence, std::int32_t token) const {
  if (vocabulary_->eos(token) && !sequence.sampling.has(SamplingParams::kIgnoreEos)) return true;
  const std::vector<std::int32_t>& ids = sequence.stop_token_ids;
  return !ids.empty() && std::ranges::find(ids, token) != ids.end();
}

// Each by itself: what is no whole character in it is replaced.
void Publisher::spell(std::span<const TopLogprob> top) {
  spelled_.clear();
  for (const TopLogprob& one : top) {
    decoded_.clear();
    Detokenizer detokenizer;
    detokenizer.push(vocabulary_->bytes(one.token), decoded_);
    detokenizer.flush(decoded_);
    append_top_logprob(spelled_, one, decoded_);
  }
}

void Publisher::publish_end(const Sequence& sequence, TokenWriter& writer, std::int64_t now_ns) {
  const std::int64_t admitted = sequence.admitted_ns != 0 ? sequence.admitted_ns : now_ns;
  const std::int64_t first = sequence.first_token_ns != 0 ? sequence.first_token_ns : now_ns;
  const std::int64_t last = sequence.first_token_ns != 0 ? sequence.last_token_ns : now_ns;
  EndExtension end;
  end.prompt_tokens = sequence.prompt_tokens;
  end.cached_tokens = std::min(sequence.cached_tokens, sequence.prompt_tokens);
  end.queue_ns = admitted - sequence.arrival_ns;
  end.prefill_ns = first - admitted;
  end.decode_ns = last - first;
  end.stalled_ns = sequence.stalled_ns;

  TokenHeader header;
  header.index = sequence.published;
  header.finish = sequence.finish;
  header.error = sequence.error;
  writer.write_last(header, end);
}

}  // namespace rts
