#include "rts/scheduler.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace rts {

Scheduler::Scheduler(const SchedulerConfig& config, BlockPool& blocks, AgeingHeap<Sequence*>& waiting)
    : config_(config), blocks_(blocks), waiting_(waiting) {
  if (config.max_sequences == 0 || config.token_budget == 0 || config.block_size == 0 || config.max_context == 0) {
    throw std::invalid_argument("a scheduler needs at least one sequence, token, position and context");
  }
  if (std::uint64_t{blocks.size()} * config.block_size < config.max_context) {
    throw std::invalid_argument("the KV blocks must hold one sequence of max_context, or it could never be admitted");
  }
  for (Plan& plan : plans_) plan.rows.reserve(config.max_sequences);
  running_.reserve(config.max_sequences);
  released_.reserve(config.max_sequences);
  for (std::uint32_t row = config.max_sequences; row-- > 0;) free_rows_.push_back(row);
}

// Positions that can be computed now: those whose tokens are known or are being sampled.
std::uint32_t Scheduler::runnable(const Sequence& sequence) const {
  if (sequence.state != SequenceState::kRunning || sequence.paused) return 0;
  return static_cast<std::uint32_t>(sequence.tokens.size()) + sequence.pending - sequence.scheduled;
}

// In the worst case: the prompt and all the tokens that were asked for.
std::uint32_t Scheduler::most_blocks(const Sequence& sequence) const {
  const std::uint64_t most =
      std::uint64_t{sequence.prompt_tokens} + static_cast<std::uint32_t>(sequence.sampling.max_tokens);
  const auto positions = static_cast<std::uint32_t>(std::min<std::uint64_t>(most, config_.max_context));
  return (positions + config_.block_size - 1) / config_.block_size;
}

Plan* Scheduler::schedule(std::int64_t now_ns) {
  Plan* plan = free_plan();
  if (plan == nullptr) return nullptr;
  compact_running();
  make_room(now_ns);
  plan->rows.clear();
  plan->tokens = plan->samples = 0;

  // Decoding sequences go first: a prompt never delays a running stream by more than the rest of the budget. Where the
  // budget is smaller than their number, they take turns.
  const std::size_t count = running_.size();
  if (first_decode_ >= count) first_decode_ = 0;
  const std::size_t start = first_decode_;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t at = start + i < count ? start + i : start + i - count;
    if (runnable(*running_[at]) != 1) continue;
    if (plan->tokens == config_.token_budget) {
      first_decode_ = at;
      break;
    }
    add_row(*plan, *running_[at], 1);
  }
  // Prompts that are being read, oldest first.
  for (std::size_t i = 0; i < count && plan->tokens < config_.token_budget; ++i) {
    const std::uint32_t positions = runnable(*running_[i]);
    if (positions > 1) add_row(*plan, *running_[i], std::min(positions, config_.token_budget - plan->tokens));
  }
  // New ones, in the heap's order: nobody overtakes one that does not fit yet, so that large requests do not starve.
  while (plan->tokens < config_.token_budget) {
    Sequence* const* next = waiting_.peek(now_ns);
    if (next == nullptr || !admit(**next, now_ns)) break;
    Sequence& admitted = **waiting_.pop(now_ns);
    if (const std::uint32_t positions = runnable(admitted)) {
      add_row(*plan, admitted, std::min(positions, config_.token_budget - plan->tokens));
    }
  }
  if (plan->rows.empty()) return nullptr;
  plan->in_use = true;
  return plan;
}

// Preempts for those who wait and have a higher priority, and admits them. Before the step is planned, so that no plan
// names who is preempted; and for no more than its budget has positions for.
void Scheduler::make_room(std::int64_t now_ns) {
  // Every running one takes a position, but for whoever is preempted.
  const std::uint64_t budget = std::uint64_t{config_.token_budget} + 1;
  std::uint64_t left = budget - std::min<std::uint64_t>(budget, running_.size());
  while (left > 0 && !waiting_.full()) {
    Sequence* const* next = waiting_.peek(now_ns);
    if (next == nullptr || (*next)->priority == Priority::kLow) return;
    Sequence* newest_of_lowest = nullptr;
    std::size_t blocks = blocks_.available();  // with those of all that could be preempted
    for (Sequence* sequence : running_) {
      if (!is_outranked(*sequence, (*next)->priority, now_ns)) continue;
      blocks += sequence->blocks.size() + sequence->reserved_blocks;
      if (newest_of_lowest == nullptr || sequence->priority <= newest_of_lowest->priority) newest_of_lowest = sequence;
    }
    if (newest_of_lowest == nullptr || blocks < most_blocks(**next)) return;
    if (admit(**next, now_ns)) {
      left -= std::min<std::uint64_t>(left, runnable(**waiting_.pop(now_ns)));
    } else {
      preempt(*newest_of_lowest);
    }
  }
}

bool Scheduler::is_outranked(const Sequence& sequence, Priority priority, std::int64_t now_ns) const {
  return sequence.priority < priority && sequence.in_flight == 0 && !waiting_.is_aged(sequence.arrival_ns, now_ns);
}

void Scheduler::preempt(Sequence& sequence) {
  const auto at = std::ranges::find(running_, &sequence);
  if (at - running_.begin() < static_cast<std::ptrdiff_t>(first_decode_)) --first_decode_;
  running_.erase(at);
  free_memory(sequence);
  sequence.state = SequenceState::kWaiting;
  sequence.scheduled = 0;
  const Ticket ticket{sequence.priority, sequence.arrival_ns, sequence.deadline_ns};
  waiting_.push(ticket, &sequence, &sequence.waiting_handle);
  ++preemptions_;
}

bool Scheduler::admit(Sequence& sequence, std::int64_t now_ns) {
  if (free_rows_.empty()) return false;
  const std::uint32_t blocks = most_blocks(sequence);
  if (!blocks_.reserve(blocks)) return false;
  sequence.blocks.reserve(blocks);
  sequence.tokens.reserve(std::size_t{blocks} * config_.block_size);
  sequence.reserved_blocks = blocks;
  sequence.row = free_rows_.back();
  free_rows_.pop_back();
  sequence.state = SequenceState::kRunning;
  sequence.waiting_handle = 0;
  if (sequence.admitted_ns == 0) sequence.admitted_ns = now_ns;
  running_.push_back(&sequence);
  return true;
}

void Scheduler::add_row(Plan& plan, Sequence& sequence, std::uint32_t count) {
  PlanRow row{&sequence, sequence.scheduled, count};
  sequence.scheduled += count;
  const auto known = static_cast<std::uint32_t>(sequence.tokens.size());
  if (sequence.scheduled > known) row.placeholder_of = sequence.sampled_by;
  row.sample = sequence.scheduled == known + sequence.pending;
  if (row.sample) {
    ++sequence.pending;
    ++plan.samples;
    sequence.sampled_by = static_cast<std::uint32_t>(plan.rows.size());
  }
  while (sequence.blocks.size() * config_.block_size < sequence.scheduled) {
    sequence.blocks.push_back(blocks_.allocate_reserved());
    --sequence.reserved_blocks;
  }
  ++sequence.in_flight;
  plan.tokens += count;
  plan.rows.push_back(row);
}

void Scheduler::commit(Plan& plan, std::span<const std::int32_t> sampled) {
  commit(plan, sampled, {});
}

void Scheduler::commit(Plan& plan, std::span<const std::int32_t> sampled, std::span<const std::uint32_t> counts) {
  std::size_t token = 0, sample = 0;
  for (const PlanRow& row : plan.rows) {
    Sequence& sequence = *row.sequence;
    if (row.sample) {
      const std::uint32_t count = counts.empty() ? 1 : counts[sample];
      accept(sequence, sampled.subspan(token, count));
      token += count;
      ++sample;
    }
    // After accept(), so that a sequence which ends there is still held by this plan, and released once.
    --sequence.in_flight;
    if (sequence.state == SequenceState::kFinished && sequence.in_flight == 0) release(sequence);
  }
  plan.in_use = false;
}

void Scheduler::accept(Sequence& sequence, std::span<const std::int32_t> tokens) {
  if (sequence.state == SequenceState::kFinished) return;
  if (sequence.void_samples > 0) {
    --sequence.void_samples;
    return;
  }
  --sequence.pending;
  if (tokens.size() != 1) sequence.void_samples = std::exchange(sequence.pending, 0);
  if (tokens.empty()) {
    sequence.scheduled = static_cast<std::uint32_t>(sequence.tokens.size()) - 1;
    return;
  }
  for (const std::int32_t token : tokens) {
    if (token < 0) return finish(sequence, FinishReason::kError, StreamError::kInvalidLogits);
    sequence.tokens.push_back(token);
    if (sequence.generated() >= static_cast<std::uint32_t>(sequence.sampling.max_tokens) ||
        sequence.tokens.size() >= config_.max_context) {
      return finish(sequence, FinishReason::kLength);
    }
  }
}

void Scheduler::finish(Sequence& sequence, FinishReason reason, StreamError error) {
  if (sequence.state == SequenceState::kFinished) return;
  const bool waited = sequence.state == SequenceState::kWaiting;
  sequence.state = SequenceState::kFinished;
  sequence.finish = reason;
  sequence.error = error;
  if (waited) {
    waiting_.remove(sequence.waiting_handle);
    released_.push_back(&sequence);
    return;
  }
  has_finished_ = true;
  if (sequence.in_flight == 0) release(sequence);
}

void Scheduler::free_memory(Sequence& sequence) {
  blocks_.free(sequence.blocks);
  blocks_.unreserve(sequence.reserved_blocks);
  sequence.blocks.clear();
  sequence.reserved_blocks = 0;
  free_rows_.push_back(sequence.row);
}

void Scheduler::release(Sequence& sequence) {
  free_memory(sequence);
  // Here and not at the next step: the caller may use its memory for another sequence by then.
  compact_running();
  released_.push_back(&sequence);
}

void Scheduler::compact_running() {
  if (!has_finished_) return;
  has_finished_ = false;
  const auto is_finished = [](const Sequence* sequence) { return sequence->state == SequenceState::kFinished; };
  // The next in turn stays the same sequence.
  const auto turn = running_.begin() + static_cast<std::ptrdiff_t>(std::min(first_decode_, running_.size()));
  first_decode_ -= static_cast<std::size_t>(std::count_if(running_.begin(), turn, is_finished));
  std::erase_if(running_, is_finished);
}

Plan* Scheduler::free_plan() {
  for (Plan& plan : plans_) {
    if (!plan.in_use) return &plan;
  }
  return nullptr;
}

}  // namespace rts
