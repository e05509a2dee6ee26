#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "rts/ageing_heap.hpp"
#include "rts/block_pool.hpp"
#include "rts/sequence.hpp"
#include "rts/sequence_memory.hpp"
#include "rts/siphash.hpp"
#include "rts/step_cost.hpp"

namespace rts {

struct SchedulerConfig {
  std::uint32_t max_sequences = 32;  // that run at once; also the rows of the block table
  std::uint32_t token_budget = 512;  // positions in one step
  std::uint32_t block_size = 16;     // positions in a KV block
  std::uint32_t num_blocks = 0;
  std::uint32_t max_context = 2048;  // positions of a sequence
  // Idle blocks that are kept for their prefixes; 0: none is looked for.
  std::uint32_t cached_blocks = 0;
  // What a step may take where sequences decode and prompts are read; 0: by what it takes without them, and how many
  // they are.
  std::int64_t target_step_ns = 0;
  SipKey prefix_key{};  // from a secure source: who knows it can make prefixes that collide
};

// A sequence's part of a step: `count` positions from `start` on.
struct PlanRow {
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;

  Sequence* sequence = nullptr;
  std::uint32_t start = 0;
  std::uint32_t count = 0;
  bool sample = false;  // its last position is the sequence's last, so a token is sampled from it
  // Where its last position's token is still being sampled: the row of the plan in flight that samples it.
  std::uint32_t placeholder_of = kNone;
};

struct Plan {
  std::vector<PlanRow> rows;
  std::uint32_t tokens = 0;    // positions of all rows
  std::uint32_t samples = 0;   // rows that sample
  std::uint32_t decoding = 0;  // rows of sequences that decode; those behind them are prompts'
  PromptWork prompts;
  bool in_use = false;
};

// Iteration-level scheduling: every step takes one position of each decoding sequence, then chunks of prompts, of those
// that are being read and of those that it admits from the heap, all within the token budget. Where sequences decode,
// the prompts' part of it follows what steps are measured to take, so that they slow running streams down by no more
// than a factor; prompts that are read at the same time share it evenly. Now and then such a step has no prompts, to
// show what it takes without.
//
// A sequence is admitted where there is a row and blocks for the tokens that it has, and a block more for each that
// runs. As they grow the blocks may run out: then the newest of the lowest priority is preempted. So is one, of a lower
// priority, where there is no room for a higher that waits. It gives up its row and blocks, keeps its tokens and its
// age in the heap, and is computed anew when it is admitted again, but for the prefix that is still there. One that has
// aged goes before all that have not, and among them the oldest stays: so nobody is preempted for ever. Nor is one that
// a plan in flight names; where all are, those without a block are left out of a step.
//
// schedule() and commit() are apart, and one plan may be in flight when the next is made: its tokens are then
// placeholders. A sequence may be finished at any point; its row and blocks are freed once, when no plan names it any
// more. Single-threaded; no allocation once warm.
class Scheduler {
 public:
  Scheduler(const SchedulerConfig& config, BlockPool& blocks, AgeingHeap<Sequence*>& waiting);

  // The next step; nullptr where nothing can run, or where two plans are not committed.
  Plan* schedule(std::int64_t now_ns);

  // Takes over what a plan sampled: one token for each row that samples, in order; -1 ends its sequence with
  // kInvalidLogits. Tokens of sequences that have finished meanwhile are dropped.
  void commit(Plan& plan, std::span<const std::int32_t> sampled);
  // The same with counts[i] tokens for the i-th row that samples: none, and its last position is run again; several,
  // where more than one was accepted at once. After either, what a plan in flight has sampled behind that position is
  // dropped.
  void commit(Plan& plan, std::span<const std::int32_t> sampled, std::span<const std::uint32_t> counts);

  // What the step of a committed plan took.
  void observe(const Plan& plan, std::int64_t step_ns) { cost_.observe(plan.decoding, plan.prompts, step_ns); }
  // The model failed in this plan, the only one in flight, which is still to be committed: what it was to compute is
  // not there.
  void retract(const Plan& plan);

  // Ends a sequence, in whatever state it is. The first reason stays.
  void finish(Sequence& sequence, FinishReason reason, StreamError error = StreamError::kNone);

  // Sequences that nothing here points to any more. The caller takes them and clears the list.
  std::vector<Sequence*>& released() { return released_; }

  const std::vector<Sequence*>& running() const { return running_; }
  std::uint64_t preemptions() const { return preemptions_; }

 private:
  static constexpr std::uint32_t kPlansInFlight = 2;
  // What prompts may take of a step, as a multiple of what its streams take: a prompt counts for two streams, within
  // bounds. The least bounds the pace of all streams where one long prompt is read; where many wait for few, they are
  // not held up for these: of 32 that came at once, half had to wait 1.9 s for their first token. A prompt of 2,000
  // every 5 s beside 8 streams, and these streams' own prompts, need 0.6: with 0.3 prompts pile up (7 s to the first
  // token, 1.5 alone). With 0.9, and four streams a prompt, the 99th percentile of the gaps is 31 to 40 ms and not 23
  // to 28.
  static constexpr double kPromptShare = 2.0, kLeastPromptShare = 0.7, kMostPromptShare = 4.0;
  // What prompts may take of a step in which nobody decodes: who comes meanwhile waits for its end.
  static constexpr double kMostAloneNs = 200e6;
  // Positions of prompts that a step reads in any case: beside streams, and where nobody decodes.
  static constexpr std::uint32_t kLeastPrompt = 4, kLeastAlone = 64;
  // Prompts that are read at the same time get at least this part of a step's positions each, or what they have left: a
  // short one does not wait until a long one has been read.
  static constexpr std::uint32_t kPromptsAtOnce = 4;

  struct Prompt {
    Sequence* sequence;
    std::uint32_t left;  // positions that could be computed now
  };
  // What a step has for prompts.
  struct PromptBudget {
    std::uint32_t positions;
    double ns;
  };

  std::uint32_t runnable(const Sequence& sequence) const;
  void make_room(std::int64_t now_ns);
  void make_blocks(std::int64_t now_ns);
  bool is_outranked(const Sequence& sequence, Priority priority, std::int64_t now_ns) const;
  bool goes_before(const Sequence& sequence, const Sequence* other, std::int64_t now_ns) const;
  void preempt(Sequence& sequence);
  void add_decoding(Plan& plan);
  void add_prompts(Plan& plan, std::int64_t now_ns);
  PromptBudget prompt_budget(const Plan& plan) const;
  bool admit(Sequence& sequence, std::int64_t now_ns);
  void add_row(Plan& plan, Sequence& sequence, std::uint32_t count);
  void accept(Sequence& sequence, std::span<const std::int32_t> tokens);
  void free_memory(Sequence& sequence);
  void release(Sequence& sequence);
  void compact_running();
  Plan* free_plan();

  SchedulerConfig config_;
  BlockPool& blocks_;
  SequenceMemory memory_;
  AgeingHeap<Sequence*>& waiting_;
  StepCost cost_;
  std::vector<Prompt> prompts_;  // of the step that is being planned
  std::array<Plan, kPlansInFlight> plans_;
  std::vector<Sequence*> running_;  // in the order of their admission
  std::vector<std::uint32_t> free_rows_;
  std::vector<Sequence*> released_;
  std::uint64_t preemptions_ = 0;
  std::size_t first_decode_ = 0;  // where the next step starts to hand out the budget, if not all can have a part
  bool has_finished_ = false;     // running_ holds sequences that have finished
};

}  // namespace rts
