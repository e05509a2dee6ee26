#pragma once

#include <chrono>
#include <cstdint>

namespace rts {

// Where every component takes its time from, so that tests can run it under a simulated one.
class Clock {
 public:
  virtual ~Clock() = default;
  // Nanoseconds of a clock that never goes back and is the same in every process of the machine.
  virtual std::int64_t now_ns() const noexcept = 0;
};

class SteadyClock final : public Clock {
 public:
  // std::chrono::steady_clock is CLOCK_MONOTONIC on Linux: one origin for the front end and all workers.
  std::int64_t now_ns() const noexcept override {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
};

class ManualClock final : public Clock {
 public:
  explicit ManualClock(std::int64_t start_ns = 0) : now_(start_ns) {}
  std::int64_t now_ns() const noexcept override { return now_; }
  void advance(std::int64_t ns) { now_ += ns; }

 private:
  std::int64_t now_;
};

}  // namespace rts
