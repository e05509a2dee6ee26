#include "rts/channel_server.hpp"

#include <algorithm>
#include <atomic>
#include <span>

namespace rts {

ChannelServer::ChannelServer(std::shared_ptr<Channel> channel, const Clock& clock)
    : channel_(std::move(channel)), clock_(clock) {
  const std::uint32_t slots = channel_->config().slots;
  slots_.reserve(slots);
  for (std::uint32_t slot = 0; slot < slots; ++slot) slots_.push_back(Slot{.writer = channel_->token_writer(slot)});
}

bool ChannelServer::begin(const SubmitRecord& record, Priority lane) {
  const SubmitHeader& header = record.header;
  // Without a stream to answer it is dropped.
  if (!record.has_header || header.slot >= slots_.size() || slots_[header.slot].is_open) return false;
  Slot& slot = slots_[header.slot];
  slot = Slot{.writer = std::move(slot.writer)};
  slot.is_open = true;
  ++open_;
  slot.arrival_ns = std::clamp<std::int64_t>(header.arrival_ns, 0, clock_.now_ns());
  const bool usable = record.valid && header.priority == lane && header.payload_kind != PayloadKind::kNone &&
                      header.payload_kind <= PayloadKind::kNumpy && header.answer_kind <= PayloadKind::kNumpy &&
                      header.sampling.max_tokens >= 1;
  if (!usable) end(header.slot, FinishReason::kError, StreamError::kInvalidRequest);
  return usable;
}

std::vector<std::uint32_t> ChannelServer::cancelled() {
  std::vector<std::uint32_t> given_up;
  if (applied_epoch_ == seen_epoch_) return given_up;
  applied_epoch_ = seen_epoch_;
  for (std::uint32_t slot = 0; slot < slots_.size(); ++slot) {
    if (!slots_[slot].is_open || slots_[slot].cancel_told || !is_cancelled(slot)) continue;
    slots_[slot].cancel_told = true;
    given_up.push_back(slot);
  }
  return given_up;
}

std::vector<std::uint32_t> ChannelServer::with_room() {
  std::vector<std::uint32_t> roomy;
  for (std::uint32_t slot = 0; stalled_ != 0 && slot < slots_.size(); ++slot) {
    if (!slots_[slot].is_stalled || !has_room(slots_[slot])) continue;
    resume(slots_[slot]);
    roomy.push_back(slot);
  }
  return roomy;
}

void ChannelServer::resume(Slot& slot) {
  slot.is_stalled = false;
  --stalled_;
  slot.stalled_ns += clock_.now_ns() - slot.stalled_since_ns;
}

void ChannelServer::start(std::uint32_t slot) {
  slots_[slot].started_ns = clock_.now_ns();
}

bool ChannelServer::write_token(std::uint32_t slot, std::string_view text, std::int32_t token_id, float logprob,
                                bool special, std::string_view top_logprobs) {
  TokenHeader header;
  header.index = slots_[slot].written;
  header.token_id = token_id;
  header.logprob = logprob;
  header.flags = special ? TokenHeader::kSpecial : 0;
  if (!write(slot, header, text, top_logprobs)) return false;
  ++slots_[slot].written;
  return true;
}

bool ChannelServer::write_payload(std::uint32_t slot, PayloadKind kind, std::string_view piece) {
  TokenHeader header;
  header.token_id = static_cast<std::int32_t>(kind);
  header.flags = TokenHeader::kPayload;
  return write(slot, header, piece);
}

bool ChannelServer::write(std::uint32_t at, TokenHeader header, std::string_view bytes, std::string_view top_logprobs) {
  Slot& slot = slots_[at];
  if (!slot.is_open || bytes.size() > kMaxPieceBytes || top_logprobs.size() > kMaxExtensionBytes) return false;
  const std::int64_t now_ns = clock_.now_ns();
  if (!has_room(slot)) {
    if (!slot.is_stalled) {
      slot.is_stalled = true;
      slot.stalled_since_ns = now_ns;
      ++stalled_;
      raise(channel_->header().stats.stalls);
    }
    return false;
  }
  if (slot.is_stalled) resume(slot);
  slot.writer.write_token(header, bytes, top_logprobs);
  if (slot.first_ns == 0) slot.first_ns = now_ns;
  slot.last_ns = now_ns;
  channel_->mark_ready(at);
  published_ = true;
  return true;
}

void ChannelServer::end(std::uint32_t at, FinishReason reason, StreamError error, std::string_view detail) {
  Slot& slot = slots_[at];
  if (!slot.is_open) return;
  if (slot.is_stalled) resume(slot);
  const std::int64_t now_ns = clock_.now_ns();
  const auto reached = [&](std::int64_t time_ns) { return time_ns != 0 ? time_ns : now_ns; };
  EndExtension extension;
  extension.queue_ns = reached(slot.started_ns) - slot.arrival_ns;
  extension.prefill_ns = reached(slot.first_ns) - reached(slot.started_ns);
  extension.decode_ns = reached(slot.last_ns) - reached(slot.first_ns);
  extension.stalled_ns = slot.stalled_ns;

  TokenHeader header;
  header.index = slot.written;
  header.finish = reason;
  header.error = error;
  slot.writer.write_last(header, extension, detail.substr(0, kMaxErrorDetailBytes));
  slot.is_open = false;
  --open_;
  channel_->mark_ready(at);
  published_ = true;
}

void ChannelServer::flush() {
  if (!published_) return;
  published_ = false;
  channel_->front_bell().ring();
}

void ChannelServer::count_step(std::int64_t took_ns) {
  channel_->header().steps.fetch_add(1, std::memory_order_relaxed);
  channel_->header().stats.step_us.add(static_cast<std::uint64_t>(std::max<std::int64_t>(took_ns, 0) / 1000));
}

void ChannelServer::count_batch(std::uint32_t size, BatchRelease release) {
  WorkerStats& stats = channel_->header().stats;
  stats.batch_sequences.add(size);
  raise(stats.batch_releases[static_cast<std::size_t>(release)]);
}

void ChannelServer::show_load(std::uint32_t running, std::uint32_t waiting) {
  WorkerStats& stats = channel_->header().stats;
  stats.running.store(running, std::memory_order_relaxed);
  stats.waiting.store(waiting, std::memory_order_relaxed);
}

bool ChannelServer::arm() {
  channel_->worker_bell().arm();
  if (stalled_ != 0) {
    // Only once the bell is armed: a front end that takes the request then rings a bell that wakes.
    channel_->header().worker_stalled.store(1, std::memory_order_release);  // (7)
    std::atomic_thread_fence(std::memory_order_seq_cst);                    // (5)
  }
  const bool flags = channel_->header().control_epoch.load(std::memory_order_acquire) != seen_epoch_;
  if (!flags && channel_->lanes().empty() && !any_room()) return true;
  channel_->worker_bell().disarm();
  return false;
}

bool ChannelServer::any_room() {
  if (stalled_ == 0) return false;
  return std::ranges::any_of(slots_, [&](Slot& slot) { return slot.is_stalled && has_room(slot); });
}

}  // namespace rts
