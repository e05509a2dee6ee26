#include "rts/block_pool.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace rts {
namespace {

TEST(BlockPool, StartsWithEveryBlockFree) {
  const BlockPool pool(7);
  EXPECT_EQ(pool.size(), 7U);
  EXPECT_EQ(pool.in_use(), 0U);
  EXPECT_EQ(pool.reserved(), 0U);
}

TEST(BlockPool, PromisesWhatIsLeftAndNoMore) {
  BlockPool pool(5);
  EXPECT_TRUE(pool.reserve(3));
  EXPECT_FALSE(pool.reserve(3));
  EXPECT_EQ(pool.reserved(), 3U);
  EXPECT_TRUE(pool.reserve(2));
  EXPECT_FALSE(pool.reserve(1));
  EXPECT_TRUE(pool.reserve(0));
  pool.allocate_reserved();
  EXPECT_FALSE(pool.reserve(1)) << "a block in use is not free for another promise";
  pool.unreserve(4);
  EXPECT_TRUE(pool.reserve(4));
  EXPECT_FALSE(pool.reserve(0xFFFFFFFF));
}

TEST(BlockPool, AllocatesEachBlockOnce) {
  BlockPool pool(4);
  ASSERT_TRUE(pool.reserve(4));
  std::set<std::int32_t> blocks;
  for (int i = 0; i < 4; ++i) blocks.insert(pool.allocate_reserved());
  EXPECT_EQ(blocks, (std::set<std::int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(pool.in_use(), 4U);
  EXPECT_EQ(pool.reserved(), 0U);
}

TEST(BlockPool, GivesTheBlockThatWasFreedLast) {
  BlockPool pool(4);
  ASSERT_TRUE(pool.reserve(4));
  const std::int32_t first = pool.allocate_reserved(), second = pool.allocate_reserved();
  pool.free(std::vector{second});
  pool.free(std::vector{first});
  EXPECT_EQ(pool.allocate_reserved(), first);
  EXPECT_EQ(pool.allocate_reserved(), second);
}

TEST(BlockPool, RefusesWhatWasNotPromised) {
  BlockPool pool(4);
  EXPECT_THROW(pool.allocate_reserved(), std::logic_error);
  ASSERT_TRUE(pool.reserve(2));
  EXPECT_THROW(pool.unreserve(3), std::logic_error);
  EXPECT_EQ(pool.reserved(), 2U);
}

TEST(BlockPool, RefusesABlockThatIsNotInUse) {
  BlockPool pool(4);
  ASSERT_TRUE(pool.reserve(1));
  const std::int32_t block = pool.allocate_reserved();
  EXPECT_THROW(pool.free(std::vector{block, block}), std::logic_error);
  EXPECT_EQ(pool.in_use(), 0U);
  EXPECT_THROW(pool.free(std::vector{4}), std::logic_error);
  EXPECT_THROW(pool.free(std::vector{-1}), std::logic_error);
}

TEST(BlockPool, AccountsForEveryBlockWhateverTheOrder) {
  const std::uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  BlockPool pool(37);
  std::vector<std::int32_t> held;
  std::uint32_t promised = 0;
  for (int step = 0; step < 20000; ++step) {
    switch (random() % 4) {
      case 0: {
        const auto blocks = static_cast<std::uint32_t>(random() % 8);
        const bool fits = blocks + promised + held.size() <= 37;
        ASSERT_EQ(pool.reserve(blocks), fits);
        if (fits) promised += blocks;
        break;
      }
      case 1:
        if (promised > 0) {
          held.push_back(pool.allocate_reserved());
          --promised;
        }
        break;
      case 2:
        if (promised > 0) {
          pool.unreserve(1);
          --promised;
        }
        break;
      default:
        if (!held.empty()) {
          std::swap(held[random() % held.size()], held.back());
          pool.free(std::span(&held.back(), 1));
          held.pop_back();
        }
    }
    ASSERT_EQ(pool.in_use(), held.size());
    ASSERT_EQ(pool.reserved(), promised);
    ASSERT_EQ(std::set(held.begin(), held.end()).size(), held.size());
  }
}

}  // namespace
}  // namespace rts
