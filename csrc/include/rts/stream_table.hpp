#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "rts/channel.hpp"
#include "rts/clock.hpp"
#include "rts/histogram.hpp"
#include "rts/request.hpp"
#include "rts/sse_writer.hpp"
#include "rts/token_ring.hpp"

namespace rts {

// How a stream's tokens leave the front end.
enum class StreamFormat : std::uint8_t {
  kTokens,  // one at a time, by next()
  kEvents,  // as server-sent events, by drain()
  kJson,    // as one JSON object at the end, by drain() and then finish_json()
  kWhole,   // as the bytes of a payload at the end, by drain() and then whole()
};

// All that is known of a request when it is submitted.
struct StreamSpec {
  std::string request_id;
  std::string model;
  std::string version;
  std::vector<std::int32_t> prompt;
  std::vector<std::string> stops;
  std::vector<TokenBias> logit_bias;
  std::vector<std::int32_t> stop_token_ids;
  SamplingParams sampling;
  Priority priority = Priority::kNormal;
  // Of a callable model's request, which has no prompt ids. The bytes are given up once they are queued.
  PayloadKind payload_kind = PayloadKind::kNone;
  PayloadKind answer_kind = PayloadKind::kNone;
  std::string payload;
};

struct TokenView {
  std::string_view text;          // valid until the next call on the same stream
  std::string_view top_logprobs;  // likewise; for a TopLogprobReader
  std::int32_t token_id = 0;
  std::uint32_t index = 0;
  float logprob = 0.0F;
  bool special = false;
};

// The front end's streams over one channel, by slot. It owns a request's state (parameters, prompt and generated ids,
// timings), so that what a worker knows can be rebuilt from here. Single-threaded: it belongs to the event loop.
//
// A slot is free → open (submitted, or fed by push) → ended (its last record was read, or it failed) → free. One that
// is closed before it ended is cancelled and its records are discarded until the last one came: only then can the slot
// be given to another stream.
class StreamTable {
 public:
  StreamTable(std::shared_ptr<Channel> channel, const Clock& clock);

  // Takes a slot and queues the request. Nothing where no slot is free or the lane has no room. `timeout_ns` bounds the
  // time without a token, 0: no bound.
  std::optional<std::uint32_t> submit(StreamSpec spec, std::int64_t timeout_ns);
  // Takes a slot for a stream that is fed by push(), in this process.
  std::optional<std::uint32_t> open(std::int64_t timeout_ns);
  // The producer's door to such a stream: the same ring that a worker publishes to. False: it holds ring_records tokens
  // already or has no room for the text, or has ended; a text that has more than kMaxPushedTextBytes with its top
  // logprobs is never taken.
  bool push(std::uint32_t slot, std::string_view text, std::int32_t token_id, float logprob, bool special,
            std::string_view top_logprobs = {});
  bool push_end(std::uint32_t slot);

  // Slots that have something to read since the last call, in slot order; valid until the next call.
  std::span<const std::uint32_t> collect();
  // Lets the next record ring the doorbell. False: records came meanwhile, and the bell was not armed: collect again.
  bool arm();
  void disarm();
  // Tells the worker that rings were read, where a sequence waits for that. Once after each round of reading.
  void rings_read();

  // Frames all that the slot's ring holds, as its format says; how many tokens that were.
  std::uint32_t drain(std::uint32_t slot, FrameBuffer& out);
  // Takes one token. Nothing: there is none at the moment, or the stream has ended.
  std::optional<TokenView> next(std::uint32_t slot);
  // The answer of a stream of format kJson that has ended without an error.
  void finish_json(std::uint32_t slot, FrameBuffer& out) const;
  // The answer of a stream of format kWhole that has ended without an error, and what its bytes are. It is valid until
  // the stream is closed.
  std::string_view whole(std::uint32_t slot) const { return stream(slot).text; }
  PayloadKind whole_kind(std::uint32_t slot) const { return stream(slot).answer_kind; }
  std::uint32_t buffered(std::uint32_t slot) const;

  StreamFormat format(std::uint32_t slot) const { return stream(slot).format; }
  void set_format(std::uint32_t slot, StreamFormat format) { stream(slot).format = format; }
  void pause(std::uint32_t slot, bool on) { channel_->set_flag(slot, SlotControl::kPause, on); }
  // Gives the slot up; cancels what still runs.
  void close(std::uint32_t slot);

  // Ends the stream for its reader, with an error; the worker is told to stop.
  void fail(std::uint32_t slot, StreamError error);
  // The worker is gone: every open stream gives what its ring still holds, then ends; with kWorkerDied where the last
  // record is missing. The slots of those streams.
  std::vector<std::uint32_t> fail_all();
  // Open streams that had no token for longer than their timeout allows.
  std::vector<std::uint32_t> overdue() const;

  bool ended(std::uint32_t slot) const { return stream(slot).state == State::kEnded; }
  StreamError error(std::uint32_t slot) const { return stream(slot).error; }
  // What the worker says more of the error; not to be trusted to be UTF-8.
  std::string_view error_detail(std::uint32_t slot) const { return stream(slot).error_detail; }
  FinishReason finish(std::uint32_t slot) const { return stream(slot).finish; }
  std::uint32_t generated(std::uint32_t slot) const {
    return static_cast<std::uint32_t>(stream(slot).generated.size());
  }
  const EndExtension& end(std::uint32_t slot) const { return stream(slot).end; }
  std::int64_t last_progress_ns(std::uint32_t slot) const { return stream(slot).last_progress_ns; }
  // How long the stream that has waited longest for its worker has done so; 0 where none waits. One whose tokens wait
  // for their reader is not waiting for its worker.
  std::int64_t longest_wait_ns() const;
  // Of the streams that are open; 0 where none has a bound.
  std::int64_t longest_timeout_ns() const;
  std::uint32_t open_streams() const { return open_; }
  // Microseconds between two tokens of a stream as its reader sees them: 0 where they were read together.
  const Histogram<27>& token_gaps_us() const { return token_gaps_us_; }
  const Channel& channel() const { return *channel_; }

 private:
  enum class State : std::uint8_t { kFree, kOpen, kEnded, kDiscarding };

  struct Stream {
    explicit Stream(SpscRing<>::Consumer reader) : ring(std::move(reader)) {}

    SpscRing<>::Consumer ring;
    State state = State::kFree;
    StreamFormat format = StreamFormat::kTokens;
    FinishReason finish = FinishReason::kNone;
    StreamError error = StreamError::kNone;
    PayloadKind answer_kind = PayloadKind::kNone;
    std::string error_detail;
    bool last_read = false;  // the last record was read: the worker will not touch the slot again
    std::uint64_t id = 0;
    std::int64_t timeout_ns = 0;
    std::int64_t last_progress_ns = 0;
    StreamSpec spec;
    std::vector<std::int32_t> generated;
    EndExtension end;
    FrameBuffer json_tokens{0};
    std::string text;
    std::string top_logprobs;

    std::optional<TokenWriter> writer;  // of a stream that is fed by push
    std::uint32_t pushed = 0;
    bool push_open = false;
  };

  Stream& stream(std::uint32_t slot) { return streams_[slot]; }
  const Stream& stream(std::uint32_t slot) const { return streams_[slot]; }
  std::optional<std::uint32_t> take_slot(StreamFormat format, std::int64_t timeout_ns);
  bool queue(std::uint32_t slot, Stream& stream);
  void announce(std::uint32_t slot);
  bool take(Stream& from, const TokenRecord& record);
  EndOfStream end_of(const Stream& ended) const;
  void discard(std::uint32_t slot);
  void give_back(std::uint32_t slot);

  std::shared_ptr<Channel> channel_;
  const Clock& clock_;
  std::vector<Stream> streams_;
  std::vector<std::uint32_t> free_;
  std::vector<std::uint32_t> ready_;
  std::uint32_t open_ = 0;
  std::uint64_t next_id_ = 1;
  std::int64_t now_ns_ = 0;  // of the reading that goes on
  bool channel_is_dead_ = false;
  Histogram<27> token_gaps_us_;
};

}  // namespace rts
