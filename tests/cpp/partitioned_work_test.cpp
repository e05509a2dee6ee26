#include "cpu/partitioned_work.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "cpu/thread_pool.hpp"

namespace rts::cpu {
namespace {

// Each item is taken once, by its owner or by who was done sooner.
TEST(PartitionedWork, EveryItemIsTakenOnce) {
  for (const std::size_t threads : {1, 2, 5}) {
    for (const std::size_t items : {0, 1, 4, 37}) {
      PartitionedWork work(threads);
      std::vector<std::atomic<int>> taken(items);
      for (int round = 1; round <= 20; ++round) {
        work.reset();
        ThreadPool pool(threads);
        pool.run([&](std::size_t thread) {
          work.share(thread, items, 3, [&](std::size_t begin, std::size_t end, std::size_t range_end) {
            EXPECT_LE(end, range_end);
            for (std::size_t i = begin; i < end; ++i) taken[i].fetch_add(1);
          });
        });
        for (const auto& count : taken) ASSERT_EQ(count.load(), round);
      }
    }
  }
}

// Whoever is alone takes all of it, its own first and in order.
TEST(PartitionedWork, AnothersItemsAreTakenWhenOnesOwnAreDone) {
  PartitionedWork work(3);
  std::vector<std::size_t> order;
  work.share(1, 9, 2, [&](std::size_t begin, std::size_t end, std::size_t) {
    for (std::size_t i = begin; i < end; ++i) order.push_back(i);
  });
  EXPECT_EQ(order, (std::vector<std::size_t>{3, 4, 5, 6, 7, 8, 0, 1, 2}));
}

}  // namespace
}  // namespace rts::cpu
