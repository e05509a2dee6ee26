#include "cpu/thread_pool.hpp"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <chrono>
#include <climits>
#include <stdexcept>
#include <string>

namespace rts::cpu {
namespace {

using namespace std::chrono_literals;
using Word = std::atomic<std::uint64_t>;

// In the word that threads wait on. An arrival is all above the lowest bit.
constexpr std::uint64_t kSleeping = 1;
constexpr std::uint64_t kArrival = 2;

// A waiting thread first pauses, then yields its processor between looks, then sleeps. Bounds in time and not in
// pauses, which take 10 to 140 cycles.
//
// Yielding costs 0.4 µs where no other thread wants the processor, and is the point where one does: it may be the very
// thread that is awaited. So it can go on for long, and should: a wake-up takes 5 to 60 µs where the processor has gone
// idle, and in a step with a hundred meetings one sleep makes the others late for the next.
constexpr auto kPauseTime = 5us;
constexpr auto kYieldTime = 1ms;
constexpr int kPausesPerLook = 16;  // at the time

void pause() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// A futex is 32 bits: the lower half. It cannot come round while a thread sleeps, for without that thread there are
// fewer arrivals than the pool has threads.
const std::uint32_t* futex(const Word& word) noexcept {
  static_assert(sizeof(Word) == sizeof(std::uint64_t) && Word::is_always_lock_free);
  return reinterpret_cast<const std::uint32_t*>(&word) + (std::endian::native == std::endian::big ? 1 : 0);
}

// Returns at once where the word is no longer `seen`, and now and then for nothing.
void futex_wait(const Word& word, std::uint64_t seen) noexcept {
  ::syscall(SYS_futex, futex(word), FUTEX_WAIT_PRIVATE, static_cast<std::uint32_t>(seen), nullptr, nullptr, 0);
}

void futex_wake_all(const Word& word) noexcept {
  ::syscall(SYS_futex, futex(word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Blocks signals in the threads that are started while it lives: their handlers are for the process's own threads.
// Those of a thread's own fault come to it all the same, so that a handler can say where it was.
class SignalsBlocked {
 public:
  SignalsBlocked() noexcept {
    sigset_t blocked;
    ::sigfillset(&blocked);
    for (const int fault : {SIGBUS, SIGFPE, SIGILL, SIGSEGV}) ::sigdelset(&blocked, fault);
    ::pthread_sigmask(SIG_SETMASK, &blocked, &before_);
  }
  ~SignalsBlocked() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

ThreadPool::ThreadPool(std::size_t threads) : threads_(threads) {
  if (threads == 0) throw std::invalid_argument("a thread pool needs at least one thread");
  workers_.reserve(threads - 1);
  const SignalsBlocked signals_blocked;
  try {
    for (std::size_t thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  stop();
}

// In the caller's place, and in that of workers which could not be started.
void ThreadPool::stop() noexcept {
  work_ = nullptr;
  for (std::size_t thread = workers_.size() + 1; thread <= threads_; ++thread) arrive();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(std::size_t thread)>& work) noexcept {
  work_ = &work;
  wait_for_all();
  work(0);
  wait_for_all();
}

void ThreadPool::serve(std::size_t thread) noexcept {
  constexpr std::size_t kLongestName = 15;
  ::pthread_setname_np(::pthread_self(), ("rts-cpu-" + std::to_string(thread)).substr(0, kLongestName).c_str());
  for (wait_for_work(); work_ != nullptr; wait_for_work()) {
    (*work_)(thread);
    wait_for_all();
  }
}

void ThreadPool::wait_for_work() noexcept {
  wait(arrive());
}

void ThreadPool::wait_for_all() noexcept {
  if (threads_ > 1) wait(arrive());
}

void ThreadPool::wait(std::uint64_t arrivals) noexcept {
  if (have_come(arrivals)) return;
  const auto begin = std::chrono::steady_clock::now();
  auto now = begin;
  for (; now < begin + kPauseTime; now = std::chrono::steady_clock::now()) {
    for (int i = 0; i < kPausesPerLook; ++i) {
      pause();
      if (have_come(arrivals)) return;
    }
  }
  for (; now < begin + kYieldTime; now = std::chrono::steady_clock::now()) {
    std::this_thread::yield();
    if (have_come(arrivals)) return;
  }
  sleep(arrivals);
}

// Every change of the word is a read-modify-write, so whoever reads it reads from all arrivals so far:
// (1) releases what the thread wrote before it came; (2) acquires that of all who have come.
//
// Arrivals and the sleeping bit are one word, which has one order of changes. A thread sets the bit before it sleeps,
// and the kernel lets it sleep only where nobody has come since: the last to come sees the bit, or is seen. So no
// wake-up is lost, without a fence. The last one clears the bit before it wakes. Who has come to the next meeting by
// then, and relied on the old bit, is refused sleep or is woken, and sets a new one.

// Wait-free, but for the system call where somebody sleeps. The count of arrivals that ends this meeting.
std::uint64_t ThreadPool::arrive() noexcept {
  const std::uint64_t before = arrivals_.fetch_add(kArrival, std::memory_order_acq_rel);  // (1) (2)
  const std::uint64_t arrivals = before / kArrival + 1;
  const std::uint64_t last = (arrivals + threads_ - 1) / threads_ * threads_;
  if (arrivals == last && (before & kSleeping) != 0) {
    arrivals_.fetch_and(~kSleeping, std::memory_order_relaxed);
    futex_wake_all(arrivals_);
  }
  return last;
}

bool ThreadPool::have_come(std::uint64_t arrivals) const noexcept {
  return arrivals_.load(std::memory_order_acquire) / kArrival >= arrivals;  // (2)
}

void ThreadPool::sleep(std::uint64_t arrivals) noexcept {
  while (true) {
    std::uint64_t seen = arrivals_.load(std::memory_order_acquire);  // (2)
    if (seen / kArrival >= arrivals) return;
    if ((seen & kSleeping) == 0) {
      if (!arrivals_.compare_exchange_weak(seen, seen | kSleeping, std::memory_order_relaxed)) continue;
      seen |= kSleeping;
    }
    futex_wait(arrivals_, seen);
  }
}

}  // namespace rts::cpu
