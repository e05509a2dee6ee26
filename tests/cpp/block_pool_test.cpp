#include "rts/block_pool.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

namespace rts {
namespace {

using Blocks = std::vector<std::int32_t>;

Blocks take(BlockPool& pool, int count) {
  Blocks blocks;
  while (count-- > 0) blocks.push_back(pool.allocate());
  return blocks;
}

TEST(BlockPool, GivesEachBlockOnce) {
  BlockPool pool(4);
  EXPECT_EQ(pool.size(), 4U);
  EXPECT_EQ(pool.available(), 4U);
  const Blocks blocks = take(pool, 4);
  EXPECT_EQ(std::set(blocks.begin(), blocks.end()), (std::set<std::int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(pool.in_use(), 4U);
  EXPECT_THROW(pool.allocate(), std::logic_error);
  pool.free(blocks);
  EXPECT_EQ(pool.in_use(), 0U);
}

TEST(BlockPool, GivesTheBlockThatWasFreedLast) {
  BlockPool pool(4);
  const std::int32_t first = pool.allocate(), second = pool.allocate();
  pool.free(Blocks{second});
  pool.free(Blocks{first});
  EXPECT_EQ(pool.allocate(), first);
  EXPECT_EQ(pool.allocate(), second);
}

TEST(BlockPool, RefusesABlockThatNobodyUses) {
  BlockPool pool(2);
  const Blocks block = take(pool, 1);
  pool.free(block);
  EXPECT_THROW(pool.free(block), std::logic_error);
  EXPECT_THROW(pool.free(Blocks{7}), std::out_of_range);
}

TEST(BlockPool, ASharedBlockIsFreeOnceNobodyUsesIt) {
  BlockPool pool(2, 2);
  const Blocks block = take(pool, 1);
  pool.publish(block[0], {1, 1});
  EXPECT_TRUE(pool.has_one_user(block[0]));
  pool.share(pool.find({1, 1}));
  EXPECT_FALSE(pool.has_one_user(block[0]));
  pool.free(block);
  EXPECT_EQ(pool.in_use(), 1U);
  pool.free(block);
  EXPECT_EQ(pool.in_use(), 0U);
  EXPECT_EQ(pool.idle(), 1U);
}

TEST(BlockPool, KeepsAPrefixUntilItsBlockIsNeeded) {
  BlockPool pool(3, 3);
  const Blocks blocks = take(pool, 2);
  pool.publish(blocks[0], {1, 1});
  pool.publish(blocks[1], {2, 2});
  pool.free(blocks);
  EXPECT_EQ(pool.available(), 3U);
  take(pool, 1);  // the one that has no prefix
  EXPECT_EQ(pool.find({1, 1}), blocks[0]);
  EXPECT_EQ(pool.find({2, 2}), blocks[1]);
  EXPECT_EQ(take(pool, 1), Blocks{blocks[1]}) << "a sequence's last blocks go first";
  EXPECT_EQ(pool.find({2, 2}), PrefixCache::kNone);
  EXPECT_EQ(pool.find({1, 1}), blocks[0]);
}

TEST(BlockPool, AnIdleBlockIsUsedAgainWithItsPrefix) {
  BlockPool pool(1, 1);
  const Blocks block = take(pool, 1);
  pool.publish(block[0], {1, 1});
  pool.free(block);
  EXPECT_TRUE(pool.is_idle(block[0]));
  pool.share(block[0]);
  EXPECT_EQ(pool.available(), 0U);
  EXPECT_THROW(pool.allocate(), std::logic_error);
  pool.free(block);
  EXPECT_EQ(pool.find({1, 1}), block[0]);
}

TEST(BlockPool, KeepsNoMorePrefixesThanItIsTo) {
  BlockPool pool(8, 2);
  const Blocks blocks = take(pool, 4);
  for (const std::int32_t block : blocks) pool.publish(block, {static_cast<std::uint64_t>(block), 0});
  for (const std::int32_t block : blocks) pool.free(Blocks{block});
  EXPECT_EQ(pool.idle(), 2U);
  EXPECT_EQ(pool.find({static_cast<std::uint64_t>(blocks[1]), 0}), PrefixCache::kNone);
  EXPECT_EQ(pool.find({static_cast<std::uint64_t>(blocks[3]), 0}), blocks[3]);
  EXPECT_EQ(pool.available(), 8U);
}

TEST(BlockPool, WhatIsRetractedIsFoundNoMore) {
  BlockPool pool(2, 2);
  const Blocks block = take(pool, 1);
  pool.publish(block[0], {1, 1});
  pool.retract(block[0]);
  EXPECT_EQ(pool.find({1, 1}), PrefixCache::kNone);
  pool.free(block);
  EXPECT_EQ(pool.idle(), 0U);
  EXPECT_EQ(pool.available(), 2U);
}

}  // namespace
}  // namespace rts
