#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "rts/channel.hpp"
#include "rts/clock.hpp"
#include "rts/request.hpp"
#include "rts/submit_record.hpp"
#include "rts/token_ring.hpp"

namespace rts {

// A worker's side of one channel, for models that are called and not stepped: takes requests in, tells which were given
// up, and writes answers. Who decides what runs when is its caller. Single-threaded: it belongs to the worker's thread.
//
// A slot is idle → open (taken) → idle (its last record was written).
class ChannelServer {
 public:
  ChannelServer(std::shared_ptr<Channel> channel, const Clock& clock);

  // Takes what the lanes hold, high priority first, and calls `open(slot, record)` for each request; one that is
  // malformed ends with kInvalidRequest instead. The record is valid during the call.
  template <class Open>
  void take(Open&& open) {
    // Read before the lanes are drained: a flag that is seen belongs to a request that is seen too.
    seen_epoch_ = channel_->header().control_epoch.load(std::memory_order_acquire);
    for (const Priority priority : {Priority::kHigh, Priority::kNormal, Priority::kLow}) {
      SpscRing<>::Consumer& lane = channel_->lanes().reader(priority);
      for (std::span<const std::byte> bytes = lane.front(); !bytes.empty(); bytes = lane.front()) {
        lane.pop();  // first, so that a record at which `open` throws is not met again; it is readable until release()
        const SubmitRecord record(bytes);
        if (begin(record, priority)) open(record.header.slot, record);
      }
      lane.release();
    }
  }
  // Open slots whose streams were given up since the last call; each once, after the take() that opened it. They are
  // still to be ended.
  std::vector<std::uint32_t> cancelled();
  // Slots that were refused for want of room and have it now; each once.
  std::vector<std::uint32_t> with_room();

  // The model begins to work on it.
  void start(std::uint32_t slot);
  // False: the ring has no room, and with_room() will tell of it. A text or piece longer than kMaxPieceBytes is never
  // taken, nor are more top logprobs than a request can ask for.
  bool write_token(std::uint32_t slot, std::string_view text, std::int32_t token_id, float logprob, bool special,
                   std::string_view top_logprobs = {});
  bool write_payload(std::uint32_t slot, PayloadKind kind, std::string_view piece);
  // Writes the last record; what `detail` has beyond kMaxErrorDetailBytes is cut off.
  void end(std::uint32_t slot, FinishReason reason, StreamError error = StreamError::kNone,
           std::string_view detail = {});
  bool is_open(std::uint32_t slot) const { return slot < slots_.size() && slots_[slot].is_open; }
  std::uint32_t open_slots() const { return open_; }

  // Wakes the front end, where something was written since.
  void flush();
  // The model has answered, in this time: progress, for the front end's watch.
  void count_step(std::int64_t took_ns);
  void count_batch(std::uint32_t size, BatchRelease release);
  void show_load(std::uint32_t running, std::uint32_t waiting);

  // Lets the front end ring the worker's bell. False: there is news already, and the bell was not armed.
  bool arm();
  // Ends a sleep: empties the bell.
  void wake() { channel_->worker_bell().consume(); }

  Channel& channel() const { return *channel_; }

  static constexpr std::uint32_t kMaxPieceBytes = 4096;

 private:
  struct Slot {
    TokenWriter writer;
    bool is_open = false;
    bool is_stalled = false;
    bool cancel_told = false;
    std::uint32_t written = 0;  // tokens
    std::int64_t arrival_ns = 0;
    std::int64_t started_ns = 0;
    std::int64_t first_ns = 0;
    std::int64_t last_ns = 0;
    std::int64_t stalled_since_ns = 0;
    std::int64_t stalled_ns = 0;
  };

  bool begin(const SubmitRecord& record, Priority lane);
  bool write(std::uint32_t slot, TokenHeader header, std::string_view bytes, std::string_view top_logprobs = {});
  static constexpr std::size_t kMaxExtensionBytes = max_top_logprobs_bytes(kMaxTopLogprobs);
  static bool has_room(Slot& slot) {
    return slot.writer.has_room_for(kMaxPieceBytes + kMaxExtensionBytes, kMaxErrorDetailBytes);
  }
  bool is_cancelled(std::uint32_t slot) const {
    return (channel_->control(slot).flags.load(std::memory_order_acquire) & SlotControl::kCancel) != 0;
  }
  bool any_room();
  void resume(Slot& slot);

  std::shared_ptr<Channel> channel_;
  const Clock& clock_;
  std::vector<Slot> slots_;
  std::uint32_t open_ = 0;
  std::uint32_t stalled_ = 0;
  std::uint32_t seen_epoch_ = 0;
  std::uint32_t applied_epoch_ = 0;
  bool published_ = false;
};

}  // namespace rts
