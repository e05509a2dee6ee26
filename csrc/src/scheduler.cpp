#include "rts/scheduler.hpp"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace rts {

Scheduler::Scheduler(const SchedulerConfig& config, BlockPool& blocks, AgeingHeap<Sequence*>& waiting)
    : config_(config), blocks_(blocks), memory_(blocks, config.block_size, config.prefix_key), waiting_(waiting) {
  if (config.max_sequences == 0 || config.token_budget == 0 || config.block_size == 0 || config.max_context == 0) {
    throw std::invalid_argument("a scheduler needs at least one sequence, token, position and context");
  }
  if (std::uint64_t{blocks.size()} * config.block_size < config.max_context) {
    throw std::invalid_argument("the KV blocks must hold one sequence of max_context, or it could never be admitted");
  }
  for (Plan& plan : plans_) plan.rows.reserve(config.max_sequences);
  running_.reserve(config.max_sequences);
  released_.reserve(config.max_sequences);
  prompts_.reserve(config.max_sequences);
  for (std::uint32_t row = config.max_sequences; row-- > 0;) free_rows_.push_back(row);
}

// Positions that can be computed now: those whose tokens are known or are being sampled.
std::uint32_t Scheduler::runnable(const Sequence& sequence) const {
  if (sequence.state != SequenceState::kRunning || sequence.paused) return 0;
  return static_cast<std::uint32_t>(sequence.tokens.size()) + sequence.pending - sequence.scheduled;
}

Plan* Scheduler::schedule(std::int64_t now_ns) {
  Plan* plan = free_plan();
  if (plan == nullptr) return nullptr;
  compact_running();
  make_blocks(now_ns);
  make_room(now_ns);
  plan->rows.clear();
  plan->tokens = plan->samples = 0;
  plan->prompts = {};
  add_decoding(*plan);
  plan->decoding = plan->tokens;
  add_prompts(*plan, now_ns);
  if (plan->rows.empty()) return nullptr;
  plan->in_use = true;
  return plan;
}

// They go first: a prompt never delays a running stream by more than its part of the budget. Where the budget is
// smaller than their number, they take turns.
void Scheduler::add_decoding(Plan& plan) {
  const std::size_t count = running_.size();
  if (first_decode_ >= count) first_decode_ = 0;
  const std::size_t start = first_decode_;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t at = start + i < count ? start + i : start + i - count;
    Sequence& sequence = *running_[at];
    if (runnable(sequence) != 1) continue;
    if (plan.tokens == config_.token_budget) {
      first_decode_ = at;
      break;
    }
    if (memory_.growth(sequence, sequence.scheduled + 1) <= blocks_.available()) add_row(plan, sequence, 1);
  }
}

// Max-min fair, in positions and in time: in the order of what they have left, each gets an even part of what those
// before it have left over.
void Scheduler::add_prompts(Plan& plan, std::int64_t now_ns) {
  auto [left, left_ns] = prompt_budget(plan);
  const std::uint32_t positions_at_once = cost_.positions_within(left_ns, 0, left);
  const std::uint32_t part = std::max(1U, positions_at_once / kPromptsAtOnce);
  std::uint32_t claimed = 0;
  prompts_.clear();
  const auto add = [&](Sequence& sequence) {
    if (!memory_.pass_over_computed(sequence)) return;
    const std::uint32_t positions = runnable(sequence);
    // In order at once: a stable sort would allocate in each step.
    prompts_.insert(std::ranges::upper_bound(prompts_, positions, {}, &Prompt::left), {&sequence, positions});
    claimed += std::min(positions, part);
  };
  for (Sequence* sequence : running_) {
    if (runnable(*sequence) > 1) add(*sequence);
  }
  // New ones, in the heap's order: nobody overtakes one that does not fit yet, so that large requests do not starve.
  while (claimed < positions_at_once) {
    Sequence* const* next = waiting_.peek(now_ns);
    if (next == nullptr || !admit(**next, now_ns)) break;
    Sequence& admitted = **waiting_.pop(now_ns);
    if (runnable(admitted) > 0) add(admitted);
  }
  auto sharing = static_cast<std::uint32_t>(prompts_.size());
  for (const Prompt& prompt : prompts_) {
    const std::uint32_t start = prompt.sequence->scheduled, even = (left + sharing - 1) / sharing;
    const std::uint32_t in_time = std::max(1U, cost_.positions_within(left_ns / sharing, start, even));
    --sharing;
    const std::uint32_t positions = memory_.reach(*prompt.sequence, std::min({prompt.left, even, in_time}));
    if (positions == 0) continue;
    add_row(plan, *prompt.sequence, positions);
    const PromptWork work(start, positions);
    left -= positions;
    left_ns -= cost_.prompts_ns(work);
    plan.prompts += work;
  }
}

Scheduler::PromptBudget Scheduler::prompt_budget(const Plan& plan) const {
  const std::uint32_t left = config_.token_budget - plan.tokens;
  if (plan.decoding == 0) return {left, std::max(kMostAloneNs, cost_.prompts_ns({0, kLeastAlone}))};
  if (cost_.needs_decoding_alone()) return {0, 0.0};
  const double decode_ns = cost_.decode_ns(plan.decoding);
  double ns = static_cast<double>(config_.target_step_ns) - decode_ns;
  if (config_.target_step_ns == 0) {
    const std::size_t places = config_.max_sequences - running_.size();
    const std::size_t prompts = running_.size() - plan.decoding + std::min(waiting_.size(), places);
    const double share = kPromptShare * static_cast<double>(prompts) / plan.decoding;
    ns = decode_ns * std::clamp(share, kLeastPromptShare, kMostPromptShare);
  }
  return {std::min(left, cost_.most_beside_decoding()), std::max(ns, cost_.prompts_ns({0, kLeastPrompt}))};
}

// Preempts until those that run can grow. Before the step is planned, so that no plan names who is preempted.
void Scheduler::make_blocks(std::int64_t now_ns) {
  if (blocks_.available() >= running_.size()) return;  // nobody needs more than one
  std::uint32_t needed = 0;
  const auto growth = [&](const Sequence& sequence) {
    return runnable(sequence) > 0 ? memory_.growth(sequence, sequence.scheduled + 1) : 0;
  };
  for (const Sequence* sequence : running_) needed += growth(*sequence);
  while (needed > blocks_.available() && running_.size() > 1) {
    Sequence* victim = nullptr;
    for (Sequence* sequence : running_) {
      if (sequence->in_flight == 0 && goes_before(*sequence, victim, now_ns)) victim = sequence;
    }
    if (victim == nullptr) return;
    needed -= growth(*victim);
    preempt(*victim);
  }
}

// Whether it is preempted rather than the other, which was admitted before it: the newest of the lowest priority first;
// of those that have aged the newest, where all have.
bool Scheduler::goes_before(const Sequence& sequence, const Sequence* other, std::int64_t now_ns) const {
  const auto rank = [&](const Sequence& of) {
    const bool aged = waiting_.is_aged(of.arrival_ns, now_ns);
    return std::tuple(aged, aged ? Priority::kLow : of.priority, -of.arrival_ns);
  };
  return other == nullptr || rank(sequence) <= rank(*other);
}

// Preempts for those who wait and have a higher priority, and admits them; for no more than the step's budget has
// positions for.
void Scheduler::make_room(std::int64_t now_ns) {
  // Every running one takes a position, but for whoever is preempted.
  const std::uint64_t budget = std::uint64_t{config_.token_budget} + 1;
  std::uint64_t left = budget - std::min<std::uint64_t>(budget, running_.size());
  while (left > 0) {
    Sequence* const* next = waiting_.peek(now_ns);
    if (next == nullptr || (*next)->priority == Priority::kLow) return;
    Sequence* newest_of_lowest = nullptr;
    std::size_t blocks = blocks_.available(), others = running_.size();  // once all that could be are preempted
    for (Sequence* sequence : running_) {
      if (!is_outranked(*sequence, (*next)->priority, now_ns)) continue;
      blocks += memory_.held_alone(*sequence);
      --others;
      if (goes_before(*sequence, newest_of_lowest, now_ns)) newest_of_lowest = sequence;
    }
    if (newest_of_lowest == nullptr || blocks < memory_.needed(**next) + others) return;
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
  sequence.was_preempted = true;
  const Ticket ticket{sequence.priority, sequence.arrival_ns, sequence.deadline_ns};
  waiting_.put_back(ticket, &sequence, &sequence.waiting_handle);
  ++preemptions_;
}

bool Scheduler::admit(Sequence& sequence, std::int64_t now_ns) {
  if (free_rows_.empty() || !memory_.acquire(sequence, static_cast<std::uint32_t>(running_.size()))) return false;
  // Nothing is allocated at a step: as many as it can ever have.
  const auto positions = static_cast<std::size_t>(std::min<std::uint64_t>(
      std::uint64_t{sequence.prompt_tokens} + static_cast<std::uint32_t>(sequence.sampling.max_tokens),
      config_.max_context));
  sequence.tokens.reserve(positions);
  sequence.blocks.reserve(positions / config_.block_size + 1);
  if (config_.cached_blocks > 0) sequence.hashes.reserve(positions / config_.block_size);
  sequence.row = free_rows_.back();
  free_rows_.pop_back();
  sequence.assembled_blocks = 0;
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
  memory_.advanced(sequence, row.start);
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
    if (sequence.state != SequenceState::kFinished) memory_.computed(sequence, row.start + row.count);
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

void Scheduler::retract(const Plan& plan) {
  for (const PlanRow& row : plan.rows) memory_.retract(*row.sequence, row.start);
  for (Sequence* sequence : running_) {
    if (sequence->in_flight == 0) memory_.rewind(*sequence);
  }
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
  memory_.release(sequence);
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
