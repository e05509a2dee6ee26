#include "cpu/thread_pool.hpp"

#include <gtest/gtest.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace rts::cpu {
namespace {

using namespace std::chrono_literals;

std::chrono::nanoseconds cpu_time(clockid_t clock) {
  timespec time{};
  EXPECT_EQ(::clock_gettime(clock, &time), 0);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

class ThreadPoolOf : public testing::TestWithParam<std::size_t> {};

TEST_P(ThreadPoolOf, CallsTheWorkOnceInEachThread) {
  ThreadPool pool(GetParam());
  ASSERT_EQ(pool.threads(), GetParam());
  std::vector<int> calls(pool.threads(), 0);
  std::vector<std::thread::id> ids(pool.threads());
  for (int run = 1; run <= 2000; ++run) {
    pool.run([&](std::size_t thread) {
      ++calls.at(thread);
      ids.at(thread) = std::this_thread::get_id();
    });
    for (const int count : calls) ASSERT_EQ(count, run);
  }
  EXPECT_EQ(ids.front(), std::this_thread::get_id());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) EXPECT_NE(ids[i], ids[j]);
  }
}

TEST_P(ThreadPoolOf, ABarrierIsPassedOnlyWhenAllHaveComeAndShowsWhatTheyWrote) {
  ThreadPool pool(GetParam());
  const std::size_t threads = pool.threads();
  constexpr int kRounds = 300;
  std::vector<int> written(threads, 0);  // not atomic: the barrier orders the accesses
  std::vector<int> wrong(threads, 0);
  for (int run = 0; run < 10; ++run) {
    pool.run([&](std::size_t thread) {
      for (int round = 0; round < kRounds; ++round) {
        const int value = run * kRounds + round + 1;
        // One that is late each round, now and then for longer than the others spin.
        if (static_cast<std::size_t>(round) % threads == thread && round % 50 == 0) std::this_thread::sleep_for(200us);
        written[thread] = value;
        pool.wait_for_all();
        for (const int other : written) wrong[thread] += other != value ? 1 : 0;
        pool.wait_for_all();
      }
    });
  }
  for (const int count : wrong) EXPECT_EQ(count, 0);
}

TEST_P(ThreadPoolOf, RunsAfterPausesLongerThanItSpins) {
  ThreadPool pool(GetParam());
  std::vector<int> calls(pool.threads(), 0);
  for (int run = 0; run < 50; ++run) {
    std::this_thread::sleep_for(run % 10 * 50us);
    pool.run([&](std::size_t thread) { ++calls[thread]; });
  }
  for (const int count : calls) EXPECT_EQ(count, 50);
}

TEST_P(ThreadPoolOf, EndsWhileIdleAndRightAfterARun) {
  std::atomic<std::size_t> calls = 0;
  for (int round = 0; round < 50; ++round) {
    {
      const ThreadPool never_ran(GetParam());
    }
    ThreadPool ran(GetParam());
    ran.run([&](std::size_t) { ++calls; });
    if (round % 10 == 0) std::this_thread::sleep_for(1ms);  // its threads sleep
  }
  EXPECT_EQ(calls, 50 * GetParam());
}

// Eight are more threads than a small machine has processors.
INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolOf, testing::Values(1, 2, 3, 8), testing::PrintToStringParamName());

TEST(ThreadPool, RefusesToHaveNoThread) {
  EXPECT_THROW(ThreadPool(0), std::invalid_argument);
}

TEST(ThreadPool, TwoPoolsDoNotDisturbEachOther) {
  ThreadPool first(2), second(3);
  std::atomic<int> calls = 0;
  for (int run = 0; run < 500; ++run) {
    first.run([&](std::size_t) { ++calls; });
    second.run([&](std::size_t) { ++calls; });
  }
  EXPECT_EQ(calls, 500 * (2 + 3));
}

TEST(ThreadPool, UsesNoProcessorWhileIdle) {
  ThreadPool pool(3);
  std::array<clockid_t, 3> clocks{};
  pool.run([&](std::size_t thread) { ::pthread_getcpuclockid(::pthread_self(), &clocks.at(thread)); });
  std::this_thread::sleep_for(50ms);
  const auto before = cpu_time(clocks[1]) + cpu_time(clocks[2]);
  std::this_thread::sleep_for(300ms);
  EXPECT_LT(cpu_time(clocks[1]) + cpu_time(clocks[2]) - before, 30ms);
}

TEST(ThreadPool, ALateThreadDoesNotMakeTheOthersSpin) {
  ThreadPool pool(2);
  std::chrono::nanoseconds spent = 0ns;
  pool.run([&](std::size_t thread) {
    if (thread == 1) std::this_thread::sleep_for(300ms);
    const auto before = cpu_time(CLOCK_THREAD_CPUTIME_ID);
    pool.wait_for_all();
    if (thread == 0) spent = cpu_time(CLOCK_THREAD_CPUTIME_ID) - before;
  });
  EXPECT_LT(spent, 30ms);
}

// Where the thread that is awaited wants the very processor on which another waits for it, it gets it.
TEST(ThreadPool, WhoWaitsGivesWay) {
  cpu_set_t before, one;
  ASSERT_EQ(::sched_getaffinity(0, sizeof before, &before), 0);
  CPU_ZERO(&one);
  for (int cpu = 0; CPU_COUNT(&one) == 0; ++cpu) {
    if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &one);
  }
  ASSERT_EQ(::sched_setaffinity(0, sizeof one, &one), 0);
  ThreadPool pool(2);  // its threads inherit the processor
  constexpr int kWaits = 200;
  std::chrono::nanoseconds waited = 0ns;
  pool.run([&](std::size_t thread) {
    const auto begin = cpu_time(CLOCK_THREAD_CPUTIME_ID);
    for (int wait = 0; wait < kWaits; ++wait) {
      const auto end = cpu_time(CLOCK_THREAD_CPUTIME_ID) + 300us;
      while (thread == 1 && cpu_time(CLOCK_THREAD_CPUTIME_ID) < end) continue;
      pool.wait_for_all();
    }
    if (thread == 0) waited = cpu_time(CLOCK_THREAD_CPUTIME_ID) - begin;
  });
  ::sched_setaffinity(0, sizeof before, &before);
  EXPECT_LT(waited, kWaits * 100us);
}

TEST(ThreadPool, ItsThreadsHaveNamesAndTakeNoSignals) {
  sigset_t before, after;
  ::pthread_sigmask(SIG_SETMASK, nullptr, &before);
  ThreadPool pool(3);
  ::pthread_sigmask(SIG_SETMASK, nullptr, &after);
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) {
    EXPECT_EQ(::sigismember(&before, signal), ::sigismember(&after, signal));
  }

  std::array<std::string, 3> names;
  std::array<int, 3> blocked{};
  pool.run([&](std::size_t thread) {
    std::array<char, 16> name{};
    ::pthread_getname_np(::pthread_self(), name.data(), name.size());
    names.at(thread) = name.data();
    sigset_t mask;
    ::pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    for (const int signal : {SIGINT, SIGTERM, SIGUSR1, SIGSEGV}) blocked.at(thread) += ::sigismember(&mask, signal);
  });
  EXPECT_NE(names[0].substr(0, 4), "rts-");
  EXPECT_EQ(names[1], "rts-cpu-1");
  EXPECT_EQ(names[2], "rts-cpu-2");
  EXPECT_EQ(blocked, (std::array{0, 3, 3}));
}

TEST(ThreadPoolDeathTest, WorkThatThrowsEndsTheProcess) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  EXPECT_EXIT(ThreadPool(2).run([](std::size_t thread) {
    if (thread == 1) throw std::runtime_error("thrown by the work");
  }),
              testing::KilledBySignal(SIGABRT), "");
}

// Sanitizers reserve more addresses than the limit leaves.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
TEST(ThreadPoolDeathTest, ThreadsThatCannotAllBeStartedAreEnded) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  const auto start_too_many = [] {
    ::alarm(60);  // where the started ones are waited for in vain
    std::size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlimit limit{pages * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)) + (64U << 20U), RLIM_INFINITY};
    ::setrlimit(RLIMIT_AS, &limit);  // room for some stacks
    try {
      const ThreadPool pool(1000);
      std::_Exit(1);
    } catch (const std::system_error&) {
      ThreadPool small(2);
      small.run([](std::size_t) {});
      std::_Exit(0);
    }
  };
  EXPECT_EXIT(start_too_many(), testing::ExitedWithCode(0), "");
}
#endif

}  // namespace
}  // namespace rts::cpu
