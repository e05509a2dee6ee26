#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "rts/ageing_heap.hpp"
#include "rts/block_pool.hpp"
#include "rts/sequence.hpp"

namespace rts {

struct SchedulerConfig {
  std::uint32_t max_sequences = 32;  // that run at once; also the rows of the block table
  std::uint32_t token_budget = 512;  // positions in one step
  std::uint32_t block_size = 16;     // positions in a KV block
  std::uint32_t num_blocks = 0;
  std::uint32_t max_context = 2048;  // positions of a sequence
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
  std::uint32_t tokens = 0;   // positions of all rows
  std::uint32_t samples = 0;  // rows that sample
  bool in_use = false;
};

// Iteration-level scheduling: every step takes one position of each running sequence, then chunks of the prompts that
// are being read, then admits from the heap what there is a row and blocks for, all within the token budget.
//
// Where one of a higher priority waits and there is no room for it, the newest sequence of the lowest priority below is
// preempted: it gives up its row and blocks, keeps its tokens and its age in the heap, and is computed anew when it is
// admitted again. One that has aged is not, so nobody is preempted for ever; nor is one that a plan in flight names, so
// that with a plan always in flight only those are that it leaves out.
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

  // Ends a sequence, in whatever state it is. The first reason stays.
  void finish(Sequence& sequence, FinishReason reason, StreamError error = StreamError::kNone);

  // Sequences that nothing here points to any more. The caller takes them and clears the list.
  std::vector<Sequence*>& released() { return released_; }

  const std::vector<Sequence*>& running() const { return running_; }
  std::uint64_t preemptions() const { return preemptions_; }

 private:
  static constexpr std::uint32_t kPlansInFlight = 2;

  std::uint32_t runnable(const Sequence& sequence) const;
  std::uint32_t most_blocks(const Sequence& sequence) const;
  void make_room(std::int64_t now_ns);
  bool is_outranked(const Sequence& sequence, Priority priority, std::int64_t now_ns) const;
  void preempt(Sequence& sequence);
  bool admit(Sequence& sequence, std::int64_t now_ns);
  void add_row(Plan& plan, Sequence& sequence, std::uint32_t count);
  void accept(Sequence& sequence, std::span<const std::int32_t> tokens);
  void free_memory(Sequence& sequence);
  void release(Sequence& sequence);
  void compact_running();
  Plan* free_plan();

  SchedulerConfig config_;
  BlockPool& blocks_;
  AgeingHeap<Sequence*>& waiting_;
  std::array<Plan, kPlansInFlight> plans_;
  std::vector<Sequence*> running_;  // in the order of their admission
  std::vector<std::uint32_t> free_rows_;
  std::vector<Sequence*> released_;
  std::uint64_t preemptions_ = 0;
  std::size_t first_decode_ = 0;  // where the next step starts to hand out the budget, if not all can have a part
  bool has_finished_ = false;     // running_ holds sequences that have finished
};

}  // namespace rts
