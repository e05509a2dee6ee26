#include "rts/stream_table.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "rts/submit_record.hpp"

namespace rts {

namespace {

constexpr std::int32_t kReservedTokens = 1 << 15;

}  // namespace

StreamTable::StreamTable(std::shared_ptr<Channel> channel, const Clock& clock)
    : channel_(std::move(channel)), clock_(clock) {
  const std::uint32_t slots = channel_->config().slots;
  streams_.reserve(slots);
  free_.reserve(slots);
  ready_.reserve(slots);
  for (std::uint32_t slot = 0; slot < slots; ++slot) streams_.emplace_back(channel_->token_reader(slot));
  // The lowest slots are given out first, so that few pages are touched while few streams are open.
  for (std::uint32_t slot = slots; slot-- > 0;) free_.push_back(slot);
}

std::optional<std::uint32_t> StreamTable::take_slot(StreamFormat format, std::int64_t timeout_ns) {
  if (free_.empty() || channel_is_dead_) return std::nullopt;
  const std::uint32_t slot = free_.back();
  free_.pop_back();
  ++open_;
  Stream& taken = stream(slot);
  taken.state = State::kOpen;
  taken.format = format;
  taken.finish = FinishReason::kNone;
  taken.error = StreamError::kNone;
  taken.answer_kind = PayloadKind::kNone;
  taken.error_detail.clear();
  taken.last_read = false;
  taken.id = next_id_++;
  taken.timeout_ns = timeout_ns;
  taken.last_progress_ns = clock_.now_ns();
  taken.end = {};
  taken.generated.clear();
  taken.json_tokens.clear();
  taken.text.clear();
  // Published to the worker with the submit record: it looks at a slot's flags only after it has read that.
  channel_->control(slot).flags.store(0, std::memory_order_relaxed);
  return slot;
}

std::optional<std::uint32_t> StreamTable::submit(StreamSpec spec, std::int64_t timeout_ns) {
  const std::optional<std::uint32_t> slot = take_slot(StreamFormat::kTokens, timeout_ns);
  if (!slot) return std::nullopt;
  Stream& taken = stream(*slot);
  taken.spec = std::move(spec);
  // So that no token allocates; the cap is for requests that ask for more than any context has.
  taken.generated.reserve(static_cast<std::size_t>(std::clamp(taken.spec.sampling.max_tokens, 0, kReservedTokens)));
  if (!queue(*slot, taken)) {
    give_back(*slot);
    return std::nullopt;
  }
  channel_->worker_bell().ring();
  return slot;
}

bool StreamTable::queue(std::uint32_t slot, Stream& stream) {
  StreamSpec& spec = stream.spec;
  SubmitHeader header;
  header.stream_id = stream.id;
  header.group_id = stream.id;
  header.arrival_ns = stream.last_progress_ns;
  header.sampling = spec.sampling;
  header.slot = slot;
  header.priority = spec.priority;
  SubmitContent content{.prompt = spec.prompt,
                        .stops = spec.stops,
                        .request_id = {},
                        .payload = {},
                        .logit_bias = spec.logit_bias,
                        .stop_token_ids = spec.stop_token_ids};
  if (spec.payload_kind != PayloadKind::kNone) {
    header.payload_kind = spec.payload_kind;
    header.answer_kind = spec.answer_kind;
    // A batch is to be released before its first token would be too late.
    if (stream.timeout_ns != 0) header.deadline_ns = header.arrival_ns + stream.timeout_ns;
    content.request_id = spec.request_id;
    content.payload = spec.payload;
  }

  const std::uint64_t bytes = submit_record_bytes(content);
  if (bytes > channel_->config().lane_bytes) return false;
  SpscRing<>::Producer& lane = channel_->lanes().lane(spec.priority);
  std::byte* const out = lane.claim(static_cast<std::uint32_t>(bytes));
  if (out == nullptr) return false;
  write_submit_record(header, content, out);
  lane.publish();
  if (spec.payload_kind != PayloadKind::kNone) spec.payload = {};
  return true;
}

std::optional<std::uint32_t> StreamTable::open(std::int64_t timeout_ns) {
  const std::optional<std::uint32_t> slot = take_slot(StreamFormat::kTokens, timeout_ns);
  if (!slot) return std::nullopt;
  Stream& taken = stream(*slot);
  if (!taken.writer) taken.writer.emplace(channel_->token_writer(*slot));
  taken.pushed = 0;
  taken.push_open = true;
  return slot;
}

bool StreamTable::push(std::uint32_t slot, std::string_view text, std::int32_t token_id, float logprob, bool special,
                       std::string_view top_logprobs) {
  Stream& to = stream(slot);
  if (!to.push_open || to.state != State::kOpen || to.ring.records() >= channel_->config().ring_records) return false;
  if (!to.writer->has_room_for(text.size() + top_logprobs.size())) return false;
  TokenHeader header;
  header.index = to.pushed;
  header.token_id = token_id;
  header.logprob = logprob;
  header.flags = special ? TokenHeader::kSpecial : 0;
  if (!to.writer->write_token(header, text, top_logprobs)) return false;
  ++to.pushed;
  announce(slot);
  return true;
}

bool StreamTable::push_end(std::uint32_t slot) {
  Stream& to = stream(slot);
  if (!to.push_open) return false;
  to.push_open = false;
  TokenHeader header;
  header.index = to.pushed;
  header.finish = FinishReason::kStop;
  to.writer->write_last(header, {});
  announce(slot);
  return true;
}

void StreamTable::announce(std::uint32_t slot) {
  channel_->mark_ready(slot);
  channel_->front_bell().ring();
}

std::span<const std::uint32_t> StreamTable::collect() {
  ready_.clear();
  if (channel_is_dead_) return ready_;
  for (std::uint32_t word = 0; word < channel_->ready_words(); ++word) {
    for (std::uint64_t bits = channel_->take_ready(word); bits != 0; bits &= bits - 1) {
      const std::uint32_t slot = word * 64 + static_cast<std::uint32_t>(std::countr_zero(bits));
      if (slot >= streams_.size()) break;
      if (stream(slot).state == State::kDiscarding) {
        discard(slot);
      } else {
        ready_.push_back(slot);
      }
    }
  }
  return ready_;
}

bool StreamTable::arm() {
  channel_->front_bell().arm();
  if (!channel_->any_ready()) return true;
  channel_->front_bell().disarm();
  return false;
}

void StreamTable::disarm() {
  channel_->front_bell().disarm();
}

void StreamTable::rings_read() {
  std::atomic_thread_fence(std::memory_order_seq_cst);  // (6)
  auto& stalled = channel_->header().worker_stalled;
  if (stalled.load(std::memory_order_relaxed) == 0 || stalled.exchange(0, std::memory_order_acquire) == 0)
    return;  // (8)
  channel_->worker_bell().ring();
}

bool StreamTable::take(Stream& from, const TokenRecord& record) {
  if (!record.valid) {  // the worker has lost its mind; its supervisor will see it die
    from.state = State::kEnded;
    from.finish = FinishReason::kError;
    from.error = StreamError::kWorkerDied;
    return false;
  }
  if (record.is_last()) {
    from.state = State::kEnded;
    from.last_read = true;
    from.finish = record.header.finish;
    from.error = record.header.error;
    from.error_detail.assign(record.text.substr(0, kMaxErrorDetailBytes));
    from.end = record.end();
    return false;
  }
  if (record.is_payload()) {
    from.last_progress_ns = now_ns_;
    from.answer_kind = record.payload_kind();
    return true;
  }
  if (!from.generated.empty()) {
    token_gaps_us_.add(static_cast<std::uint64_t>(std::max<std::int64_t>(now_ns_ - from.last_progress_ns, 0)) / 1000);
  }
  from.last_progress_ns = now_ns_;
  from.generated.push_back(record.header.token_id);
  return true;
}

std::uint32_t StreamTable::drain(std::uint32_t slot, FrameBuffer& out) {
  Stream& from = stream(slot);
  if (from.state != State::kOpen) return 0;
  now_ns_ = clock_.now_ns();
  const std::size_t before = from.generated.size();
  for (std::span<const std::byte> bytes = from.ring.front(); !bytes.empty(); bytes = from.ring.front()) {
    const TokenRecord record(bytes);
    const bool is_token = take(from, record);
    if (is_token) {
      const TokenHeader& header = record.header;
      if (from.format == StreamFormat::kWhole) {
        from.text.append(record.text);
      } else if (from.format == StreamFormat::kEvents) {
        append_token_event(out, header.index, header.token_id, record.text, header.logprob);
        if (header.extension_bytes != 0) insert_top_logprobs(out, kTokenEventEnd, record.top_logprobs());
      } else {
        append_token_object(from.json_tokens, header.token_id, record.text, header.logprob);
        if (header.extension_bytes != 0) insert_top_logprobs(from.json_tokens, kTokenObjectEnd, record.top_logprobs());
        from.text.append(record.text);
      }
    }
    from.ring.pop();
    if (!is_token) break;
  }
  from.ring.release();
  if (channel_is_dead_) fail(slot, StreamError::kWorkerDied);  // unless its last record was there
  if (from.state == State::kEnded && from.format == StreamFormat::kEvents && from.error == StreamError::kNone) {
    append_done_event(out, end_of(from));
  }
  return static_cast<std::uint32_t>(from.generated.size() - before);
}

std::optional<TokenView> StreamTable::next(std::uint32_t slot) {
  Stream& from = stream(slot);
  if (from.state != State::kOpen) return std::nullopt;
  const std::span<const std::byte> bytes = from.ring.front();
  if (bytes.empty()) {
    if (channel_is_dead_) fail(slot, StreamError::kWorkerDied);
    return std::nullopt;
  }
  const TokenRecord record(bytes);
  now_ns_ = clock_.now_ns();
  std::optional<TokenView> token;
  if (take(from, record)) {
    from.text.assign(record.text);  // the ring's bytes are given back below
    from.top_logprobs.assign(record.top_logprobs());
    token = TokenView{from.text,           from.top_logprobs,     record.header.token_id,
                      record.header.index, record.header.logprob, (record.header.flags & TokenHeader::kSpecial) != 0};
  }
  from.ring.pop();
  from.ring.release();
  return token;
}

EndOfStream StreamTable::end_of(const Stream& ended) const {
  return {ended.spec.request_id,
          ended.spec.model,
          ended.spec.version,
          ended.finish,
          static_cast<std::uint32_t>(ended.generated.size()),
          ended.end};
}

void StreamTable::finish_json(std::uint32_t slot, FrameBuffer& out) const {
  const Stream& ended = stream(slot);
  append_answer(out, end_of(ended), ended.json_tokens.view(), ended.text);
}

std::uint32_t StreamTable::buffered(std::uint32_t slot) const {
  return stream(slot).ring.records();
}

void StreamTable::fail(std::uint32_t slot, StreamError error) {
  Stream& failed = stream(slot);
  if (failed.state != State::kOpen) return;
  failed.state = State::kEnded;
  failed.finish = FinishReason::kError;
  failed.error = error;
  if (!channel_is_dead_) channel_->set_flag(slot, SlotControl::kCancel, true);
}

std::vector<std::uint32_t> StreamTable::fail_all() {
  channel_is_dead_ = true;
  std::vector<std::uint32_t> ending;
  for (std::uint32_t slot = 0; slot < streams_.size(); ++slot) {
    if (stream(slot).state == State::kDiscarding) give_back(slot);
    if (stream(slot).state != State::kOpen) continue;
    if (stream(slot).ring.records() == 0) fail(slot, StreamError::kWorkerDied);
    ending.push_back(slot);
  }
  return ending;
}

std::vector<std::uint32_t> StreamTable::overdue() const {
  const std::int64_t now_ns = clock_.now_ns();
  std::vector<std::uint32_t> slots;
  for (std::uint32_t slot = 0; slot < streams_.size(); ++slot) {
    const Stream& open = stream(slot);
    if (open.state != State::kOpen || open.timeout_ns == 0) continue;
    // Tokens that wait for their reader are not the model's silence.
    if (now_ns - open.last_progress_ns > open.timeout_ns && open.ring.records() == 0) slots.push_back(slot);
  }
  return slots;
}

std::int64_t StreamTable::longest_wait_ns() const {
  const std::int64_t now_ns = clock_.now_ns();
  std::int64_t longest = 0;
  for (const Stream& open : streams_) {
    const bool waits = open.state == State::kDiscarding || (open.state == State::kOpen && open.ring.records() == 0);
    if (waits) longest = std::max(longest, now_ns - open.last_progress_ns);
  }
  return longest;
}

std::int64_t StreamTable::longest_timeout_ns() const {
  std::int64_t longest = 0;
  for (const Stream& open : streams_) {
    if (open.state != State::kFree) longest = std::max(longest, open.timeout_ns);
  }
  return longest;
}

void StreamTable::close(std::uint32_t slot) {
  Stream& closed = stream(slot);
  if (closed.writer && closed.push_open) push_end(slot);
  if (closed.last_read || channel_is_dead_) {
    give_back(slot);
    return;
  }
  closed.state = State::kDiscarding;
  channel_->set_flag(slot, SlotControl::kCancel, true);
  discard(slot);
}

void StreamTable::discard(std::uint32_t slot) {
  Stream& from = stream(slot);
  bool is_last = false;
  for (std::span<const std::byte> bytes = from.ring.front(); !bytes.empty() && !is_last; bytes = from.ring.front()) {
    const TokenRecord record(bytes);
    is_last = record.valid && record.is_last();
    from.ring.pop();
  }
  from.ring.release();
  if (is_last) give_back(slot);
}

void StreamTable::give_back(std::uint32_t slot) {
  stream(slot).state = State::kFree;
  free_.push_back(slot);
  --open_;
}

}  // namespace rts
