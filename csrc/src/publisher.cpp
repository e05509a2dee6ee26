#include "rts/publisher.hpp"

#include <algorithm>

namespace rts {

Publisher::Publisher(std::shared_ptr<const Vocabulary> vocabulary) : vocabulary_(std::move(vocabulary)) {
  decoded_.reserve(2 * kMaxTokenRecordBytes);
  released_.reserve(2 * kMaxTokenRecordBytes);
}

FinishReason Publisher::publish(Sequence& sequence, TokenWriter& writer, std::int32_t token, float logprob, bool last) {
  const bool special = vocabulary_->special(token);
  const bool ends = vocabulary_->eos(token) && !sequence.sampling.has(SamplingParams::kIgnoreEos);
  decoded_.clear();
  released_.clear();
  sequence.detokenizer.push(vocabulary_->bytes(token), decoded_);
  if (ends || last) sequence.detokenizer.flush(decoded_);
  const bool stopped = sequence.stop_matcher.push(decoded_, released_);
  if ((ends || last) && !stopped) sequence.stop_matcher.flush(released_);

  TokenHeader header;
  header.index = sequence.published++;
  header.token_id = token;
  header.logprob = logprob;
  header.flags = special ? TokenHeader::kSpecial : 0;
  writer.write_token(header, released_);
  return ends || stopped ? FinishReason::kStop : FinishReason::kNone;
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
