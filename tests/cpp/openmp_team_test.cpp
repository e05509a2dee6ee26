#include "cpu/openmp_team.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <set>
#include <thread>
#include <vector>

#include "openmp_runtime.hpp"

namespace rts::cpu {
namespace {

// Of this executable's tests the first, as none unloads a runtime.
TEST(OpenMpTeamTest, IsTheCallerAloneWhereThereIsNoRuntime) {
  const OpenMpTeam team(4);
  EXPECT_EQ(team.threads(), 1U);
  std::vector<std::thread::id> calls;
  team.run([&](std::size_t thread) {
    EXPECT_EQ(thread, 0U);
    calls.push_back(std::this_thread::get_id());
  });
  EXPECT_EQ(calls, std::vector{std::this_thread::get_id()});
}

TEST(OpenMpTeamTest, EachThreadHasANumberOfItsOwn) {
  if (!load_openmp_runtime()) GTEST_SKIP() << "no OpenMP runtime";
  const OpenMpTeam team(3);
  ASSERT_EQ(team.threads(), 3U);
  for (int run = 0; run < 500; ++run) {
    std::vector<std::thread::id> ids(team.threads());
    std::atomic<std::size_t> calls{0};
    team.run([&](std::size_t thread) {
      ids.at(thread) = std::this_thread::get_id();
      ++calls;
    });
    ASSERT_EQ(calls, 3U);
    ASSERT_EQ(std::set(ids.begin(), ids.end()).size(), 3U);
    ASSERT_TRUE(std::set(ids.begin(), ids.end()).contains(std::this_thread::get_id()));
  }
}

TEST(OpenMpTeamTest, OfOneThreadNeedsNoRuntime) {
  load_openmp_runtime();
  const OpenMpTeam team(1);
  EXPECT_EQ(team.threads(), 1U);
  int calls = 0;
  team.run([&](std::size_t) { ++calls; });
  EXPECT_EQ(calls, 1);
}

}  // namespace
}  // namespace rts::cpu
