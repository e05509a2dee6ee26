#include "rts/scheduling_slice.hpp"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <thread>

namespace rts {
namespace {

// The calling thread's, as sched_getattr(2) has them.
struct Attributes {
  std::uint32_t size = 0, policy = 0;
  std::uint64_t flags = 0;
  std::int32_t nice = 0;
  std::uint32_t priority = 0;
  std::uint64_t runtime = 0, deadline = 0, period = 0;

  static Attributes of_this_thread() {
    Attributes own;
    EXPECT_EQ(::syscall(SYS_sched_getattr, 0, &own, sizeof own, 0), 0);
    return own;
  }
};

bool kernel_knows_slices() {
  utsname system{};
  int major = 0, minor = 0;
  ::uname(&system);
  return std::sscanf(system.release, "%d.%d", &major, &minor) == 2 && (major > 6 || (major == 6 && minor >= 12));
}

TEST(SchedulingSlice, IsLongForTheThreadAndThoseItStarts) {
  std::thread([] {
    const std::uint64_t before = Attributes::of_this_thread().runtime;
    ask_for_long_slices();
    const std::uint64_t expected = kernel_knows_slices() ? 50'000'000 : before;
    EXPECT_EQ(Attributes::of_this_thread().runtime, expected);
    std::thread([=] { EXPECT_EQ(Attributes::of_this_thread().runtime, expected); }).join();
  }).join();
}

TEST(SchedulingSlice, LeavesPriorityAndPolicyAsTheyAre) {
  std::thread([] {
    ASSERT_EQ(::setpriority(PRIO_PROCESS, 0, 5), 0);
    ask_for_long_slices();
    EXPECT_EQ(Attributes::of_this_thread().nice, 5);
    EXPECT_EQ(Attributes::of_this_thread().policy, std::uint32_t{SCHED_OTHER});
  }).join();
  std::thread([] {
    const sched_param none{};
    ASSERT_EQ(::sched_setscheduler(0, SCHED_IDLE, &none), 0);
    ask_for_long_slices();
    EXPECT_EQ(Attributes::of_this_thread().policy, std::uint32_t{SCHED_IDLE});
  }).join();
}

}  // namespace
}  // namespace rts
