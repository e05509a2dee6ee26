#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "rts/ageing_heap.hpp"
#include "rts/atomics.hpp"
#include "rts/cache_line.hpp"
#include "rts/request.hpp"
#include "rts/spsc_ring.hpp"

namespace rts {

// One producer's way into a priority queue: a ring for each priority. A producer that dies, at whatever instruction,
// leaves its own lanes readable up to what it had published, and no other producer's is touched.
//
// The object holds both sides' handles, on cache lines of their own. Where the sides are two processes, each has an
// object over the same memory and uses one half of it. All that the sides share are the rings: the memory orders are
// spsc_ring.hpp's (1) to (4).
template <class Atomics = StdAtomics>
class LaneSet {
 public:
  using Ring = SpscRing<Atomics>;

  static constexpr std::size_t bytes_needed(std::uint32_t lane_bytes) { return kPriorities * lane_stride(lane_bytes); }

  LaneSet() = default;
  // Over the caller's memory, aligned to a cache line, in which lanes were made; zeroed memory holds empty ones. Throws
  // std::invalid_argument for a size that is no ring's.
  LaneSet(std::byte* memory, std::uint32_t lane_bytes) {
    for (std::size_t lane = 0; lane < kPriorities; ++lane) {
      const Ring ring(memory + lane * lane_stride(lane_bytes), SpscRingShape{.bytes = lane_bytes});
      producers_[lane] = ring.producer();
      consumers_[lane] = ring.consumer();
    }
  }

  // In memory of its own, for a producer that is a thread of this process.
  static LaneSet allocate(std::uint32_t lane_bytes) {
    std::unique_ptr<std::byte[], AlignedDelete> memory(
        static_cast<std::byte*>(::operator new(bytes_needed(lane_bytes), std::align_val_t{kCacheLine})));
    for (std::size_t lane = 0; lane < kPriorities; ++lane) {
      Ring(memory.get() + lane * lane_stride(lane_bytes), SpscRingShape{.bytes = lane_bytes}).clear();
    }
    LaneSet lanes(memory.get(), lane_bytes);
    lanes.memory_ = std::move(memory);
    return lanes;
  }

  // The producer's side. Wait-free, for one thread at a time. False: the lane is full, or the record too large for it.
  template <class... Parts>
  bool push(Priority priority, const Parts&... parts) noexcept {
    return lane(priority).push(parts...);
  }
  // For a record that is written in place.
  typename Ring::Producer& lane(Priority priority) noexcept { return producers_[static_cast<std::size_t>(priority)]; }

  // The consumer's side. Wait-free, for one thread at a time.
  typename Ring::Consumer& reader(Priority priority) noexcept { return consumers_[static_cast<std::size_t>(priority)]; }
  bool empty() const noexcept {
    return std::ranges::all_of(consumers_, [](const auto& consumer) { return consumer.empty(); });
  }
  // The producer has written what cannot be: a lane, at least, is dead.
  bool corrupt() const noexcept {
    return std::ranges::any_of(consumers_, [](const auto& consumer) { return consumer.corrupt(); });
  }

 private:
  struct AlignedDelete {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kCacheLine}); }
  };

  static constexpr std::size_t lane_stride(std::uint32_t lane_bytes) {
    return align_up(Ring::bytes_needed({.bytes = lane_bytes}), kCacheLine);
  }

  std::unique_ptr<std::byte[], AlignedDelete> memory_;  // none where it is the caller's
  alignas(kCacheLine) std::array<typename Ring::Producer, kPriorities> producers_;
  alignas(kCacheLine) std::array<typename Ring::Consumer, kPriorities> consumers_;
};

// A bounded priority queue from many producers, each with lanes of its own, to one consumer, which takes what the lanes
// hold into its private heap and decides the order there. Producers are wait-free and use their LaneSet only; all that
// this class has is the consumer's, for one thread, without synchronisation but in the lanes.
template <class T, class Atomics = StdAtomics>
class PriorityQueue {
 public:
  using Lanes = LaneSet<Atomics>;
  using Handle = typename AgeingHeap<T>::Handle;

  PriorityQueue(std::size_t capacity, std::int64_t ageing_ns, std::size_t returns = 0)
      : heap_(capacity, ageing_ns, returns) {}

  // `lanes` stays where it is until it is detached.
  void attach(Lanes& lanes) { attached_.push_back(&lanes); }
  // What was drained from them stays in the queue.
  void detach(Lanes& lanes) { std::erase(attached_, &lanes); }

  // Takes in what the lanes hold, all attached producers' or one's, until they are empty or the queue is full; the rest
  // stays in the lanes, where the highest priority goes first and nothing ages: so give the queue the capacity for all
  // that its producers may have under way. How many records were taken.
  //
  // `parse` takes a record's bytes and returns an optional std::pair{Ticket, T}, or std::tuple{Ticket, T, Handle*} to
  // get the handle; none: the record is dropped. The lane decides the priority, whatever the ticket says.
  //
  // Wait-free apart from `parse`: at most what the lanes can hold at once.
  template <class Parse>
  std::size_t drain(Parse&& parse) {
    return drain(std::span(attached_), parse);
  }
  template <class Parse>
  std::size_t drain(Lanes& lanes, Parse&& parse) {
    Lanes* const one = &lanes;
    return drain(std::span(&one, 1), parse);
  }

  const T* peek(std::int64_t now_ns) const { return heap_.peek(now_ns); }
  std::optional<T> pop(std::int64_t now_ns) { return heap_.pop(now_ns); }
  bool remove(Handle handle) { return heap_.remove(handle); }

  // Of what was drained.
  bool empty() const { return heap_.empty(); }
  bool full() const { return heap_.full(); }
  std::size_t size() const { return heap_.size(); }
  std::size_t size(Priority priority) const { return heap_.size(priority); }

  AgeingHeap<T>& heap() { return heap_; }

 private:
  template <class Parse>
  std::size_t drain(std::span<Lanes* const> producers, Parse& parse) {
    std::size_t taken = 0;
    for (const Priority priority : {Priority::kHigh, Priority::kNormal, Priority::kLow}) {
      for (Lanes* const lanes : producers) taken += drain_lane(lanes->reader(priority), priority, parse);
    }
    return taken;
  }

  template <class Parse>
  std::size_t drain_lane(typename Lanes::Ring::Consumer& lane, Priority priority, Parse& parse) {
    std::size_t taken = 0;
    while (!heap_.full()) {
      const std::span<const std::byte> record = lane.front();
      if (record.empty()) break;
      lane.pop();  // first, so that a record whose parsing throws is not met again; it is readable until release()
      ++taken;
      if (auto entry = parse(record)) {
        std::get<0>(*entry).priority = priority;
        std::apply([this](auto&&... arguments) { heap_.push(std::move(arguments)...); }, std::move(*entry));
      }
    }
    lane.release();
    return taken;
  }

  AgeingHeap<T> heap_;
  std::vector<Lanes*> attached_;
};

}  // namespace rts
