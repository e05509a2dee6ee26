#include "rts/prefix_cache.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <random>
#include <utility>
#include <vector>

namespace rts {
namespace {

constexpr auto kNone = PrefixCache::kNone;

TEST(PrefixCache, FindsWhatWasInsertedUntilItIsErased) {
  PrefixCache cache(4);
  EXPECT_EQ(cache.find({1, 2}), kNone);
  EXPECT_TRUE(cache.insert({1, 2}, 3));
  EXPECT_TRUE(cache.knows(3));
  EXPECT_EQ(cache.find({1, 2}), 3);
  EXPECT_EQ(cache.find({1, 3}), kNone) << "half of a hash is no hash";
  EXPECT_EQ(cache.find({2, 2}), kNone);
  cache.erase(3);
  EXPECT_FALSE(cache.knows(3));
  EXPECT_EQ(cache.find({1, 2}), kNone);
}

TEST(PrefixCache, TheFirstBlockWithAPrefixKeepsIt) {
  PrefixCache cache(4);
  EXPECT_TRUE(cache.insert({1, 1}, 0));
  EXPECT_FALSE(cache.insert({1, 1}, 1));
  EXPECT_FALSE(cache.knows(1));
  EXPECT_EQ(cache.find({1, 1}), 0);
}

TEST(PrefixCache, GivesUpTheOneThatHasBeenIdleForLongest) {
  PrefixCache cache(4);
  for (std::int32_t block = 0; block < 4; ++block) {
    cache.insert({static_cast<std::uint64_t>(block), 0}, block);
    cache.set_idle(block);
  }
  cache.set_used(1);
  cache.set_used(0);
  cache.set_idle(0);  // used since: the newest now
  EXPECT_EQ(cache.idle(), 3U);
  EXPECT_EQ(cache.evict(), 2);
  EXPECT_EQ(cache.find({2, 0}), kNone);
  EXPECT_EQ(cache.evict(), 3);
  EXPECT_EQ(cache.evict(), 0);
  EXPECT_EQ(cache.evict(), kNone);
  EXPECT_EQ(cache.find({1, 0}), 1);
}

// Beside a map and a list. Few values of `low`, so that entries push one another along.
TEST(PrefixCache, IsAMapAndAQueueUnderRandomUse) {
  std::mt19937_64 random(20240229);
  constexpr std::int32_t kBlocks = 40;
  PrefixCache cache(kBlocks);
  std::map<std::pair<std::uint64_t, std::uint64_t>, std::int32_t> map;
  std::vector<std::optional<Hash128>> prefix_of(kBlocks);
  std::list<std::int32_t> idle;
  for (int i = 0; i < 200'000; ++i) {
    const Hash128 prefix{random() % 6 + 124, random() % 12};  // also around the end of the table
    const auto block = static_cast<std::int32_t>(random() % kBlocks);
    auto& known = prefix_of[static_cast<std::size_t>(block)];
    const bool is_idle = std::find(idle.begin(), idle.end(), block) != idle.end();
    switch (random() % 5) {
      case 0:
        if (known) break;
        if (cache.insert(prefix, block)) {
          ASSERT_FALSE(map.contains({prefix.low, prefix.high}));
          map[{prefix.low, prefix.high}] = block;
          known = prefix;
        } else {
          ASSERT_TRUE(map.contains({prefix.low, prefix.high}));
        }
        break;
      case 1:
        if (is_idle || !known) break;
        cache.erase(block);
        map.erase({known->low, known->high});
        known.reset();
        break;
      case 2:
        if (is_idle || !known) break;
        cache.set_idle(block);
        idle.push_back(block);
        break;
      case 3:
        if (!is_idle) break;
        cache.set_used(block);
        idle.remove(block);
        break;
      default:
        if (random() % 4 != 0) break;
        const std::int32_t evicted = cache.evict();
        ASSERT_EQ(evicted, idle.empty() ? kNone : idle.front());
        if (idle.empty()) break;
        idle.pop_front();
        auto& gone = prefix_of[static_cast<std::size_t>(evicted)];
        map.erase({gone->low, gone->high});
        gone.reset();
    }
    const auto at = map.find({prefix.low, prefix.high});
    ASSERT_EQ(cache.find(prefix), at == map.end() ? kNone : at->second);
    ASSERT_EQ(cache.idle(), idle.size());
    ASSERT_EQ(cache.knows(block), prefix_of[static_cast<std::size_t>(block)].has_value());
  }
  for (const auto& [prefix, block] : map) ASSERT_EQ(cache.find({prefix.first, prefix.second}), block);
}

}  // namespace
}  // namespace rts
