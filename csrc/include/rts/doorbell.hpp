#pragma once

#include <atomic>
#include <cstdint>

#include "rts/atomics.hpp"
#include "rts/cache_line.hpp"

namespace rts {

// The part of a doorbell that lies in shared memory. Zeroed memory is one that is not armed.
template <class Atomics>
struct BasicDoorbellFlag {
  alignas(kCacheLine) typename Atomics::template atomic<std::uint32_t> waiting{0};
};

namespace eventfd {
void signal(int fd) noexcept;
void drain(int fd) noexcept;
bool wait(int fd, int timeout_ms) noexcept;
}  // namespace eventfd

// Wakes a consumer that sleeps on an eventfd, with a system call only where it does sleep, and one however many ring.
//
//   consumer: arm(), look at its queues once more, sleep if they are empty, consume()
//   producer: publish, then ring()
//
// Several flags may share an eventfd: a consumer of several channels arms each and sleeps once. A producer that can die
// needs a flag of its own, for it may die between taking the flag and the system call: what it published is then found
// at the next wake-up, and no one else's is lost.
//
// Every access to the flag is a read-modify-write, and these have one order. (1) ring() releases what was published
// before it; (2) arm() acquires it where ring() came first. Where arm() came first, ring() sees the flag. So no wake-up
// is lost, without a fence.
template <class Atomics>
class BasicDoorbell {
 public:
  using Flag = BasicDoorbellFlag<Atomics>;

  // `fd` is a non-blocking eventfd; neither is owned.
  BasicDoorbell(Flag* flag, int fd) noexcept : flag_(flag), fd_(fd) {}

  // Any thread. Wait-free, and a system call where the consumer sleeps or is about to.
  void ring() const noexcept {
    if (flag_->waiting.exchange(0, std::memory_order_acq_rel) != 0) eventfd::signal(fd_);  // (1)
  }

  // The rest is the consumer's. From here on ring() wakes. Wait-free.
  void arm() const noexcept { flag_->waiting.exchange(1, std::memory_order_acq_rel); }  // (2)
  // Ends what arm() began without a sleep, and without a system call: a ring in between wakes the next sleep for
  // nothing. Wait-free.
  void disarm() const noexcept { flag_->waiting.exchange(0, std::memory_order_acq_rel); }  // (2)
  // Ends a sleep: disarms and empties the eventfd, which would wake every later sleep. Wait-free but for the system
  // call.
  void consume() const noexcept {
    disarm();
    eventfd::drain(fd_);
  }
  // Sleeps until someone rings, or `timeout_ms` are over (negative: never), and consumes. False: it was not rung.
  // It may wake for nothing. Blocks.
  bool wait(int timeout_ms) const noexcept {
    const bool rung = eventfd::wait(fd_, timeout_ms);
    consume();
    return rung;
  }

 private:
  static_assert(sizeof(Flag) == kCacheLine && decltype(Flag::waiting)::is_always_lock_free);

  Flag* flag_;
  int fd_;
};

using DoorbellFlag = BasicDoorbellFlag<StdAtomics>;
using Doorbell = BasicDoorbell<StdAtomics>;

}  // namespace rts
