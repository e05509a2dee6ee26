#pragma once

#include <gtest/gtest.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "hooked_atomics.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// A deterministic scheduler for code whose atomics are a template parameter. "Threads" are fibers of one OS thread; who
// goes on is decided before and after each atomic operation, by a schedule that can be enumerated, drawn from a seed
// and printed. It checks the algorithm under sequential consistency; memory orders are ThreadSanitizer's business.
namespace rts::test {

// A sequence of decisions, each among some number of options. 0 means: the one that runs goes on.
class Schedule {
 public:
  virtual ~Schedule() = default;
  virtual std::size_t choose(std::size_t options) = 0;

  std::string to_string() const {
    std::string text;
    for (const Decision& decision : made_) text += std::to_string(decision.taken);
    return text;
  }

 protected:
  struct Decision {
    std::size_t taken;
    std::size_t options;
  };
  std::vector<Decision> made_;
};

// All schedules, depth first.
class ExhaustiveSchedule final : public Schedule {
 public:
  std::size_t choose(std::size_t options) override {
    if (depth_ == made_.size()) made_.push_back({0, options});
    return made_[depth_++].taken;
  }
  // False: there is no further one.
  bool next() {
    depth_ = 0;
    while (!made_.empty() && made_.back().taken + 1 == made_.back().options) made_.pop_back();
    if (made_.empty()) return false;
    ++made_.back().taken;
    return true;
  }

 private:
  std::size_t depth_ = 0;
};

class RandomSchedule final : public Schedule {
 public:
  explicit RandomSchedule(std::uint64_t seed) : random_(seed) {}
  std::size_t choose(std::size_t options) override {
    made_.push_back({random_() % options, options});
    return made_.back().taken;
  }

 private:
  std::mt19937_64 random_;
};

class Interleaver {
 public:
  Interleaver(Schedule& schedule, int max_preemptions) : schedule_(schedule), preemptions_left_(max_preemptions) {}

  void add_thread(std::function<void()> body) { fibers_.push_back(std::make_unique<Fiber>(std::move(body))); }

  // Runs the threads to their end. A test failure where all that are left wait, or where they do not come to an end.
  void run() {
    active_ = this;
    main_.enter_as_main();
    switch_away();
    active_ = nullptr;
  }

  // Where another thread may get its turn.
  static void yield() {
    if (active_ != nullptr && active_->running_ != nullptr) active_->switch_away();
  }
  // Sleeps until the condition holds.
  static void wait_until(std::function<bool()> condition) {
    Interleaver& self = *active_;
    self.running_->awaits = std::move(condition);
    self.switch_away();
    self.running_->awaits = nullptr;
  }

 private:
  static constexpr std::size_t kStackBytes = 256 << 10;
  static constexpr int kMaxSwitches = 100'000;

  // A stack to run on, with the sanitizers told of the switches.
  class Context {
   public:
    void enter_as_main() {
#if defined(__SANITIZE_THREAD__)
      tsan_ = __tsan_get_current_fiber();
#endif
    }
    void prepare(void (*entry)()) {
      stack_ = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
      ::getcontext(&context_);
      context_.uc_stack.ss_sp = stack_.get();
      context_.uc_stack.ss_size = kStackBytes;
      ::makecontext(&context_, entry, 0);
#if defined(__SANITIZE_THREAD__)
      tsan_ = __tsan_create_fiber(0);
#endif
    }
    void switch_to(Context& other) {
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_start_switch_fiber(&asan_, other.bottom_, other.stack_bytes_);
#elif defined(__SANITIZE_THREAD__)
      __tsan_switch_to_fiber(other.tsan_, 0);
#endif
      came_from_ = this;
      ::swapcontext(&context_, &other.context_);
      arrive();
    }
    // To be called first on each stack that is switched to.
    void arrive() {
#if defined(__SANITIZE_ADDRESS__)
      // Tells where the stack lies that was left: the only way to learn of the main one.
      __sanitizer_finish_switch_fiber(asan_, &came_from_->bottom_, &came_from_->stack_bytes_);
#endif
    }
    ~Context() {
#if defined(__SANITIZE_THREAD__)
      if (stack_ != nullptr) __tsan_destroy_fiber(tsan_);
#endif
    }
    Context() = default;
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

   private:
    static inline Context* came_from_ = nullptr;

    ucontext_t context_{};
    std::unique_ptr<std::byte[]> stack_;  // none: the thread's own
#if defined(__SANITIZE_ADDRESS__)
    void* asan_ = nullptr;
    const void* bottom_ = nullptr;
    std::size_t stack_bytes_ = 0;
#elif defined(__SANITIZE_THREAD__)
    void* tsan_ = nullptr;
#endif
  };

  struct Fiber {
    explicit Fiber(std::function<void()> fn) : body(std::move(fn)) {
      if (idle_.empty()) {
        context = std::make_unique<Context>();
        context->prepare(&Interleaver::enter_fiber);
      } else {
        context = std::move(idle_.back());
        idle_.pop_back();
      }
    }
    ~Fiber() {
      if (done) idle_.push_back(std::move(context));
    }
    bool runnable() const { return !done && (!awaits || awaits()); }

    std::function<void()> body;
    std::function<bool()> awaits;
    bool done = false;
    std::unique_ptr<Context> context;
  };

  // One fiber after the other: a new stack costs ThreadSanitizer a millisecond.
  static void enter_fiber() {
    active_->running_->context->arrive();
    while (true) {
      Interleaver& self = *active_;
      self.running_->body();
      self.running_->done = true;
      self.switch_away();
    }
  }

  void switch_away() {
    Fiber* const from = running_;
    Fiber* const to = choose(from);
    if (to == from) return;
    running_ = to;
    (from == nullptr ? main_ : *from->context).switch_to(to == nullptr ? main_ : *to->context);
  }

  // None: back to run().
  Fiber* choose(Fiber* from) {
    running_ = nullptr;  // conditions look at atomics as well: that is no place to yield
    std::vector<Fiber*> options;
    const bool may_go_on = from != nullptr && from->runnable();
    if (may_go_on) options.push_back(from);
    if (!may_go_on || preemptions_left_ > 0) {
      for (const std::unique_ptr<Fiber>& fiber : fibers_) {
        if (fiber.get() != from && fiber->runnable()) options.push_back(fiber.get());
      }
    }
    running_ = from;
    if (options.empty()) {
      const auto done = [](const std::unique_ptr<Fiber>& fiber) { return fiber->done; };
      EXPECT_TRUE(std::ranges::all_of(fibers_, done)) << "deadlock: all threads that are left wait";
      return nullptr;
    }
    if (++switches_ > kMaxSwitches) {
      ADD_FAILURE() << "livelock: the threads do not come to an end";
      return nullptr;
    }
    Fiber* const to = options[options.size() == 1 ? 0 : schedule_.choose(options.size())];
    if (may_go_on && to != from) --preemptions_left_;
    return to;
  }

  static inline Interleaver* active_ = nullptr;
  static inline std::vector<std::unique_ptr<Context>> idle_;  // whose fibers have ended

  Schedule& schedule_;
  int preemptions_left_;
  int switches_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* running_ = nullptr;
  Context main_;
};

struct YieldAround {
  YieldAround() { Interleaver::yield(); }
  ~YieldAround() { Interleaver::yield(); }
};
using InterleavedAtomics = HookedAtomics<YieldAround>;

using Scenario = std::function<void(Interleaver&)>;

// Runs the scenario under every schedule with at most so many preemptions (switches away from a thread that could go
// on), up to the first that fails; how many there were. Nearly all known concurrency bugs show with two.
inline std::size_t explore_all(int max_preemptions, const Scenario& scenario) {
  ExhaustiveSchedule schedule;
  std::size_t schedules = 0;
  do {
    Interleaver threads(schedule, max_preemptions);
    scenario(threads);
    ++schedules;
    if (testing::Test::HasFailure()) {
      ADD_FAILURE() << "under the schedule " << schedule.to_string();
      break;
    }
  } while (schedule.next());
  return schedules;
}

// Runs the scenario under schedules drawn from the seeds from 1 on, with any number of preemptions.
inline void explore_randomly(std::uint64_t schedules, const Scenario& scenario) {
  for (std::uint64_t seed = 1; seed <= schedules && !testing::Test::HasFailure(); ++seed) {
    RandomSchedule schedule(seed);
    Interleaver threads(schedule, std::numeric_limits<int>::max());
    scenario(threads);
    if (testing::Test::HasFailure()) ADD_FAILURE() << "under the schedule of seed " << seed;
  }
}

}  // namespace rts::test
