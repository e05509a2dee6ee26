#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "rts/cache_line.hpp"

namespace rts::cpu {

// Threads that run one function side by side, for steps of a millisecond or so within which they meet a hundred times.
// Whoever waits spins for a bounded time, giving way to who else wants the processor, then sleeps on a futex: an idle
// pool costs nothing. The caller is one of the threads.
//
// All waiting is at one barrier. Workers wait there for work, run() meets them before the work and after it, and
// wait_for_all() is a meeting like these. Every thread comes to each, so the count of arrivals alone tells which one is
// under way, and nothing is ever reset.
class ThreadPool {
 public:
  // `threads` with the caller. Throws std::invalid_argument where that is none, and std::system_error where a thread
  // cannot be started.
  explicit ThreadPool(std::size_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  std::size_t threads() const noexcept { return threads_; }

  // Calls work(0) here and work(1) to work(threads - 1) in the others, and returns when all have returned. By one
  // thread at a time, and not from within `work`. What `work` throws is std::terminate. Blocks.
  void run(const std::function<void(std::size_t thread)>& work) noexcept;

  // Within run(), by every thread equally often: nobody returns before all have come. Memory written before is seen
  // after. 0.1 µs where both of two threads come at once. Blocks.
  void wait_for_all() noexcept;

 private:
  void serve(std::size_t thread) noexcept;
  void wait_for_work() noexcept;
  std::uint64_t arrive() noexcept;
  bool have_come(std::uint64_t arrivals) const noexcept;
  void wait(std::uint64_t arrivals) noexcept;
  void sleep(std::uint64_t arrivals) noexcept;
  void stop() noexcept;

  const std::size_t threads_;
  std::vector<std::thread> workers_;

  // The arrivals since the start, times two, and whether somebody sleeps. The work lies beside it, fetched together.
  alignas(kCacheLine) std::atomic<std::uint64_t> arrivals_{0};
  const std::function<void(std::size_t thread)>* work_ = nullptr;  // none: workers end
};

}  // namespace rts::cpu
