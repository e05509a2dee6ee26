#include "rts/scheduler.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "rts/clock.hpp"

namespace rts {
namespace {

constexpr std::int64_t kMs = 1'000'000;

// A scheduler with what it works on, and the sequences' owner.
class Engine {
 public:
  explicit Engine(const SchedulerConfig& with, std::int64_t ageing_ns = 1000 * kMs, std::size_t queue = 64)
      : config(with),
        pool(with.num_blocks, with.cached_blocks),
        heap(queue, ageing_ns, with.max_sequences),
        scheduler(with, pool, heap) {}

  Sequence& add(std::uint32_t prompt_tokens, std::int32_t max_tokens, Priority priority = Priority::kNormal,
                std::int64_t arrival_ns = 0) {
    Sequence& sequence = *owned.emplace_back(std::make_unique<Sequence>());
    sequence.stream_id = ++added;
    sequence.prompt_tokens = prompt_tokens;
    sequence.tokens.assign(prompt_tokens, 0);
    sequence.sampling.max_tokens = max_tokens;
    sequence.priority = priority;
    sequence.arrival_ns = arrival_ns;
    EXPECT_TRUE(heap.push({priority, arrival_ns, 0}, &sequence, &sequence.waiting_handle));
    return sequence;
  }
  Plan* schedule(std::int64_t now_ns = 0) { return scheduler.schedule(now_ns); }
  void commit(Plan& plan, std::int32_t token = 1) {
    scheduler.commit(plan, std::vector<std::int32_t>(plan.samples, token));
  }
  // Plans and commits one step; how many positions it had.
  std::uint32_t step() {
    Plan* plan = schedule();
    if (plan == nullptr) return 0;
    commit(*plan);
    return plan->tokens;
  }
  std::vector<Sequence*> take_released() { return std::exchange(scheduler.released(), {}); }

  SchedulerConfig config;
  BlockPool pool;
  AgeingHeap<Sequence*> heap;
  Scheduler scheduler;
  std::vector<std::unique_ptr<Sequence>> owned;
  std::uint64_t added = 0;
};

SchedulerConfig small() {
  return {.max_sequences = 4, .token_budget = 8, .block_size = 4, .num_blocks = 128, .max_context = 64};
}

// (sequence, start, count, sample) of each row.
using Rows = std::vector<std::tuple<const Sequence*, std::uint32_t, std::uint32_t, bool>>;
Rows rows_of(const Plan* plan) {
  Rows rows;
  if (plan == nullptr) return rows;
  for (const PlanRow& row : plan->rows) rows.emplace_back(row.sequence, row.start, row.count, row.sample);
  return rows;
}

TEST(Scheduler, NothingToDoIsNoPlan) {
  Engine engine(small());
  EXPECT_EQ(engine.schedule(), nullptr);
}

TEST(Scheduler, RefusesAConfigurationThatCannotRun) {
  for (std::uint32_t SchedulerConfig::* field : {&SchedulerConfig::max_sequences, &SchedulerConfig::token_budget,
                                                 &SchedulerConfig::block_size, &SchedulerConfig::max_context}) {
    SchedulerConfig config = small();
    config.*field = 0;
    EXPECT_THROW(Engine{config}, std::invalid_argument);
  }
  SchedulerConfig config = small();
  config.num_blocks = 15;  // a sequence of 64 positions needs 16: it would block the queue for ever
  EXPECT_THROW(Engine{config}, std::invalid_argument);
  config.num_blocks = 16;
  EXPECT_NO_THROW(Engine{config});
}

TEST(Scheduler, ReadsAPromptInChunksOfTheBudget) {
  Engine engine(small());
  Sequence& sequence = engine.add(20, 5);
  for (const auto& [start, count, sample] :
       {std::tuple{0U, 8U, false}, {8U, 8U, false}, {16U, 4U, true}, {20U, 1U, true}}) {
    Plan* plan = engine.schedule();
    ASSERT_EQ(rows_of(plan), (Rows{{&sequence, start, count, sample}}));
    EXPECT_EQ(plan->tokens, count);
    EXPECT_EQ(plan->samples, sample ? 1U : 0U);
    engine.commit(*plan);
  }
}

TEST(Scheduler, DecodingGoesBeforePromptsAndThoseShareWhatIsLeft) {
  Engine engine(small());
  Sequence& decoding = engine.add(2, 50);
  engine.step();
  Sequence& first = engine.add(9, 5);
  Sequence& second = engine.add(3, 5);
  Plan* plan = engine.schedule();
  EXPECT_EQ(rows_of(plan), (Rows{{&decoding, 2, 1, true}, {&second, 0, 3, true}, {&first, 0, 4, false}}));
  EXPECT_EQ(plan->decoding, 1U);
  engine.commit(*plan);
  plan = engine.schedule();
  EXPECT_EQ(rows_of(plan), (Rows{{&decoding, 3, 1, true}, {&second, 3, 1, true}, {&first, 4, 5, true}}));
  engine.commit(*plan);
  EXPECT_EQ(rows_of(engine.schedule()), (Rows{{&decoding, 4, 1, true}, {&first, 9, 1, true}, {&second, 4, 1, true}}));
}

TEST(Scheduler, AdmitsInTheHeapsOrder) {
  SchedulerConfig config = small();
  config.max_sequences = 1;
  Engine engine(config);
  Sequence& low = engine.add(2, 1, Priority::kLow);
  Sequence& normal = engine.add(2, 1, Priority::kNormal);
  Sequence& high = engine.add(2, 1, Priority::kHigh);
  for (Sequence* next : {&high, &normal, &low}) {
    Plan* plan = engine.schedule(5);
    ASSERT_EQ(rows_of(plan), (Rows{{next, 0, 2, true}}));
    EXPECT_EQ(next->admitted_ns, 5);
    engine.commit(*plan);
  }
  EXPECT_EQ(engine.schedule(), nullptr);
}

TEST(Scheduler, AdmitsAsManyAsThereAreRows) {
  Engine engine(small());
  std::vector<Sequence*> sequences;
  for (int i = 0; i < 6; ++i) sequences.push_back(&engine.add(1, 3));
  for (int step = 0; step < 3; ++step) {
    Plan* plan = engine.schedule();
    ASSERT_EQ(plan->rows.size(), 4U);
    std::set<std::uint32_t> rows;
    for (const PlanRow& row : plan->rows) rows.insert(row.sequence->row);
    EXPECT_EQ(rows, (std::set<std::uint32_t>{0, 1, 2, 3}));
    engine.commit(*plan);
  }
  Plan* plan = engine.schedule();
  EXPECT_EQ(rows_of(plan), (Rows{{sequences[4], 0, 1, true}, {sequences[5], 0, 1, true}}));
}

TEST(Scheduler, LeavesABlockToEachThatRunsAndNobodyOvertakesOneThatDoesNotFit) {
  SchedulerConfig config = small();
  config.num_blocks = 16;
  Engine engine(config);
  Sequence& first = engine.add(2, 30);  // a block
  Sequence& large = engine.add(57, 5);  // 15: all that is left
  Sequence& little = engine.add(1, 1);  // would fit
  Plan* plan = engine.schedule();
  EXPECT_EQ(rows_of(plan), (Rows{{&first, 0, 2, true}}));
  EXPECT_EQ(engine.pool.in_use(), 1U);
  engine.commit(*plan);
  EXPECT_EQ(engine.step(), 1U);
  engine.scheduler.finish(first, FinishReason::kCancelled);
  EXPECT_EQ(rows_of(engine.schedule()), (Rows{{&large, 0, 8, false}}));
  EXPECT_EQ(engine.pool.in_use(), 15U) << "all that its prompt takes";
  EXPECT_EQ(little.state, SequenceState::kWaiting) << "it would leave nothing to the one that runs";
}

TEST(Scheduler, PromptsThatAreReadAtTheSameTimeShareTheBudget) {
  SchedulerConfig config = small();
  config.token_budget = 24;
  config.max_context = 256;
  Engine engine(config);
  Sequence& large = engine.add(100, 1);
  Plan* alone = engine.schedule();
  ASSERT_EQ(rows_of(alone), (Rows{{&large, 0, 24, false}}));
  engine.commit(*alone);
  Sequence& little = engine.add(3, 5);
  Sequence& middle = engine.add(60, 1);
  Plan* plan = engine.schedule();
  // 3, then even parts of the 21 that are left.
  EXPECT_EQ(rows_of(plan), (Rows{{&little, 0, 3, true}, {&middle, 0, 11, false}, {&large, 24, 10, false}}));
}

TEST(Scheduler, TheContextBoundsTheSequence) {
  SchedulerConfig config = small();
  config.num_blocks = 16;
  Engine engine(config);
  Sequence& sequence = engine.add(50, 1'000'000);
  while (engine.step() != 0) {
  }
  EXPECT_EQ(sequence.finish, FinishReason::kLength);
  EXPECT_EQ(sequence.tokens.size(), 64U);
  EXPECT_EQ(engine.pool.in_use(), 0U);
}

// Decoding would take the whole of a small budget before all are in.
void admit_all(Engine& engine) {
  while (!engine.heap.empty()) {
    for (Sequence* sequence : engine.scheduler.running()) sequence->paused = true;
    engine.step();
  }
  for (Sequence* sequence : engine.scheduler.running()) sequence->paused = false;
}

TEST(Scheduler, DecodingSequencesTakeTurnsWhereTheBudgetIsSmall) {
  SchedulerConfig config = small();
  config.max_sequences = 5;
  config.token_budget = 2;
  Engine engine(config);
  std::vector<Sequence*> sequences;
  for (int i = 0; i < 5; ++i) sequences.push_back(&engine.add(1, 1000));
  admit_all(engine);
  std::map<const Sequence*, int> turns;
  for (int step = 0; step < 50; ++step) {
    Plan* plan = engine.schedule();
    ASSERT_EQ(plan->tokens, 2U);
    for (const PlanRow& row : plan->rows) ++turns[row.sequence];
    if (step % 5 == 4) {
      for (const Sequence* sequence : sequences) EXPECT_EQ(turns[sequence], 2 * (step + 1) / 5);
    }
    engine.commit(*plan);
  }
}

// Those whose turn comes next keep it when others before them end.
TEST(Scheduler, ATurnIsNotLostWhereAnotherEnds) {
  SchedulerConfig config = small();
  config.max_sequences = 6;
  config.token_budget = 2;
  Engine engine(config);
  std::vector<Sequence*> sequences;
  for (int i = 0; i < 6; ++i) sequences.push_back(&engine.add(1, 60));
  admit_all(engine);
  Plan* plan = engine.schedule();
  EXPECT_EQ(rows_of(plan), (Rows{{sequences[0], 1, 1, true}, {sequences[1], 1, 1, true}}));
  engine.commit(*plan);
  engine.scheduler.finish(*sequences[0], FinishReason::kCancelled);
  engine.scheduler.finish(*sequences[1], FinishReason::kCancelled);
  EXPECT_EQ(rows_of(engine.schedule()), (Rows{{sequences[2], 1, 1, true}, {sequences[3], 1, 1, true}}));
}

TEST(Scheduler, APlanInFlightLeavesPlaceholders) {
  Engine engine(small());
  Sequence& one = engine.add(3, 10);
  Sequence& two = engine.add(3, 10);
  Plan* first = engine.schedule();
  ASSERT_EQ(rows_of(first), (Rows{{&one, 0, 3, true}, {&two, 0, 3, true}}));
  EXPECT_EQ(first->rows[0].placeholder_of, PlanRow::kNone);
  Plan* second = engine.schedule();
  ASSERT_EQ(rows_of(second), (Rows{{&one, 3, 1, true}, {&two, 3, 1, true}}));
  EXPECT_EQ(second->rows[0].placeholder_of, 0U);
  EXPECT_EQ(second->rows[1].placeholder_of, 1U);
  EXPECT_EQ(engine.schedule(), nullptr) << "two plans are the most";

  engine.scheduler.commit(*first, std::vector{100, 200});
  EXPECT_EQ(one.tokens.back(), 100);
  EXPECT_EQ(two.tokens.back(), 200);
  Plan* third = engine.schedule();
  EXPECT_EQ(rows_of(third), (Rows{{&one, 4, 1, true}, {&two, 4, 1, true}}));
  engine.scheduler.commit(*second, std::vector{101, 201});
  engine.scheduler.commit(*third, std::vector{102, 202});
  EXPECT_EQ(one.tokens, (std::vector{0, 0, 0, 100, 101, 102}));
  EXPECT_EQ(two.tokens, (std::vector{0, 0, 0, 200, 201, 202}));
}

TEST(Scheduler, AChunkInFlightIsFollowedByTheNext) {
  Engine engine(small());
  Sequence& sequence = engine.add(12, 3);
  Plan* first = engine.schedule();
  Plan* second = engine.schedule();
  EXPECT_EQ(rows_of(first), (Rows{{&sequence, 0, 8, false}}));
  EXPECT_EQ(rows_of(second), (Rows{{&sequence, 8, 4, true}}));
  EXPECT_EQ(second->rows[0].placeholder_of, PlanRow::kNone);
}

TEST(Scheduler, ASequenceThatEndsIsReleasedOnce) {
  Engine engine(small());
  Sequence& sequence = engine.add(6, 1);
  engine.step();
  EXPECT_EQ(sequence.finish, FinishReason::kLength);
  EXPECT_EQ(engine.take_released(), (std::vector{&sequence}));
  EXPECT_TRUE(engine.scheduler.running().empty());
  EXPECT_EQ(engine.pool.in_use(), 0U);
  std::vector<Sequence*> all;  // and each row is given out once
  for (int i = 0; i < 5; ++i) all.push_back(&engine.add(1, 9));
  std::set<std::uint32_t> rows;
  for (const PlanRow& row : engine.schedule()->rows) rows.insert(row.sequence->row);
  EXPECT_EQ(rows.size(), 4U);
}

TEST(Scheduler, WhatAPlanInFlightSamplesForAnEndedOneIsDropped) {
  Engine engine(small());
  Sequence& sequence = engine.add(2, 1);
  Plan* first = engine.schedule();
  Plan* second = engine.schedule();
  ASSERT_EQ(second->samples, 1U);
  engine.commit(*first, 7);
  EXPECT_EQ(sequence.state, SequenceState::kFinished);
  EXPECT_TRUE(engine.take_released().empty()) << "the second plan still names it";
  EXPECT_GT(engine.pool.in_use(), 0U);
  EXPECT_EQ(engine.schedule(), nullptr);
  engine.commit(*second, 8);
  EXPECT_EQ(engine.take_released(), (std::vector{&sequence}));
  EXPECT_EQ(sequence.tokens, (std::vector{0, 0, 7}));
  EXPECT_EQ(engine.pool.in_use(), 0U);
}

TEST(Scheduler, CancelsInEveryState) {
  for (const int plans : {-1, 0, 1, 2}) {  // in flight; -1: it still waits
    Engine engine(small());
    Sequence& other = engine.add(1, 60);
    engine.step();
    Sequence& sequence = engine.add(3, 60);
    if (plans >= 0) engine.step();
    Plan* first = plans >= 1 ? engine.schedule() : nullptr;
    Plan* second = plans >= 2 ? engine.schedule() : nullptr;
    engine.scheduler.finish(sequence, FinishReason::kCancelled);
    engine.scheduler.finish(sequence, FinishReason::kError, StreamError::kModelFailed);
    EXPECT_EQ(sequence.finish, FinishReason::kCancelled) << "the first reason stays";
    EXPECT_EQ(sequence.error, StreamError::kNone);
    const std::size_t tokens = sequence.tokens.size();
    if (first != nullptr) {
      EXPECT_TRUE(engine.take_released().empty());
      engine.commit(*first);
    }
    if (second != nullptr) {
      EXPECT_TRUE(engine.take_released().empty());
      engine.commit(*second);
    }
    EXPECT_EQ(engine.take_released(), (std::vector{&sequence})) << plans;
    EXPECT_EQ(sequence.tokens.size(), tokens);
    EXPECT_TRUE(engine.heap.empty());
    EXPECT_EQ(engine.pool.in_use(), other.blocks.size());
    EXPECT_EQ(rows_of(engine.schedule()).size(), 1U);
    EXPECT_EQ(other.state, SequenceState::kRunning);
  }
}

TEST(Scheduler, InvalidLogitsEndTheirSequenceOnly) {
  Engine engine(small());
  Sequence& one = engine.add(2, 9);
  Sequence& two = engine.add(2, 9);
  Sequence& three = engine.add(2, 9);
  engine.scheduler.commit(*engine.schedule(), std::vector{5, -1, 6});
  EXPECT_EQ(two.finish, FinishReason::kError);
  EXPECT_EQ(two.error, StreamError::kInvalidLogits);
  EXPECT_EQ(two.tokens.size(), 2U);
  EXPECT_EQ(engine.take_released(), (std::vector{&two}));
  EXPECT_EQ(rows_of(engine.schedule()), (Rows{{&one, 2, 1, true}, {&three, 2, 1, true}}));
}

TEST(Scheduler, APausedOneKeepsItsPlaceAndWaits) {
  Engine engine(small());
  Sequence& one = engine.add(2, 9);
  Sequence& two = engine.add(2, 9);
  engine.step();
  one.paused = true;
  Plan* plan = engine.schedule();
  EXPECT_EQ(rows_of(plan), (Rows{{&two, 2, 1, true}}));
  engine.commit(*plan);
  one.paused = false;
  EXPECT_EQ(rows_of(engine.schedule()), (Rows{{&one, 2, 1, true}, {&two, 3, 1, true}}));
}

TEST(Scheduler, CommitTakesSeveralTokens) {
  Engine engine(small());
  Sequence& one = engine.add(2, 9);
  Sequence& two = engine.add(2, 9);
  Plan* plan = engine.schedule();
  engine.scheduler.commit(*plan, std::vector{10, 11, 12, 20}, std::vector{3U, 1U});
  EXPECT_EQ(one.tokens, (std::vector{0, 0, 10, 11, 12}));
  EXPECT_EQ(two.tokens, (std::vector{0, 0, 20}));
  EXPECT_EQ(rows_of(engine.schedule()), (Rows{{&two, 2, 1, true}, {&one, 2, 3, true}}));
}

TEST(Scheduler, CommitTakesNoMoreTokensThanWereAskedFor) {
  Engine engine(small());
  Sequence& sequence = engine.add(2, 2);
  engine.scheduler.commit(*engine.schedule(), std::vector{10, 11, 12}, std::vector{3U});
  EXPECT_EQ(sequence.tokens, (std::vector{0, 0, 10, 11}));
  EXPECT_EQ(sequence.finish, FinishReason::kLength);
  EXPECT_EQ(engine.take_released(), (std::vector{&sequence}));
}

TEST(Scheduler, CommitOfNoTokenRunsThePositionAgain) {
  Engine engine(small());
  Sequence& sequence = engine.add(3, 9);
  engine.scheduler.commit(*engine.schedule(), {}, std::vector{0U});
  Plan* plan = engine.schedule();
  EXPECT_EQ(rows_of(plan), (Rows{{&sequence, 2, 1, true}}));
  engine.commit(*plan, 5);
  EXPECT_EQ(sequence.tokens, (std::vector{0, 0, 0, 5}));
}

// What a plan in flight has sampled behind a position counts for nothing where that gives none, or more than one.
TEST(Scheduler, ASampleWithAnotherPastIsDropped) {
  for (const std::uint32_t accepted : {0U, 2U, 3U}) {
    Engine engine(small());
    Sequence& sequence = engine.add(3, 20);
    Plan* first = engine.schedule();
    Plan* second = engine.schedule();
    ASSERT_EQ(rows_of(second), (Rows{{&sequence, 3, 1, true}}));
    engine.scheduler.commit(*first, std::vector<std::int32_t>(accepted, 10), std::vector{accepted});
    Plan* third = engine.schedule();
    if (accepted == 0) {
      EXPECT_EQ(rows_of(third), (Rows{{&sequence, 2, 1, true}}));
    } else {
      EXPECT_EQ(rows_of(third), (Rows{{&sequence, 4, accepted - 1, true}}));
    }
    EXPECT_EQ(third->rows[0].placeholder_of, PlanRow::kNone);
    engine.commit(*second, -1);
    EXPECT_EQ(sequence.state, SequenceState::kRunning);
    engine.commit(*third, 30);
    std::vector<std::int32_t> expected(3, 0);
    expected.resize(3 + accepted, 10);
    expected.push_back(30);
    EXPECT_EQ(sequence.tokens, expected);
    EXPECT_EQ(rows_of(engine.schedule()), (Rows{{&sequence, 3 + accepted, 1, true}}));
  }
}

TEST(Scheduler, LowIsAdmittedOnceItHasAged) {
  SchedulerConfig config = small();
  config.max_sequences = 1;
  Engine engine(config, 100 * kMs, 256);
  ManualClock clock(1);
  Sequence& low = engine.add(1, 1, Priority::kLow, clock.now_ns());
  for (int i = 0; i < 150 && low.state == SequenceState::kWaiting; ++i) {
    engine.add(1, 1, Priority::kHigh, clock.now_ns());
    engine.commit(*engine.schedule(clock.now_ns()));
    clock.advance(kMs);
  }
  EXPECT_EQ(low.state, SequenceState::kFinished);
  EXPECT_EQ(low.admitted_ns - low.arrival_ns, 100 * kMs);
}

TEST(Scheduler, AHigherPriorityTakesThePlaceOfTheNewestOfTheLowest) {
  SchedulerConfig config = small();
  config.max_sequences = 3;
  Engine engine(config);
  Sequence& old_low = engine.add(2, 10, Priority::kLow);
  Sequence& new_low = engine.add(2, 10, Priority::kLow);
  Sequence& normal = engine.add(2, 10, Priority::kNormal);
  engine.step();
  engine.step();
  ASSERT_EQ(new_low.generated(), 2U);
  Sequence& high = engine.add(2, 10, Priority::kHigh);
  Plan* plan = engine.schedule();
  EXPECT_EQ(new_low.state, SequenceState::kWaiting);
  EXPECT_TRUE(new_low.blocks.empty());
  EXPECT_EQ(rows_of(plan), (Rows{{&normal, 3, 1, true}, {&old_low, 3, 1, true}, {&high, 0, 2, true}}));
  EXPECT_EQ(engine.scheduler.preemptions(), 1U);
  engine.commit(*plan);

  engine.scheduler.finish(high, FinishReason::kCancelled);
  plan = engine.schedule();
  // Its tokens are kept, and computed anew; what it samples next is its third.
  EXPECT_EQ(rows_of(plan), (Rows{{&normal, 4, 1, true}, {&old_low, 4, 1, true}, {&new_low, 0, 4, true}}));
  engine.commit(*plan);
  EXPECT_EQ(new_low.generated(), 3U);
}

TEST(Scheduler, AsManyArePreemptedAsWait) {
  Engine engine(small());  // 4 rows
  for (int i = 0; i < 4; ++i) engine.add(1, 10, Priority::kLow);
  engine.step();
  for (int i = 0; i < 3; ++i) engine.add(1, 10, Priority::kHigh);
  engine.step();
  EXPECT_EQ(engine.scheduler.preemptions(), 3U);
  engine.step();
  EXPECT_EQ(engine.scheduler.preemptions(), 3U) << "whoever gave up its place does not take it back";
}

TEST(Scheduler, NobodyIsPreemptedForItsOwnPriorityOrALower) {
  SchedulerConfig config = small();
  config.max_sequences = 2;
  Engine engine(config);
  engine.add(1, 10, Priority::kHigh);
  engine.add(1, 10, Priority::kNormal);
  engine.step();
  engine.add(1, 10, Priority::kNormal);
  engine.add(1, 10, Priority::kLow);
  engine.step();
  EXPECT_EQ(engine.scheduler.preemptions(), 0U);
}

TEST(Scheduler, OneThatHasAgedIsNotPreempted) {
  SchedulerConfig config = small();
  config.max_sequences = 1;
  Engine engine(config, 100 * kMs);
  Sequence& low = engine.add(1, 10, Priority::kLow, 0);
  engine.commit(*engine.schedule(0));
  engine.add(1, 10, Priority::kHigh, 100 * kMs);
  engine.commit(*engine.schedule(100 * kMs));
  EXPECT_EQ(low.state, SequenceState::kRunning);
  EXPECT_EQ(low.generated(), 2U);
}

TEST(Scheduler, OneThatAPlanInFlightNamesIsNotPreempted) {
  SchedulerConfig config = small();
  config.max_sequences = 1;
  Engine engine(config);
  Sequence& low = engine.add(1, 10, Priority::kLow);
  Plan* first = engine.schedule();
  Sequence& high = engine.add(1, 10, Priority::kHigh);
  Plan* second = engine.schedule();
  EXPECT_EQ(low.state, SequenceState::kRunning);
  engine.commit(*first);
  if (second != nullptr) engine.commit(*second);
  engine.step();
  EXPECT_EQ(high.state, SequenceState::kRunning);
}

TEST(Scheduler, BlocksAreMadeFreeToo) {
  SchedulerConfig config = small();
  config.num_blocks = 16;  // of 4: one sequence of 64
  Engine engine(config);
  Sequence& low = engine.add(20, 9, Priority::kLow);        // 5 blocks
  Sequence& normal = engine.add(20, 9, Priority::kNormal);  // 5 blocks
  engine.step();
  Sequence& high = engine.add(36, 9, Priority::kHigh);  // 9 blocks: 6 are left
  engine.step();
  EXPECT_EQ(low.state, SequenceState::kWaiting);
  EXPECT_EQ(normal.state, SequenceState::kRunning);
  EXPECT_EQ(high.state, SequenceState::kRunning);
}

TEST(Scheduler, NobodyIsPreemptedInVain) {
  SchedulerConfig config = small();
  config.num_blocks = 16;
  Engine engine(config);
  Sequence& low = engine.add(4, 4, Priority::kLow);      // a block
  Sequence& first = engine.add(40, 9, Priority::kHigh);  // 10 blocks
  engine.step();
  Sequence& second = engine.add(26, 9, Priority::kHigh);  // 7 blocks: 5 are left, and another would not do
  engine.step();
  EXPECT_EQ(low.state, SequenceState::kRunning);
  EXPECT_EQ(second.state, SequenceState::kWaiting);
  engine.scheduler.finish(first, FinishReason::kCancelled);
  engine.step();
  EXPECT_EQ(low.state, SequenceState::kRunning);
  EXPECT_EQ(second.state, SequenceState::kRunning);
}

TEST(Scheduler, NoMoreArePreemptedThanFit) {
  SchedulerConfig config = small();
  config.num_blocks = 16;
  config.token_budget = 64;
  Engine engine(config);                                         // 4 rows
  for (int i = 0; i < 4; ++i) engine.add(1, 7, Priority::kLow);  // a block each
  engine.step();
  for (int i = 0; i < 3; ++i) engine.add(36, 9, Priority::kHigh);  // 9 each: one fits beside the LOW that are left
  engine.step();
  EXPECT_EQ(engine.scheduler.preemptions(), 1U);
  EXPECT_EQ(engine.scheduler.running().size(), 4U);
}

TEST(Scheduler, NoMoreArePreemptedThanTheBudgetServes) {
  Engine engine(small());  // a budget of 8
  for (int i = 0; i < 4; ++i) engine.add(1, 10, Priority::kLow);
  engine.step();
  for (int i = 0; i < 4; ++i) engine.add(8, 10, Priority::kHigh);
  engine.step();
  EXPECT_EQ(engine.scheduler.preemptions(), 1U) << "its prompt takes what is left of the step";
  EXPECT_EQ(engine.scheduler.running().size(), 4U);
}

TEST(Scheduler, WhereBlocksRunOutTheNewestOfTheLowestIsPreempted) {
  SchedulerConfig config = small();
  config.num_blocks = 16;
  config.token_budget = 64;
  Engine engine(config);
  Sequence& old_low = engine.add(12, 40, Priority::kLow, 1);
  Sequence& normal = engine.add(12, 40, Priority::kNormal, 2);
  Sequence& new_low = engine.add(12, 40, Priority::kLow, 3);
  for (int i = 0; i < 100 && engine.scheduler.preemptions() == 0; ++i) engine.step();
  EXPECT_EQ(new_low.state, SequenceState::kWaiting);
  EXPECT_EQ(old_low.state, SequenceState::kRunning);
  EXPECT_EQ(normal.state, SequenceState::kRunning);
  EXPECT_LT(engine.pool.available(), 7U) << "as long as there was a block, nobody gave up any";
  const std::size_t tokens = new_low.tokens.size();
  while (engine.step() > 0) {
  }
  EXPECT_EQ(new_low.finish, FinishReason::kLength);
  EXPECT_EQ(new_low.generated(), 40U);
  EXPECT_GT(tokens, 12U) << "it had some, and kept them";
  EXPECT_EQ(engine.pool.in_use(), 0U);
}

TEST(Scheduler, OneAloneIsNeverPreempted) {
  SchedulerConfig config = small();
  config.num_blocks = 16;  // exactly one context
  Engine engine(config);
  Sequence& sequence = engine.add(4, 1000, Priority::kLow);
  while (engine.step() > 0) {
  }
  EXPECT_EQ(sequence.tokens.size(), 64U);
  EXPECT_EQ(engine.scheduler.preemptions(), 0U);
}

TEST(Scheduler, APrefixThatTwoHaveIsComputedOnce) {
  SchedulerConfig config = small();
  config.cached_blocks = 128;
  config.token_budget = 12;
  Engine engine(config);
  Sequence& one = engine.add(30, 2);
  Sequence& two = engine.add(30, 2);
  std::uint32_t positions = 0;
  std::vector<Rows> plans;
  while (Plan* plan = engine.schedule()) {
    plans.push_back(rows_of(plan));
    positions += plan->tokens;
    engine.commit(*plan);
  }
  EXPECT_EQ(plans.at(0), (Rows{{&one, 0, 12, false}})) << "the other one waits for it";
  EXPECT_EQ(positions, 30U + 1 + 2 + 1) << "28 positions are whole blocks";
  EXPECT_EQ(one.cached_tokens, 0U);
  EXPECT_EQ(two.cached_tokens, 28U);
  EXPECT_EQ(two.finish, FinishReason::kLength);
}

TEST(Scheduler, WhatAPreemptedOneHadIsNotComputedAgain) {
  SchedulerConfig config = small();
  config.max_sequences = 1;
  config.cached_blocks = 128;
  config.token_budget = 64;
  Engine engine(config);
  Sequence& low = engine.add(20, 20, Priority::kLow);
  engine.step();
  Sequence& high = engine.add(2, 1, Priority::kHigh);
  engine.step();
  EXPECT_EQ(high.finish, FinishReason::kLength);
  EXPECT_EQ(low.state, SequenceState::kWaiting);
  EXPECT_EQ(rows_of(engine.schedule()), (Rows{{&low, 20, 1, true}}));
  EXPECT_EQ(low.cached_tokens, 0U) << "that is for what others computed";
}

// Where a step takes 10 ms, and half a millisecond a position of prompts.
void timed_step(Engine& engine) {
  Plan* plan = engine.schedule();
  engine.commit(*plan);
  engine.scheduler.observe(*plan, 10 * kMs + plan->prompts.positions * kMs / 2);
}

SchedulerConfig large_contexts(std::uint32_t token_budget) {
  SchedulerConfig config = small();
  config.max_sequences = 16;
  config.max_context = 1000;
  config.num_blocks = 1000;
  config.token_budget = token_budget;
  return config;
}

TEST(Scheduler, PromptsTakeWhatKeepsAStepWithinItsTime) {
  SchedulerConfig config = large_contexts(100);
  config.target_step_ns = 30 * kMs;
  Engine engine(config);
  engine.add(1, 900);
  for (int i = 0; i < 40; ++i) {
    timed_step(engine);
    if (i % 4 == 0) engine.add(5 + static_cast<std::uint32_t>(i % 7), 1);
  }
  const Sequence& large = engine.add(500, 1);
  while (large.scheduled < 100) timed_step(engine);  // chunks grow by doubling
  Plan* plan = engine.schedule();
  ASSERT_EQ(plan->decoding, 1U);
  EXPECT_NEAR(plan->prompts.positions, 40, 2);
}

// Where nobody says how long a step may take: by how long it takes without prompts, and how many of these there are.
TEST(Scheduler, PromptsTakeMoreOfAStepWhereMoreWaitThanRun) {
  // Of a step in which `streams` decode.
  const auto positions_beside = [](std::uint32_t streams, int prompts) {
    Engine engine(large_contexts(200));
    for (std::uint32_t i = 0; i < streams; ++i) engine.add(1, 900);
    for (int i = 0; i < 60; ++i) {
      timed_step(engine);
      if (i % 4 == 0) engine.add(5 + static_cast<std::uint32_t>(i % 7), 1);
    }
    while (engine.step() > streams) {
    }
    for (int i = 0; i < prompts; ++i) engine.add(300, 1);
    for (int i = 0; i < 5; ++i) timed_step(engine);  // chunks grow by doubling
    const Plan* plan = engine.schedule();
    EXPECT_EQ(plan->decoding, streams);
    return plan->prompts.positions;
  };
  EXPECT_NEAR(positions_beside(8, 1), 14, 2);   // 7 ms, the least
  EXPECT_NEAR(positions_beside(8, 4), 20, 2);   // 10 ms
  EXPECT_NEAR(positions_beside(8, 8), 40, 4);   // 20 ms
  EXPECT_NEAR(positions_beside(4, 12), 80, 8);  // 40 ms, the most
}

TEST(Scheduler, AShortPromptIsReadBesideALongOneAndNotBehindIt) {
  Engine engine(large_contexts(200));
  for (int i = 0; i < 8; ++i) engine.add(1, 900);
  for (int i = 0; i < 10; ++i) timed_step(engine);
  engine.add(5, 1);
  for (int i = 0; i < 10; ++i) timed_step(engine);
  const Sequence& large = engine.add(900, 1);
  for (int i = 0; i < 5; ++i) timed_step(engine);
  ASSERT_GT(large.scheduled, 0U);
  const Sequence& small = engine.add(8, 1);
  for (int i = 0; i < 2; ++i) timed_step(engine);
  EXPECT_EQ(small.finish, FinishReason::kLength);
  EXPECT_LT(large.scheduled, 200U);
}

// Where nobody decodes: a request that comes meanwhile waits for the step's end.
TEST(Scheduler, AStepOfPromptsAloneTakesNoLongerThanAFifthOfASecond) {
  Engine engine(large_contexts(1000));
  for (const std::uint32_t prompt : {100U, 300U}) {
    engine.add(prompt, 3);
    for (int i = 0; i < 3; ++i) timed_step(engine);
  }
  engine.add(900, 1);
  const std::uint32_t positions = engine.schedule()->prompts.positions;
  EXPECT_GT(positions, 200U);
  EXPECT_LE(positions, 400U);
}

// Now and then who decodes has a step alone, or it would not be known any more what one takes.
TEST(Scheduler, SomeStepsReadNoPrompts) {
  Engine engine(large_contexts(200));
  engine.add(1, 900);
  engine.add(100, 1);
  std::vector<std::uint32_t> positions;
  for (int i = 0; i < 200; ++i) {
    if (i % 4 == 1) engine.add(900, 1);  // there is always one
    Plan* plan = engine.schedule();
    positions.push_back(plan->prompts.positions);
    engine.commit(*plan);
    engine.scheduler.observe(*plan, 10 * kMs + plan->prompts.positions * kMs / 2);
  }
  const auto alone = std::ranges::count(positions, 0U);
  EXPECT_GE(alone, 5);
  EXPECT_LE(alone, 10);
}

// Where a chunk's cost is foreseen too small, as here that of all, the next is no more than twice as large.
TEST(Scheduler, ChunksBesideStreamsGrowByDoubling) {
  Engine engine(large_contexts(200));
  engine.add(1, 900);
  std::vector<std::uint32_t> positions;
  for (int i = 0; i < 20; ++i) {
    for (int prompt = 0; i == 10 && prompt < 2; ++prompt) engine.add(900, 1);
    Plan* plan = engine.schedule();
    if (i > 10) positions.push_back(plan->prompts.positions);
    engine.commit(*plan);
    engine.scheduler.observe(*plan, 10 * kMs);
  }
  EXPECT_EQ(positions.front(), 32U);
  for (std::size_t i = 1; i < 4; ++i) EXPECT_LE(positions[i], 2 * positions[i - 1]);
  EXPECT_GT(std::ranges::max(positions), 100U);
}

// A server's life under a simulated clock: random arrivals, cancels, pauses, failures and accepted tokens, with one or
// two plans in flight, prefixes in common and blocks that run out; and what must hold checked after every step against
// a second book of accounts, and against what each position of each block holds.
class Simulation {
 public:
  explicit Simulation(std::uint64_t seed)
      : random_(seed),
        clock_(1),
        ageing_ns_(static_cast<std::int64_t>(below(300)) * kMs),
        engine_(config(), ageing_ns_, kQueue) {}

  void run(int steps) {
    for (int i = 0; i < steps && !testing::Test::HasFatalFailure(); ++i) step(true);
    // No more requests: all that came must end.
    for (Sequence* sequence : live_) sequence->paused = false;
    pauses_ = false;
    std::size_t left = 200 * (live_.size() + 1) + 10'000;
    while ((!live_.empty() || !in_flight_.empty()) && !testing::Test::HasFatalFailure()) {
      ASSERT_GT(left--, 0U) << live_.size() << " sequences never end";
      step(false);
    }
    EXPECT_EQ(engine_.pool.in_use(), 0U);
    EXPECT_TRUE(engine_.heap.empty());
    EXPECT_TRUE(engine_.scheduler.running().empty());
    EXPECT_EQ(released_, added_);
  }

  std::uint64_t positions() const { return positions_; }
  std::uint64_t preemptions() const { return preemptions_; }
  std::uint64_t cached() const { return cached_; }

 private:
  static constexpr std::size_t kQueue = 40;

  struct Book {
    std::uint32_t computed = 0;  // positions that plans were given
    std::uint32_t in_flight = 0;
  };

  std::uint64_t below(std::uint64_t n) { return random_() % n; }
  bool one_in(std::uint64_t n) { return below(n) == 0; }

  SchedulerConfig config() {
    SchedulerConfig config;
    config.max_sequences = static_cast<std::uint32_t>(1 + below(12));
    config.token_budget = static_cast<std::uint32_t>(one_in(3) ? 1 + below(8) : 1 + below(64));
    config.block_size = static_cast<std::uint32_t>(1 + below(8));
    config.max_context = static_cast<std::uint32_t>(2 + below(80));
    const std::uint32_t one = (config.max_context + config.block_size - 1) / config.block_size;
    config.num_blocks = static_cast<std::uint32_t>(one + below(one * config.max_sequences));
    if (!one_in(4)) config.cached_blocks = static_cast<std::uint32_t>(1 + below(config.num_blocks));
    config.target_step_ns = one_in(2) ? 0 : static_cast<std::int64_t>(below(20)) * kMs;
    speculative_ = one_in(3);
    arrivals_every_ = 1 + below(12);
    return config;
  }

  void step(bool arrivals) {
    clock_.advance(static_cast<std::int64_t>(below(10)) * kMs);
    if (arrivals) {
      while (!engine_.heap.full() && one_in(arrivals_every_)) arrive();
    }
    meddle();
    collect();
    if (in_flight_.size() < 2 && (in_flight_.empty() || one_in(2))) plan();
    check();
    if (!in_flight_.empty() && (in_flight_.size() == 2 || one_in(2))) commit();
    collect();
    check();
  }

  void arrive() {
    const auto prompt_tokens = static_cast<std::uint32_t>(1 + below(engine_.config.max_context - 1));
    const auto max_tokens = static_cast<std::int32_t>(one_in(10) ? 1'000'000 : 1 + below(30));
    Sequence& sequence = engine_.add(prompt_tokens, max_tokens, static_cast<Priority>(below(3)), clock_.now_ns());
    sequence.extra_key = below(3);  // all else is the same for all
    for (std::uint32_t i = 0; i < prompt_tokens; ++i) sequence.tokens[i] = token_at(i);
    live_.insert(&sequence);
    ++added_;
  }

  void meddle() {
    if (live_.empty()) return;
    Sequence* const chosen = *std::next(live_.begin(), static_cast<std::ptrdiff_t>(below(live_.size())));
    if (one_in(20)) engine_.scheduler.finish(*chosen, FinishReason::kCancelled);
    if (pauses_ && one_in(4)) chosen->paused = !chosen->paused;
  }

  void plan() {
    std::vector<Sequence*> waiting;
    engine_.heap.for_each([&](Sequence* sequence) { waiting.push_back(sequence); });
    const std::vector<Sequence*> running = engine_.scheduler.running();
    std::set<const Sequence*> busy;
    for (Sequence* sequence : running) {
      if (sequence->in_flight > 0) busy.insert(sequence);
      sequence->was_preempted = false;
    }
    const std::uint64_t preemptions = engine_.scheduler.preemptions();
    Plan* plan = engine_.scheduler.schedule(clock_.now_ns());
    account_for_preempted(running, engine_.scheduler.preemptions() - preemptions, busy);
    // An aged one that still waits was overtaken by nobody who came after it.
    for (const Sequence* admitted : waiting) {
      if (admitted->state != SequenceState::kRunning) continue;
      engine_.heap.for_each([&](const Sequence* left) {
        const bool aged = clock_.now_ns() - left->arrival_ns >= ageing_ns_;
        ASSERT_FALSE(aged && left->arrival_ns < admitted->arrival_ns) << "an aged sequence was overtaken";
        ASSERT_FALSE(left->priority > admitted->priority && clock_.now_ns() - admitted->arrival_ns < ageing_ns_)
            << "a higher priority was overtaken by one that has not aged";
      });
    }
    if (plan == nullptr) {
      // With nothing in flight, only what is paused, or waits for the room of what is paused, may be left undone.
      for (const Sequence* sequence : engine_.scheduler.running()) {
        ASSERT_TRUE(sequence->paused || !in_flight_.empty()) << "a sequence could run and did not";
      }
      ASSERT_TRUE(engine_.heap.empty() || !engine_.scheduler.running().empty() || !in_flight_.empty());
      return;
    }
    in_flight_.push_back(plan);
    std::uint32_t tokens = 0, samples = 0;
    std::set<const Sequence*> seen;
    for (const PlanRow& row : plan->rows) {
      Sequence& sequence = *row.sequence;
      Book& book = books_[&sequence];
      ASSERT_TRUE(seen.insert(&sequence).second) << "twice in one plan";
      ASSERT_EQ(sequence.state, SequenceState::kRunning);
      ASSERT_FALSE(sequence.paused);
      ASSERT_GT(row.count, 0U);
      ASSERT_GE(row.start, book.computed) << "a position is computed twice";
      if (row.start > book.computed) {
        ASSERT_EQ(row.start % engine_.config.block_size, 0U) << "a position is left out";
        cached_ += row.start - book.computed;
      }
      for (std::uint32_t i = 0; i < row.start; ++i) ASSERT_EQ(cell(sequence, i), content(sequence, i)) << "at " << i;
      book.computed = row.start + row.count;
      ++book.in_flight;
      const auto known = static_cast<std::uint32_t>(sequence.tokens.size());
      ASSERT_LE(book.computed, known + 1) << "a position without a token, known or being sampled";
      if (book.computed == known + 1) {
        ASSERT_EQ(in_flight_.size(), 2U);
        const PlanRow& source = in_flight_.front()->rows.at(row.placeholder_of);
        ASSERT_EQ(source.sequence, &sequence);
        ASSERT_TRUE(source.sample);
        ASSERT_EQ(source.start + source.count, known);
      } else {
        ASSERT_EQ(row.placeholder_of, PlanRow::kNone);
      }
      ASSERT_EQ(row.sample, book.computed >= known);
      tokens += row.count;
      samples += row.sample ? 1 : 0;
    }
    for (const PlanRow& row : plan->rows) {
      for (std::uint32_t i = 0; i < row.count; ++i) {
        cell(*row.sequence, row.start + i) = content(*row.sequence, row.start + i);
      }
    }
    ASSERT_EQ(plan->tokens, tokens);
    ASSERT_EQ(plan->samples, samples);
    ASSERT_GT(tokens, 0U);
    ASSERT_LE(tokens, engine_.config.token_budget);
    ASSERT_LE(plan->rows.size(), engine_.config.max_sequences);
    positions_ += tokens;
  }

  // What a position holds once it is computed: it depends on all that comes before.
  static std::uint64_t content(const Sequence& sequence, std::uint32_t position) {
    return (sequence.extra_key + 1) << 32 | position;
  }
  std::uint64_t& cell(const Sequence& sequence, std::uint32_t position) {
    const std::uint32_t size = engine_.config.block_size;
    return cells_[static_cast<std::uint64_t>(sequence.blocks.at(position / size)) * size + position % size];
  }

  // `busy`: those that a plan in flight named.
  void account_for_preempted(const std::vector<Sequence*>& ran, std::uint64_t count,
                             const std::set<const Sequence*>& busy) {
    std::uint64_t seen = 0;
    const auto rank = [&](const Sequence* sequence) {
      const bool aged = clock_.now_ns() - sequence->arrival_ns >= ageing_ns_;
      return std::tuple(aged, aged ? Priority::kLow : sequence->priority, -sequence->arrival_ns);
    };
    for (Sequence* sequence : ran) {
      Book& book = books_[sequence];
      if (!sequence->was_preempted) continue;
      ++seen;
      book.computed = 0;
      ASSERT_EQ(book.in_flight, 0U) << "preempted while a plan names it";
      if (sequence->state != SequenceState::kWaiting) continue;  // it is back already
      for (const Sequence* other : ran) {
        if (other->state != SequenceState::kRunning || busy.contains(other)) continue;
        ASSERT_GE(rank(other), rank(sequence)) << "another one should have been preempted";
      }
    }
    ASSERT_LE(seen, count);
    preemptions_ += count;
  }

  // A token tells its index, so that one that is lost, doubled or another's is seen. What has another past is -1, which
  // would end its sequence if it were taken.
  void commit() {
    Plan& plan = *in_flight_.front();
    in_flight_.erase(in_flight_.begin());
    if (in_flight_.empty() && one_in(50)) return fail(plan);
    engine_.scheduler.observe(plan, static_cast<std::int64_t>(2 + below(3) + plan.tokens / 8) * kMs);
    std::vector<std::int32_t> sampled;
    std::vector<std::uint32_t> counts;
    std::map<Sequence*, FinishReason> expected;
    for (const PlanRow& row : plan.rows) {
      Sequence& sequence = *row.sequence;
      Book& book = books_[&sequence];
      --book.in_flight;
      if (!row.sample) continue;
      std::uint32_t count = 1;
      const auto known = static_cast<std::uint32_t>(sequence.tokens.size());
      if (row.start + row.count != known) {
        sampled.push_back(-1);
      } else if (one_in(60)) {
        sampled.push_back(-1);
        if (sequence.finish == FinishReason::kNone) expected[&sequence] = FinishReason::kError;
      } else {
        if (speculative_) count = static_cast<std::uint32_t>(below(4));
        for (std::uint32_t i = 0; i < count; ++i) sampled.push_back(token_at(known + i));
        if (count == 0) book.computed = known - 1;
        const bool ends = known + count >= engine_.config.max_context ||
                          sequence.generated() + count >= static_cast<std::uint32_t>(sequence.sampling.max_tokens);
        if (sequence.finish == FinishReason::kNone && ends) expected[&sequence] = FinishReason::kLength;
      }
      counts.push_back(count);
    }
    if (speculative_) {
      engine_.scheduler.commit(plan, sampled, counts);
    } else {
      engine_.scheduler.commit(plan, sampled);
    }
    for (const auto& [sequence, reason] : expected) ASSERT_EQ(sequence->finish, reason);
  }

  // The model failed: what it was to compute is anything.
  void fail(Plan& plan) {
    engine_.scheduler.retract(plan);
    for (const Sequence* sequence : live_) {  // those that shared it go back
      books_[sequence].computed = std::min(books_[sequence].computed, sequence->scheduled);
    }
    for (const PlanRow& row : plan.rows) {
      for (std::uint32_t i = 0; i < row.count; ++i) cell(*row.sequence, row.start + i) = 0;
      engine_.scheduler.finish(*row.sequence, FinishReason::kError, StreamError::kModelFailed);
      --books_[row.sequence].in_flight;
    }
    engine_.scheduler.commit(plan, std::vector<std::int32_t>(plan.samples, 0));
  }

  void collect() {
    for (Sequence* sequence : engine_.take_released()) {
      ASSERT_EQ(live_.erase(sequence), 1U) << "released twice";
      ASSERT_EQ(sequence->state, SequenceState::kFinished);
      ASSERT_NE(sequence->finish, FinishReason::kNone);
      ASSERT_EQ(books_[sequence].in_flight, 0U) << "released while a plan names it";
      ASSERT_TRUE(sequence->blocks.empty());
      for (std::uint32_t i = 0; i < sequence->tokens.size(); ++i) ASSERT_EQ(sequence->tokens[i], token_at(i));
      ASSERT_LE(sequence->generated(), static_cast<std::uint32_t>(sequence->sampling.max_tokens));
      ++released_;
      books_.erase(sequence);
      std::erase_if(engine_.owned, [=](const auto& owned) { return owned.get() == sequence; });
    }
  }

  void check() {
    const SchedulerConfig& config = engine_.config;
    std::set<std::int32_t> blocks;
    std::set<std::uint32_t> rows;
    std::uint32_t waiting = 0;
    for (const Sequence* sequence : live_) {
      ASSERT_EQ(sequence->in_flight, books_[sequence].in_flight);
      if (sequence->state == SequenceState::kWaiting) {
        ++waiting;
        ASSERT_TRUE(sequence->blocks.empty());
        continue;
      }
      ASSERT_TRUE(rows.insert(sequence->row).second) << "two sequences in a row of the block table";
      ASSERT_LT(sequence->row, config.max_sequences);
      for (std::size_t i = 0; i < sequence->blocks.size(); ++i) {
        const bool is_new = blocks.insert(sequence->blocks[i]).second;
        ASSERT_TRUE(is_new || i < sequence->published_blocks) << "a block of two that is no prefix";
      }
      ASSERT_GE(sequence->blocks.size() * config.block_size, books_[sequence].computed);
    }
    ASSERT_EQ(engine_.pool.in_use(), blocks.size());
    ASSERT_LE(engine_.pool.idle(), config.cached_blocks);
    ASSERT_EQ(engine_.heap.size(), waiting);
    ASSERT_LE(engine_.scheduler.running().size(), config.max_sequences);
  }

  static std::int32_t token_at(std::uint32_t index) { return static_cast<std::int32_t>(1000 + index); }

  std::mt19937_64 random_;
  ManualClock clock_;
  bool speculative_ = false;
  bool pauses_ = true;
  std::uint64_t arrivals_every_ = 1;
  std::int64_t ageing_ns_;
  Engine engine_;
  std::vector<Plan*> in_flight_;
  struct ByArrival {  // and not by address: a seed is to give the same life again
    bool operator()(const Sequence* a, const Sequence* b) const { return a->stream_id < b->stream_id; }
  };
  std::set<Sequence*, ByArrival> live_;
  std::map<const Sequence*, Book> books_;
  std::size_t added_ = 0, released_ = 0;
  std::uint64_t positions_ = 0;
  std::uint64_t preemptions_ = 0;
  std::uint64_t cached_ = 0;
  std::map<std::uint64_t, std::uint64_t> cells_;  // of the KV cache
};

TEST(Scheduler, HoldsItsPromisesUnderRandomLoads) {
  const char* const soak = std::getenv("RTS_SOAK");
  const int steps = soak != nullptr && *soak != '\0' && *soak != '0' ? 1'000'000 : 24'000;
  const char* const given = std::getenv("RTS_SEED");
  const std::uint64_t first_seed = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  constexpr int kStepsOfALife = 400;
  std::uint64_t positions = 0, preemptions = 0, cached = 0;
  for (int life = 0; life < steps / kStepsOfALife; ++life) {
    const std::uint64_t seed = first_seed + static_cast<std::uint64_t>(life);
    SCOPED_TRACE("RTS_SEED=" + std::to_string(seed));
    Simulation simulation(seed);
    simulation.run(kStepsOfALife);
    if (HasFailure()) return;
    positions += simulation.positions();
    preemptions += simulation.preemptions();
    cached += simulation.cached();
  }
  // That the loads reach what is to be tested, whatever the seed: of 300 runs the least were 1.8 positions, 0.8 cached
  // positions and 0.003 preemptions a step. A feature that is gone gives none.
  EXPECT_GT(positions, static_cast<std::uint64_t>(steps) / 10);
  EXPECT_GT(cached, static_cast<std::uint64_t>(steps) / 10);
  EXPECT_GT(preemptions, static_cast<std::uint64_t>(steps) / 10'000);
}

}  // namespace
}  // namespace rts
