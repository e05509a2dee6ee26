#pragma once

#include <cstdint>
#include <functional>

#include "rts/clock.hpp"
#include "rts/native_model.hpp"

namespace rts {

// The model that costs nothing: what it says is decided by the position alone.
class NullModel final : public NativeModel {
 public:
  // Sleeps until `due_ns` of the clock.
  using SleepUntil = std::function<void(std::int64_t due_ns)>;
  // Of SteadyClock.
  static void sleep_until(std::int64_t due_ns) noexcept;

  // At position p it says `first_token + p % tokens`, with a log-probability of 0. Its steps are `step_ns` apart on
  // average; an idle time is not caught up with. 0: they are not paced. Throws std::invalid_argument where `tokens` is
  // not at least 1.
  NullModel(std::int32_t first_token, std::int32_t tokens, std::int64_t step_ns, const Clock& clock,
            SleepUntil sleep = sleep_until);

  void step(const NativeStep& step) override;

 private:
  std::int32_t first_token_;
  std::int32_t tokens_;
  std::int64_t step_ns_;
  std::int64_t due_ns_ = 0;
  const Clock& clock_;
  SleepUntil sleep_;
};

}  // namespace rts
