// From the front end's submit to the assembled step.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "rts/batch_assembler.hpp"
#include "rts/block_pool.hpp"
#include "rts/channel.hpp"
#include "rts/clock.hpp"
#include "rts/engine_core.hpp"
#include "rts/priority_queue.hpp"
#include "rts/scheduler.hpp"
#include "rts/stream_table.hpp"
#include "rts/vocabulary.hpp"
#include "stage.hpp"

namespace rts::bench {

namespace {

constexpr std::uint32_t kBatch = 256;
constexpr std::uint32_t kPromptTokens = 64;
constexpr std::uint32_t kSteps = 64;  // of one run
constexpr std::int64_t kAgeingNs = 5'000'000'000;

StreamSpec request(std::int32_t max_tokens) {
  StreamSpec spec;
  spec.request_id = "5f0c1e7ab94d4f0f9ad2c3b4e5f60718";
  spec.model = "smollm2-135m-instruct";
  spec.version = "1.0.0";
  spec.prompt.resize(kPromptTokens);
  std::iota(spec.prompt.begin(), spec.prompt.end(), 1);
  spec.sampling.max_tokens = max_tokens;
  return spec;
}

// StreamTable::submit of one request: it takes a slot, keeps the request and writes its record into the lane. The
// worker is awake, so that the doorbell makes no system call; its side is played by prepare(), as are the requests
// made.
class Submit final : public Stage {
 public:
  static constexpr std::uint32_t kOperations = 1000;

  void prepare() override {
    SpscRing<>::Consumer& lane = channel_->lanes().reader(Priority::kNormal);
    while (!lane.front().empty()) lane.pop();
    lane.release();
    for (const std::uint32_t slot : slots_) end(slot);
    slots_.clear();
    specs_.assign(kOperations, request(128));
  }

  void run() override {
    for (StreamSpec& spec : specs_) slots_.push_back(table_.submit(std::move(spec), 30'000'000'000).value());
  }

 private:
  void end(std::uint32_t slot) {
    channel_->token_writer(slot).write_last({}, {});
    table_.next(slot);
    table_.close(slot);
  }

  SteadyClock clock_;
  std::shared_ptr<Channel> channel_ = Channel::create({.slots = 1024}, false);
  StreamTable table_{channel_, clock_};
  std::vector<StreamSpec> specs_;
  std::vector<std::uint32_t> slots_;
};

// One entry's way from its producer to its turn: LaneSet push, PriorityQueue drain, pop; a full heap of 64.
class Queue final : public Stage {
 public:
  static constexpr std::uint32_t kRounds = 200, kEntries = 64;
  static constexpr std::uint32_t kOperations = kRounds * kEntries;

  Queue() { queue_.attach(lanes_); }

  void run() override {
    for (std::uint32_t round = 0; round < kRounds; ++round) {
      for (std::uint32_t entry = 0; entry < kEntries; ++entry) {
        header_.arrival_ns = entry;
        lanes_.push(static_cast<Priority>(entry % kPriorities), std::span(&header_, 1));
      }
      queue_.drain([](std::span<const std::byte> record) {
        SubmitHeader header;
        std::memcpy(&header, record.data(), sizeof header);
        return std::optional(std::pair(Ticket{header.priority, header.arrival_ns}, header.slot));
      });
      while (const std::optional<std::uint32_t> slot = queue_.pop(0)) keep(*slot);
    }
  }

 private:
  SubmitHeader header_;
  LaneSet<> lanes_ = LaneSet<>::allocate(1 << 16);
  PriorityQueue<std::uint32_t> queue_{kEntries, kAgeingNs};
};

// A scheduler with a full batch of sequences in the middle of their answers, and others that wait for a place.
class DecodingBatch {
 public:
  static constexpr SchedulerConfig kConfig{
      .max_sequences = kBatch, .token_budget = 512, .block_size = 16, .num_blocks = kBatch * 256, .max_context = 4096};
  explicit DecodingBatch(std::uint32_t waiting) : sequences_(kBatch + waiting), heap_(kBatch + waiting, kAgeingNs) {
    for (std::size_t i = 0; i < sequences_.size(); ++i) {
      Sequence& sequence = sequences_[i];
      // Their blocks fill up at different steps.
      sequence.prompt_tokens = kPromptTokens + static_cast<std::uint32_t>(i % kConfig.block_size);
      sequence.sampling.max_tokens = static_cast<std::int32_t>(kConfig.max_context);
      sequence.tokens.assign(kConfig.max_context, 1);  // memory that is there, as that of a used sequence
      sequence.tokens.resize(sequence.prompt_tokens);
      sequence.blocks.reserve(kConfig.max_context / kConfig.block_size);
      heap_.push({.arrival_ns = static_cast<std::int64_t>(i)}, &sequence, &sequence.waiting_handle);
    }
    while (sequences_[kBatch - 1].generated() == 0) commit(*schedule());
  }

  Plan* schedule() { return scheduler_.schedule(0); }
  void commit(Plan& plan) { scheduler_.commit(plan, {sampled_.data(), plan.samples}); }
  bool has_steps(std::uint32_t steps) const {
    return sequences_.front().tokens.size() + steps + 1 < kConfig.max_context;
  }

 private:
  std::vector<Sequence> sequences_;
  AgeingHeap<Sequence*> heap_;
  BlockPool blocks_{kConfig.num_blocks};
  Scheduler scheduler_{kConfig, blocks_, heap_};
  std::array<std::int32_t, kConfig.token_budget> sampled_{};
};

void renew_for_steps(std::unique_ptr<DecodingBatch>& batch, std::uint32_t waiting) {
  if (!batch || !batch->has_steps(kSteps)) batch = std::make_unique<DecodingBatch>(waiting);
}

// Scheduler::schedule and commit of one step: 256 sequences decode, 1,000 wait.
class Schedule final : public Stage {
 public:
  void prepare() override { renew_for_steps(batch_, 1000); }
  void run() override {
    for (std::uint32_t step = 0; step < kSteps; ++step) {
      Plan* const plan = batch_->schedule();
      keep(*plan);
      batch_->commit(*plan);
    }
  }

 private:
  std::unique_ptr<DecodingBatch> batch_;
};

// The arrays that a step is assembled into.
struct StepArrays {
  explicit StepArrays(const SchedulerConfig& config)
      : positions(std::size_t{3} * config.token_budget),
        slots(config.token_budget),
        rows(std::size_t{3} * config.max_sequences + 1),
        table(config.max_sequences * ((config.max_context + config.block_size - 1) / config.block_size)),
        logits_at(config.max_sequences) {
    buffers.tokens = positions.data();
    buffers.positions = buffers.tokens + config.token_budget;
    buffers.kv_slots = slots.data();
    buffers.query_start = rows.data();
    buffers.context_len = buffers.query_start + config.max_sequences + 1;
    buffers.rows = buffers.context_len + config.max_sequences;
    buffers.block_table = table.data();
    buffers.logits_at = logits_at.data();
  }

  std::vector<std::int32_t> positions;
  std::vector<std::int64_t> slots;
  std::vector<std::int32_t> rows, table;
  std::vector<std::int64_t> logits_at;
  StepBuffers buffers;
};

// BatchAssembler::assemble of one step of 256 decoding sequences, one of 16 with a new block. The plans are made
// before.
class Assemble final : public Stage {
 public:
  Assemble() { assembler_.bind(arrays_.buffers); }

  void prepare() override {
    renew_for_steps(batch_, 0);
    plans_.clear();
    for (std::uint32_t step = 0; step < kSteps; ++step) {
      Plan* const plan = batch_->schedule();
      plans_.push_back(*plan);
      batch_->commit(*plan);
    }
  }
  void run() override {
    for (const Plan& plan : plans_) {
      assembler_.assemble(plan);
      keep(arrays_);
    }
  }

 private:
  std::unique_ptr<DecodingBatch> batch_;
  std::vector<Plan> plans_;
  StepArrays arrays_{DecodingBatch::kConfig};
  BatchAssembler assembler_{DecodingBatch::kConfig};
};

// All that a worker does in a step of 256 decoding sequences but for the model: EngineCore::schedule and commit, from
// the channel and to it. The front end's side is played by prepare().
class Step final : public Stage {
 public:
  Step() {
    core_.bind_buffers(arrays_.buffers, sampled_.data(), logprobs_.data());
    core_.attach(channel_);
  }

  void prepare() override {
    read();
    const bool answers_are_long_enough = steps_ + kSteps < kMaxTokens;
    if (!slots_.empty() && answers_are_long_enough) return;
    for (const std::uint32_t slot : slots_) table_.close(slot);
    core_.schedule();
    table_.collect();
    slots_.clear();
    while (slots_.size() < kBatch) slots_.push_back(table_.submit(request(kMaxTokens), 0).value());
    do {
      read();
    } while (!all_decode(step()));
    read();
    steps_ = kBatch;  // at most: the first sequence has decoded while the last one's prompt was read
  }

  void run() override {
    for (std::uint32_t i = 0; i < kSteps; ++i) step();
    steps_ += kSteps;
  }

 private:
  static constexpr std::int32_t kMaxTokens = 3000;
  static constexpr EngineConfig kConfig{.scheduler = DecodingBatch::kConfig};

  static std::shared_ptr<const Vocabulary> vocabulary() {
    return std::make_shared<Vocabulary>(std::vector<std::string>(1000, " word"), std::vector<std::int32_t>{},
                                        std::vector<std::int32_t>{});
  }

  StepShape step() {
    const StepShape shape = core_.schedule().value();
    std::fill_n(sampled_.begin(), shape.samples, 7);
    core_.commit();
    return shape;
  }
  static bool all_decode(const StepShape& shape) { return shape.tokens == kBatch && shape.samples == kBatch; }
  void read() {
    for (const std::uint32_t slot : table_.collect()) {
      while (table_.next(slot)) {
      }
    }
  }

  SteadyClock clock_;
  std::shared_ptr<Channel> channel_ = Channel::create({.slots = kBatch}, false);
  StreamTable table_{channel_, clock_};
  EngineCore core_{kConfig, vocabulary(), clock_};
  StepArrays arrays_{kConfig.scheduler};
  std::array<std::int32_t, kBatch> sampled_{};
  std::array<float, kBatch> logprobs_{};
  std::vector<std::uint32_t> slots_;
  std::int32_t steps_ = 0;
};

template <class Made>
std::unique_ptr<Stage> make() {
  return std::make_unique<Made>();
}

constexpr StageEntry kStages[] = {
    {"submit", Submit::kOperations, make<Submit>},
    {"queue", Queue::kOperations, make<Queue>},
    {"schedule", kSteps, make<Schedule>},
    {"assemble", kSteps, make<Assemble>},
    {"step", kSteps, make<Step>},
};

}  // namespace

std::span<const StageEntry> request_stages() {
  return kStages;
}

}  // namespace rts::bench
