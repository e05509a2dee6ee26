#include "rts/null_model.hpp"

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <stdexcept>
#include <utility>

namespace rts {

NullModel::NullModel(std::int32_t first_token, std::int32_t tokens, std::int64_t step_ns, const Clock& clock,
                     SleepUntil sleep)
    : first_token_(first_token), tokens_(tokens), step_ns_(step_ns), clock_(clock), sleep_(std::move(sleep)) {
  if (tokens < 1) throw std::invalid_argument("the null model needs at least one token to say");
}

void NullModel::step(const NativeStep& step) {
  if (step_ns_ > 0) {
    due_ns_ = std::max(due_ns_ + step_ns_, clock_.now_ns());
    sleep_(due_ns_);
  }
  for (std::size_t i = 0; i < step.sampled.size(); ++i) {
    step.sampled[i] = first_token_ + step.batch.positions[step.batch.logits_at[i]] % tokens_;
  }
  std::ranges::fill(step.logprobs, 0.0F);
}

void NullModel::sleep_until(std::int64_t due_ns) noexcept {
  constexpr std::int64_t kSecond = 1'000'000'000;
  const timespec due{due_ns / kSecond, due_ns % kSecond};
  while (::clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, nullptr) == EINTR) {
  }
}

}  // namespace rts
