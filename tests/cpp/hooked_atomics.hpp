#pragma once

#include <atomic>

namespace rts::test {

// Atomics for the shared structures' template parameter: a `Hook` object lives around each operation, so its
// constructor runs before and its destructor after it.
template <class Hook>
struct HookedAtomics {
  template <class T>
  class atomic {
   public:
    static constexpr bool is_always_lock_free = std::atomic<T>::is_always_lock_free;

    atomic() = default;
    atomic(T value) : value_(value) {}

    T load(std::memory_order order) const {
      const Hook hook;
      return value_.load(order);
    }
    void store(T value, std::memory_order order) {
      const Hook hook;
      value_.store(value, order);
    }
    T exchange(T value, std::memory_order order) {
      const Hook hook;
      return value_.exchange(value, order);
    }

   private:
    std::atomic<T> value_{};
  };
};

}  // namespace rts::test
