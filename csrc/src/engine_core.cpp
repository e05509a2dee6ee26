#include "rts/engine_core.hpp"

#include <poll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <stdexcept>
#include <system_error>

namespace rts {

// A channel as its worker sees it.
struct EngineCore::Attached {
  explicit Attached(std::shared_ptr<Channel> attached, std::uint32_t channel_index)
      : channel(std::move(attached)), index(channel_index), sequences(channel->config().slots) {
    writers.reserve(sequences.size());
    for (std::uint32_t slot = 0; slot < sequences.size(); ++slot) writers.push_back(channel->token_writer(slot));
  }

  std::shared_ptr<Channel> channel;
  std::uint32_t index;
  std::vector<TokenWriter> writers;
  std::vector<Sequence*> sequences;  // by slot; null where none is running or waiting
  std::uint32_t control_epoch = 0;   // the last one whose flags were applied
  bool published = false;            // since its front end was last rung
};

EngineCore::EngineCore(const EngineConfig& config, std::shared_ptr<const Vocabulary> vocabulary, const Clock& clock)
    : clock_(clock),
      vocabulary_(vocabulary),
      waiting_(config.max_queue + config.scheduler.max_sequences, config.ageing_ns, config.scheduler.max_sequences),
      blocks_(config.scheduler.num_blocks, config.scheduler.cached_blocks),
      scheduler_(config.scheduler, blocks_, waiting_.heap()),
      assembler_(config.scheduler),
      publisher_(vocabulary),
      sampler_(static_cast<std::uint32_t>(vocabulary->size()), vocabulary->eos_ids()),
      wake_fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      top_logprobs_(config.scheduler.max_sequences),
      max_context_(config.scheduler.max_context) {
  if (wake_fd_.get() < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

EngineCore::~EngineCore() = default;

void EngineCore::bind_buffers(const StepBuffers& buffers, std::int32_t* sampled, float* logprobs) {
  assembler_.bind(buffers);
  buffers_ = buffers;
  sampled_ = sampled;
  logprobs_ = logprobs;
}

void EngineCore::attach(std::shared_ptr<Channel> channel) {
  const auto hole = std::find(channels_.begin(), channels_.end(), nullptr);
  const auto index = static_cast<std::uint32_t>(hole - channels_.begin());
  if (hole == channels_.end()) channels_.emplace_back();
  channels_[index] = std::make_unique<Attached>(std::move(channel), index);
  waiting_.attach(channels_[index]->channel->lanes());
}

void EngineCore::detach(const Channel& channel) {
  for (std::unique_ptr<Attached>& attached : channels_) {
    if (!attached || attached->channel.get() != &channel) continue;
    drain(*attached);  // what is still in its lanes must not end in silence
    for (Sequence* sequence : attached->sequences) {
      if (sequence != nullptr) finish(*sequence, FinishReason::kCancelled);
    }
    collect_released();
    ring_front_ends();
    waiting_.detach(attached->channel->lanes());
    attached.reset();
  }
}

std::optional<StepShape> EngineCore::schedule() {
  take_in();
  step_started_ns_ = clock_.now_ns();
  plan_ = scheduler_.schedule(step_started_ns_);
  show_load();
  ring_front_ends();  // take_in may have ended cancelled streams
  if (plan_ == nullptr) return std::nullopt;
  assembler_.assemble(*plan_);
  return StepShape{plan_->tokens, static_cast<std::uint32_t>(plan_->rows.size()), plan_->samples};
}

void EngineCore::take_in() {
  for (const std::unique_ptr<Attached>& attached : channels_) {
    if (!attached) continue;
    // Read before the lanes are drained: a flag that is seen belongs to a request that is seen too.
    const std::uint32_t epoch = attached->channel->header().control_epoch.load(std::memory_order_acquire);
    Attached& from = *attached;
    drain(from);
    if (epoch == from.control_epoch) continue;
    apply_flags(from);
    // Where the queue is full, a flag may be that of a request still in its lane: then it is looked for again.
    if (from.channel->lanes().empty()) from.control_epoch = epoch;
  }
  resume_stalled();
  collect_released();
}

void EngineCore::drain(Attached& from) {
  waiting_.drain(from.channel->lanes(), [&](std::span<const std::byte> record) { return parse(from, record); });
}

std::optional<EngineCore::Waiting> EngineCore::parse(Attached& from, std::span<const std::byte> bytes) {
  const SubmitRecord record(bytes);
  const SubmitHeader& header = record.header;
  if (!record.has_header) return std::nullopt;
  if (header.slot >= from.sequences.size() || from.sequences[header.slot] != nullptr) return std::nullopt;

  Sequence& sequence = *new_sequence();
  sequence.stream_id = header.stream_id;
  sequence.group_id = header.group_id;
  sequence.choice_index = header.choice_index;
  sequence.channel = from.index;
  sequence.slot = header.slot;
  sequence.arrival_ns = std::clamp<std::int64_t>(header.arrival_ns, 0, clock_.now_ns());
  sequence.deadline_ns = header.deadline_ns;
  from.sequences[header.slot] = &sequence;
  if (!take_request(record, *vocabulary_, max_context_, sequence)) {
    finish(sequence, FinishReason::kError, StreamError::kInvalidRequest);
    return std::nullopt;
  }
  return Waiting{Ticket{header.priority, sequence.arrival_ns, header.deadline_ns}, &sequence, &sequence.waiting_handle};
}

Sequence* EngineCore::new_sequence() {
  if (free_sequences_.empty()) {
    sequences_.push_back(std::make_unique<Sequence>());
    return sequences_.back().get();
  }
  Sequence* sequence = free_sequences_.back();
  free_sequences_.pop_back();
  // A used one keeps its memory.
  std::vector<std::int32_t> tokens = std::move(sequence->tokens), blocks = std::move(sequence->blocks);
  std::vector<Hash128> hashes = std::move(sequence->hashes);
  tokens.clear();
  blocks.clear();
  hashes.clear();
  *sequence = Sequence{};
  sequence->tokens = std::move(tokens);
  sequence->blocks = std::move(blocks);
  sequence->hashes = std::move(hashes);
  return sequence;
}

void EngineCore::apply_flags(Attached& from) {
  for (Sequence* sequence : from.sequences) {
    if (sequence == nullptr) continue;
    const std::uint32_t flags = from.channel->control(sequence->slot).flags.load(std::memory_order_acquire);
    if ((flags & SlotControl::kCancel) != 0) {
      finish(*sequence, FinishReason::kCancelled);
      continue;
    }
    sequence->pause_asked = (flags & SlotControl::kPause) != 0;
    sequence->paused = sequence->pause_asked || sequence->stalled_since_ns != 0;
  }
}

void EngineCore::sample(std::span<const float> logits) {
  const std::size_t vocabulary = vocabulary_->size();
  if (plan_ == nullptr || logits.size() != plan_->samples * vocabulary) {
    throw std::invalid_argument("logits must be [samples, vocabulary] of the scheduled step");
  }
  std::size_t at = 0;
  for (const PlanRow& row : plan_->rows) {
    if (!row.sample) continue;
    const Sequence& sequence = *row.sequence;
    const Sampler::Choice choice = sampler_.sample(
        logits.subspan(at * vocabulary, vocabulary), sequence.sampling, sequence.tokens, sequence.prompt_tokens,
        sequence.generated(), {.logit_bias = sequence.logit_bias, .stop_token_ids = sequence.stop_token_ids});
    sampled_[at] = choice.token;
    logprobs_[at] = choice.logprob;
    top_logprobs_[at].assign(choice.top.begin(), choice.top.end());
    ++at;
  }
}

void EngineCore::commit() {
  const std::int64_t now_ns = clock_.now_ns();
  // An id that no vocabulary has would reach the model's embedding in the next step, which all sequences share.
  const auto vocabulary = static_cast<std::int64_t>(vocabulary_->size());
  std::replace_if(sampled_, sampled_ + plan_->samples, [=](auto id) { return id >= vocabulary; }, -1);
  scheduler_.commit(*plan_, {sampled_, plan_->samples});
  std::size_t at = 0;
  for (const PlanRow& row : plan_->rows) {
    if (!row.sample) continue;
    publish(*row.sequence, logprobs_[at], top_logprobs_[at], now_ns);
    top_logprobs_[at].clear();  // the next step's model may sample by itself
    ++at;
  }
  count_step(*plan_);
  plan_ = nullptr;
  collect_released();
  ring_front_ends();
}

void EngineCore::count_step(const Plan& plan) {
  const std::int64_t step_ns = clock_.now_ns() - step_started_ns_;
  scheduler_.observe(plan, step_ns);
  const auto step_us = static_cast<std::uint64_t>(step_ns / 1000);
  for (const std::unique_ptr<Attached>& attached : channels_) {
    if (!attached) continue;
    ChannelHeader& header = attached->channel->header();
    header.steps.fetch_add(1, std::memory_order_relaxed);
    header.stats.step_us.add(step_us);
    header.stats.batch_sequences.add(plan.rows.size());
    header.stats.batch_tokens.add(plan.tokens);
  }
}

void EngineCore::show_load() {
  for (const std::unique_ptr<Attached>& attached : channels_) {
    if (!attached) continue;
    WorkerStats& stats = attached->channel->header().stats;
    stats.preemptions.store(scheduler_.preemptions(), std::memory_order_relaxed);
    stats.running.store(scheduler_.running().size(), std::memory_order_relaxed);
    stats.waiting.store(waiting_.size(), std::memory_order_relaxed);
    stats.kv_blocks.store(blocks_.size(), std::memory_order_relaxed);
    stats.kv_blocks_used.store(blocks_.in_use(), std::memory_order_relaxed);
  }
}

void EngineCore::abort() {
  scheduler_.retract(*plan_);
  for (const PlanRow& row : plan_->rows) finish(*row.sequence, FinishReason::kError, StreamError::kModelFailed);
  // Tokens of finished sequences are dropped, whatever they are.
  std::fill_n(sampled_, plan_->samples, 0);
  for (std::vector<TopLogprob>& top : top_logprobs_) top.clear();
  scheduler_.commit(*plan_, {sampled_, plan_->samples});
  plan_ = nullptr;
  collect_released();
  ring_front_ends();
}

void EngineCore::publish(Sequence& sequence, float logprob, std::span<const TopLogprob> top, std::int64_t now_ns) {
  if (!owns_slot(sequence)) return;
  Attached& to = *channels_[sequence.channel];
  TokenWriter& writer = to.writers[sequence.slot];
  if (sequence.first_token_ns == 0) sequence.first_token_ns = now_ns;
  sequence.last_token_ns = now_ns;
  const float shown = sequence.sampling.has(SamplingParams::kLogprobs) ? logprob : std::nanf("");
  while (sequence.published < sequence.generated()) {
    const std::int32_t token = sequence.tokens[sequence.prompt_tokens + sequence.published];
    const bool is_last = sequence.finish != FinishReason::kNone && sequence.published + 1 == sequence.generated();
    if (publisher_.publish(sequence, writer, token, shown, is_last, top) == FinishReason::kStop) {
      // Its last token may be both. A stop is the better news: the answer is whole.
      if (sequence.finish == FinishReason::kLength) sequence.finish = FinishReason::kStop;
      finish(sequence, FinishReason::kStop);
      return;
    }
  }
  to.published = true;
  to.channel->mark_ready(sequence.slot);
  if (sequence.finish != FinishReason::kNone) {
    end_stream(sequence);
  } else if (!writer.has_room(sequence.sampling.top_logprobs)) {
    stall(sequence, now_ns);
  }
}

void EngineCore::stall(Sequence& sequence, std::int64_t now_ns) {
  sequence.stalled_since_ns = now_ns;
  sequence.paused = true;
  stalled_.push_back(&sequence);
  raise(channels_[sequence.channel]->channel->header().stats.stalls);
}

void EngineCore::resume_stalled() {
  if (stalled_.empty()) return;
  const std::int64_t now_ns = clock_.now_ns();
  std::erase_if(stalled_, [&](Sequence* sequence) {
    if (!has_room(*sequence)) return false;
    sequence->stalled_ns += now_ns - sequence->stalled_since_ns;
    sequence->stalled_since_ns = 0;
    sequence->paused = sequence->pause_asked;
    return true;
  });
}

void EngineCore::finish(Sequence& sequence, FinishReason reason, StreamError error) {
  scheduler_.finish(sequence, reason, error);
  end_stream(sequence);
}

// False: its stream has ended already, or its channel was detached.
bool EngineCore::owns_slot(const Sequence& sequence) const {
  const Attached* const of = channels_[sequence.channel].get();
  return of != nullptr && of->sequences[sequence.slot] == &sequence;
}

void EngineCore::end_stream(Sequence& sequence) {
  if (!owns_slot(sequence)) return;
  Attached& to = *channels_[sequence.channel];
  to.sequences[sequence.slot] = nullptr;
  const std::int64_t now_ns = clock_.now_ns();
  if (sequence.stalled_since_ns != 0) {
    sequence.stalled_ns += now_ns - sequence.stalled_since_ns;
    std::erase(stalled_, &sequence);
  }
  Publisher::publish_end(sequence, to.writers[sequence.slot], now_ns);
  to.channel->mark_ready(sequence.slot);
  to.published = true;
}

void EngineCore::collect_released() {
  for (Sequence* sequence : scheduler_.released()) free_sequences_.push_back(sequence);
  scheduler_.released().clear();
}

void EngineCore::ring_front_ends() {
  for (const std::unique_ptr<Attached>& attached : channels_) {
    if (!attached || !attached->published) continue;
    attached->published = false;
    attached->channel->front_bell().ring();
  }
}

void EngineCore::wait() {
  std::vector<pollfd>& sleeping_on = poll_fds_;
  sleeping_on.assign(1, pollfd{wake_fd_.get(), POLLIN, 0});
  for (const std::unique_ptr<Attached>& attached : channels_) {
    if (!attached) continue;
    attached->channel->worker_bell().arm();
    sleeping_on.push_back({attached->channel->worker_bell_fd(), POLLIN, 0});
  }
  ask_for_room();
  const bool sleeps = !has_news();
  if (sleeps) {
    while (::poll(sleeping_on.data(), sleeping_on.size(), -1) < 0 && errno == EINTR) {
    }
  }
  // What has not rung needs no system call to be emptied.
  auto slept_on = sleeping_on.cbegin();
  const auto rang = [&] { return ((slept_on++)->revents & POLLIN) != 0 || !sleeps; };
  if (rang()) eventfd::drain(wake_fd_.get());
  for (const std::unique_ptr<Attached>& attached : channels_) {
    if (!attached) continue;
    const Doorbell bell = attached->channel->worker_bell();
    if (rang()) {
      bell.consume();
    } else {
      bell.disarm();
    }
  }
}

// Only once the bells are armed: a front end that takes the request then rings a bell that wakes.
void EngineCore::ask_for_room() {
  if (stalled_.empty()) return;
  for (const std::unique_ptr<Attached>& attached : channels_) {
    if (attached) attached->channel->header().worker_stalled.store(1, std::memory_order_release);  // (7)
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);  // (5)
}

bool EngineCore::has_news() const {
  for (const std::unique_ptr<Attached>& attached : channels_) {
    if (!attached) continue;
    const Channel& channel = *attached->channel;
    if (channel.header().control_epoch.load(std::memory_order_acquire) != attached->control_epoch) return true;
    if (!attached->channel->lanes().empty()) return true;
  }
  return std::ranges::any_of(stalled_, [this](const Sequence* sequence) { return has_room(*sequence); });
}

bool EngineCore::has_room(const Sequence& sequence) const {
  return channels_[sequence.channel]->writers[sequence.slot].has_room(sequence.sampling.top_logprobs);
}

std::optional<ModelFailure> EngineCore::run(NativeModel& model) {
  while (!take_interrupt()) {
    const std::optional<StepShape> shape = schedule();
    if (!shape) {
      wait();
      continue;
    }
    const auto failed = [&](const char* message) {
      abort();
      return ModelFailure{shape->sequences, message};
    };
    try {
      model.step({*shape, buffers_, {sampled_, shape->samples}, {logprobs_, shape->samples}, sample_});
    } catch (const std::exception& error) {
      return failed(error.what());
    } catch (...) {
      return failed("something that is no std::exception");
    }
    commit();
  }
  return std::nullopt;
}

bool EngineCore::take_interrupt() {
  // Looked at first: an exchange a step would cost more than all of this loop.
  return interrupted_.load(std::memory_order_relaxed) &&
         interrupted_.exchange(false, std::memory_order_acquire);  // (2)
}

void EngineCore::interrupt() {
  interrupted_.store(true, std::memory_order_release);  // (1)
  eventfd::signal(wake_fd_.get());
}

void EngineCore::close() {
  for (const std::unique_ptr<Attached>& attached : channels_) {
    if (attached) detach(*attached->channel);
  }
}

}  // namespace rts
