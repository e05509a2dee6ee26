#pragma once

#include <poll.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "rts/batch_assembler.hpp"
#include "rts/block_pool.hpp"
#include "rts/channel.hpp"
#include "rts/clock.hpp"
#include "rts/native_model.hpp"
#include "rts/priority_queue.hpp"
#include "rts/publisher.hpp"
#include "rts/request_intake.hpp"
#include "rts/sampler.hpp"
#include "rts/scheduler.hpp"
#include "rts/sequence.hpp"
#include "rts/submit_record.hpp"
#include "rts/vocabulary.hpp"

namespace rts {

struct EngineConfig {
  SchedulerConfig scheduler;
  std::uint32_t max_queue = 1024;
  std::int64_t ageing_ns = 5'000'000'000;
};

// A worker's engine but for the model: drains the channels' lanes, schedules, assembles, commits and publishes. One
// step is schedule() → the model → commit(). It belongs to the worker's thread; only interrupt() may be called from
// others.
class EngineCore {
 public:
  EngineCore(const EngineConfig& config, std::shared_ptr<const Vocabulary> vocabulary, const Clock& clock);
  ~EngineCore();

  // Caller-owned memory for the assembled batch, and for what is sampled: max_sequences tokens and log-probabilities.
  void bind_buffers(const StepBuffers& buffers, std::int32_t* sampled, float* logprobs);

  void attach(std::shared_ptr<Channel> channel);
  // Ends the channel's streams as cancelled and forgets it.
  void detach(const Channel& channel);

  // Takes in what the front ends sent and assembles the next step. Nothing: there is nothing to do.
  std::optional<StepShape> schedule();
  // Samples each wanted position from its row of logits, [samples × vocabulary], into the bound buffers.
  void sample(std::span<const float> logits);
  // Takes over the sampled tokens and publishes them; a token of -1 ends its sequence with kInvalidLogits.
  void commit();
  // The model failed in this step: its sequences end with kModelFailed, the others go on.
  void abort();

  // Sleeps until a front end, or interrupt(), has something new.
  void wait();

  // Runs steps while there is something to do and sleeps while there is not, until it is interrupted. While there is
  // work it takes no lock, and makes no system call but to wake a front end that sleeps. A model that throws ends the
  // run: its step is aborted, and what it threw is returned. An interrupt that came meanwhile then ends the next run.
  std::optional<ModelFailure> run(NativeModel& model);
  // Makes run() return at its next step boundary, at once where it sleeps, or as soon as it is entered; likewise
  // wait(). Several that come before run() returns are one. Any thread. Wait-free, but for a system call. (1) releases:
  // what was written before is seen by whom run() returns to, whose exchange acquires (2). It precedes the system call,
  // and run() sleeps only on the descriptor that this signals: so it is woken where it looked at the flag too early,
  // and then finds it. It is never lost.
  void interrupt();

  // Ends every sequence as cancelled.
  void close();

 private:
  struct Attached;
  using Waiting = std::tuple<Ticket, Sequence*, std::uint64_t*>;

  void take_in();
  void drain(Attached& from);
  std::optional<Waiting> parse(Attached& from, std::span<const std::byte> bytes);
  void apply_flags(Attached& channel);
  void resume_stalled();
  void ask_for_room();
  void publish(Sequence& sequence, float logprob, std::span<const TopLogprob> top, std::int64_t now_ns);
  void stall(Sequence& sequence, std::int64_t now_ns);
  void finish(Sequence& sequence, FinishReason reason, StreamError error = StreamError::kNone);
  bool owns_slot(const Sequence& sequence) const;
  void end_stream(Sequence& sequence);
  void collect_released();
  void ring_front_ends();
  void count_step(const Plan& plan);
  void show_load();
  bool has_news() const;
  bool has_room(const Sequence& sequence) const;
  Sequence* new_sequence();
  bool take_interrupt();

  const Clock& clock_;
  std::shared_ptr<const Vocabulary> vocabulary_;
  PriorityQueue<Sequence*> waiting_;
  BlockPool blocks_;
  Scheduler scheduler_;
  BatchAssembler assembler_;
  Publisher publisher_;
  Sampler sampler_;
  FileDescriptor wake_fd_;
  std::vector<std::unique_ptr<Attached>> channels_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
  std::vector<Sequence*> free_sequences_;
  std::vector<Sequence*> stalled_;
  std::vector<pollfd> poll_fds_;
  Plan* plan_ = nullptr;
  std::int64_t step_started_ns_ = 0;
  StepBuffers buffers_;
  std::int32_t* sampled_ = nullptr;
  float* logprobs_ = nullptr;
  std::vector<std::vector<TopLogprob>> top_logprobs_;  // of each sampled row; empty where none were asked for
  const std::function<void(std::span<const float>)> sample_ = [this](std::span<const float> logits) { sample(logits); };
  std::atomic<bool> interrupted_{false};
  const std::uint32_t max_context_;
};

}  // namespace rts
