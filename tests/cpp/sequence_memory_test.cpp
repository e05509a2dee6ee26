#include "rts/sequence_memory.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

namespace rts {
namespace {

constexpr std::uint32_t kBlock = 4;

// A sequence whose tokens are `first`, `first` + 1, …
std::unique_ptr<Sequence> sequence(std::uint32_t tokens, std::int32_t first = 0, std::uint64_t extra_key = 0) {
  auto made = std::make_unique<Sequence>();
  made->prompt_tokens = tokens;
  made->tokens.resize(tokens);
  std::iota(made->tokens.begin(), made->tokens.end(), first);
  made->extra_key = extra_key;
  return made;
}

struct Memory {
  explicit Memory(std::uint32_t blocks, std::uint32_t keep = 100) : pool(blocks, keep), memory(pool, kBlock, {1, 2}) {}

  std::unique_ptr<Sequence> admitted(std::uint32_t tokens, std::int32_t first = 0, std::uint64_t extra_key = 0) {
    auto made = sequence(tokens, first, extra_key);
    EXPECT_TRUE(memory.acquire(*made, 0));
    return made;
  }
  void compute(Sequence& of, std::uint32_t positions) {
    const std::uint32_t start = std::exchange(of.scheduled, positions);
    memory.advanced(of, start);
    memory.computed(of, positions);
  }

  BlockPool pool;
  SequenceMemory memory;
};

TEST(SequenceMemory, TakesTheBlocksOfAllTokensOrNone) {
  Memory test(4);
  const auto one = test.admitted(9);
  EXPECT_EQ(one->blocks.size(), 3U);
  const auto two = sequence(4, 100);
  EXPECT_FALSE(test.memory.acquire(*two, 1)) << "one is to be left";
  EXPECT_TRUE(two->blocks.empty());
  EXPECT_TRUE(test.memory.acquire(*two, 0));
  EXPECT_EQ(test.pool.available(), 0U);
}

TEST(SequenceMemory, GrowsByABlockWhenItIsFull) {
  Memory test(3);
  const auto one = test.admitted(4);
  EXPECT_EQ(test.memory.growth(*one, 4), 0U);
  EXPECT_EQ(test.memory.growth(*one, 5), 1U);
  EXPECT_EQ(test.memory.reach(*one, 9), 9U);
  EXPECT_EQ(test.memory.reach(*one, 100), 12U);
  one->scheduled = 12;
  test.memory.advanced(*one, 0);
  EXPECT_EQ(one->blocks.size(), 3U);
  one->scheduled = 13;
  EXPECT_THROW(test.memory.advanced(*one, 12), std::logic_error);
}

TEST(SequenceMemory, WhatOthersHaveComputedIsPassedOver) {
  Memory test(20);
  const auto one = test.admitted(13);
  test.compute(*one, 13);
  const auto two = test.admitted(15);
  EXPECT_EQ(std::vector(two->blocks.begin(), two->blocks.begin() + 3),
            std::vector(one->blocks.begin(), one->blocks.begin() + 3));
  EXPECT_NE(two->blocks[3], one->blocks[3]);
  EXPECT_EQ(test.pool.in_use(), 5U);
  EXPECT_TRUE(test.memory.pass_over_computed(*two));
  EXPECT_EQ(two->scheduled, 12U);
  EXPECT_EQ(two->cached_tokens, 12U);
}

TEST(SequenceMemory, TheLastTokenIsAlwaysComputed) {
  Memory test(20);
  const auto one = test.admitted(12);
  test.compute(*one, 12);
  const auto two = test.admitted(12);
  EXPECT_TRUE(test.memory.pass_over_computed(*two));
  EXPECT_EQ(two->scheduled, 8U);
  EXPECT_NE(two->blocks[2], one->blocks[2]) << "it would write to another's block";
}

TEST(SequenceMemory, AnotherPrefixOrKeyIsNotShared) {
  Memory test(20);
  const auto one = test.admitted(9);
  test.compute(*one, 9);
  for (const auto& other : {sequence(9, 1), sequence(9, 0, 7)}) {
    EXPECT_TRUE(test.memory.acquire(*other, 0));
    EXPECT_TRUE(test.memory.pass_over_computed(*other));
    EXPECT_EQ(other->scheduled, 0U);
    test.memory.release(*other);
  }
  // A block with the same tokens behind others is another block.
  auto shifted = sequence(12);
  for (int i = 0; i < 4; ++i) shifted->tokens[static_cast<std::size_t>(i)] = 99;
  for (int i = 4; i < 12; ++i) shifted->tokens[static_cast<std::size_t>(i)] = i - 4;
  EXPECT_TRUE(test.memory.acquire(*shifted, 0));
  EXPECT_TRUE(test.memory.pass_over_computed(*shifted));
  EXPECT_EQ(shifted->scheduled, 0U);
}

TEST(SequenceMemory, WhatAnotherIsAboutToComputeIsWaitedFor) {
  Memory test(20);
  const auto one = test.admitted(17), two = test.admitted(17);
  EXPECT_TRUE(test.memory.pass_over_computed(*one));
  EXPECT_FALSE(test.memory.pass_over_computed(*two));
  test.compute(*one, 10);  // in the middle of a block
  EXPECT_FALSE(test.memory.pass_over_computed(*two));
  EXPECT_EQ(two->scheduled, 8U);
  test.compute(*one, 17);
  EXPECT_TRUE(test.memory.pass_over_computed(*two));
  EXPECT_EQ(two->scheduled, 16U);
}

TEST(SequenceMemory, WhoWaitsTakesOverFromOneThatEndsOrIsPaused) {
  Memory test(20);
  auto one = test.admitted(17);
  const auto two = test.admitted(17), three = test.admitted(17);
  EXPECT_TRUE(test.memory.pass_over_computed(*one));
  one->scheduled = 6;
  test.memory.advanced(*one, 0);
  EXPECT_FALSE(test.memory.pass_over_computed(*two));
  test.memory.release(*one);
  one.reset();
  EXPECT_TRUE(test.memory.pass_over_computed(*two));
  EXPECT_EQ(two->scheduled, 4U) << "what is half computed is computed anew";
  EXPECT_FALSE(test.memory.pass_over_computed(*three));
  two->paused = true;
  EXPECT_TRUE(test.memory.pass_over_computed(*three));
}

TEST(SequenceMemory, AChunkEndsWhereAnotherHasComputedOn) {
  Memory test(20);
  const auto one = test.admitted(17), two = test.admitted(17);
  EXPECT_TRUE(test.memory.pass_over_computed(*one));
  test.compute(*one, 6);  // in the middle of a block
  one->paused = true;
  EXPECT_TRUE(test.memory.pass_over_computed(*two));
  test.compute(*two, 12);
  one->paused = false;
  EXPECT_EQ(test.memory.reach(*one, 11), 2U);
  test.compute(*one, 8);
  EXPECT_TRUE(test.memory.pass_over_computed(*one));
  EXPECT_EQ(one->scheduled, 12U);
}

TEST(SequenceMemory, WhatNobodyComputedIsNotFound) {
  Memory test(20);
  const auto one = test.admitted(17);
  one->scheduled = 6;
  test.memory.advanced(*one, 0);
  test.memory.release(*one);
  const auto two = test.admitted(17);
  EXPECT_TRUE(test.memory.pass_over_computed(*two));
  EXPECT_EQ(two->scheduled, 4U);
}

TEST(SequenceMemory, GeneratedTokensAreFoundOnceTheyAreComputed) {
  Memory test(20);
  const auto one = test.admitted(6);
  test.compute(*one, 6);
  for (std::int32_t token = 6; token < 14; ++token) {
    one->tokens.push_back(token);
    test.compute(*one, static_cast<std::uint32_t>(one->tokens.size()));
  }
  one->tokens.push_back(14);
  one->scheduled = 16;  // being sampled: its tokens are not known yet
  test.memory.advanced(*one, 14);
  test.memory.computed(*one, 16);
  test.memory.release(*one);
  const auto two = test.admitted(20);
  EXPECT_TRUE(test.memory.pass_over_computed(*two));
  EXPECT_EQ(two->scheduled, 12U);
}

TEST(SequenceMemory, WhatFailedIsFoundNoMoreAndWhoPassedItGoesBack) {
  Memory test(20);
  const auto one = test.admitted(17), two = test.admitted(17);
  EXPECT_TRUE(test.memory.pass_over_computed(*one));
  test.compute(*one, 8);
  one->scheduled = 17;
  test.memory.advanced(*one, 8);
  EXPECT_TRUE(test.memory.pass_over_computed(*two));
  EXPECT_EQ(two->scheduled, 16U);
  test.memory.retract(*one, 8);
  test.memory.rewind(*two);
  EXPECT_EQ(two->scheduled, 8U);
  EXPECT_EQ(two->cached_tokens, 8U);
  const auto three = test.admitted(17);
  EXPECT_EQ(three->blocks[1], one->blocks[1]);
  EXPECT_NE(three->blocks[2], one->blocks[2]);
}

TEST(SequenceMemory, WhoGeneratedWhatAnotherFailedToComputeAnewGoesBackToo) {
  Memory test(20);
  const auto one = test.admitted(2);
  for (std::int32_t token = 2; token < 10; ++token) {
    one->tokens.push_back(token);
    test.compute(*one, static_cast<std::uint32_t>(one->tokens.size()));
  }
  const auto two = test.admitted(17);
  EXPECT_EQ(two->blocks[1], one->blocks[1]);
  test.memory.retract(*two, 4);
  test.memory.rewind(*one);
  EXPECT_EQ(one->scheduled, 4U);
}

TEST(SequenceMemory, NothingIsSharedWhereNothingIsKept) {
  Memory test(20, 0);
  const auto one = test.admitted(9);
  test.compute(*one, 9);
  const auto two = test.admitted(9);
  EXPECT_TRUE(test.memory.pass_over_computed(*two));
  EXPECT_EQ(two->scheduled, 0U);
  EXPECT_EQ(test.pool.in_use(), 6U);
}

}  // namespace
}  // namespace rts
