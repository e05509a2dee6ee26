#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "rts/request.hpp"

namespace rts {

// What decides an entry's turn.
struct Ticket {
  Priority priority = Priority::kNormal;
  std::int64_t arrival_ns = 0;
  std::int64_t deadline_ns = 0;  // 0: none
};

// A bounded priority queue in which nothing starves. First goes whoever has waited for ageing_ns, the oldest of them
// first; else the highest priority, within one the earliest deadline (none: last), then the earliest arrival, then who
// was pushed first. So an entry waits for ageing_ns at most and then for those that have come before it, whatever else
// comes.
//
// A binary heap of nodes by priority, and a list through the same nodes by arrival, for ageing. push, pop, peek and
// remove take O(log n), but for a push with an arrival before those of k others, which passes them first: O(k). Nothing
// is allocated after construction (by it; T may). Single-threaded.
template <class T>
class AgeingHeap {
 public:
  // Names an entry while it is in the heap, and nothing after, until its place was taken 2^32 times more. Never 0.
  using Handle = std::uint64_t;

  // Beyond the capacity there is room for `returns` that come back. Throws std::invalid_argument where both are 2^32 -
  // 1 or more together, and for a negative ageing.
  AgeingHeap(std::size_t capacity, std::int64_t ageing_ns, std::size_t returns = 0)
      : capacity_(capacity), ageing_ns_(ageing_ns) {
    if (capacity + returns >= kNone) throw std::invalid_argument("an AgeingHeap's capacity must fit 32 bits");
    if (ageing_ns < 0) throw std::invalid_argument("ageing_ns must not be negative");
    nodes_ = std::vector<Node>(capacity + returns);
    heap_.reserve(capacity + returns);
    free_.reserve(capacity + returns);
    for (auto index = static_cast<Index>(capacity + returns); index-- > 0;) free_.push_back(index);
  }
  AgeingHeap(const AgeingHeap&) = delete;
  AgeingHeap& operator=(const AgeingHeap&) = delete;

  // False: full.
  bool push(const Ticket& ticket, T value, Handle* handle = nullptr) {
    return !full() && put_back(ticket, std::move(value), handle);
  }
  // One that was popped comes back, to the place that its ticket gives it. False: more have come back than there is
  // room for.
  bool put_back(const Ticket& ticket, T value, Handle* handle = nullptr) {
    if (free_.empty()) return false;
    const Index index = free_.back();
    Node& node = nodes_[index];
    node.value.emplace(std::move(value));
    free_.pop_back();
    node.ticket = ticket;
    node.order = pushed_++;
    append_by_arrival(index);
    heap_.push_back(index);
    sift_up(heap_.size() - 1);
    ++sizes_[level(ticket.priority)];
    if (handle != nullptr) *handle = std::uint64_t{node.generation} << 32 | index;
    return true;
  }

  // Whose turn it is; nullptr: the heap is empty.
  const T* peek(std::int64_t now_ns) const { return empty() ? nullptr : &*nodes_[next(now_ns)].value; }

  std::optional<T> pop(std::int64_t now_ns) {
    if (empty()) return std::nullopt;
    const Index index = next(now_ns);
    std::optional<T> value = std::move(nodes_[index].value);
    erase(index);
    return value;
  }

  // False: the handle's entry is no longer in the heap.
  bool remove(Handle handle) {
    const auto index = static_cast<Index>(handle);
    if (index >= nodes_.size() || !nodes_[index].value || nodes_[index].generation != handle >> 32) return false;
    erase(index);
    return true;
  }

  void clear() {
    while (!empty()) erase(heap_.back());
  }

  // Calls fn(const T&) for every entry, the oldest arrival first. It must not change the heap.
  template <class Fn>
  void for_each(Fn&& fn) const {
    for (Index index = oldest_; index != kNone; index = nodes_[index].newer) fn(*nodes_[index].value);
  }

  // Whether someone who came then has waited for ageing_ns. Subtracted from the present, not added to the arrival: that
  // may be any number, and could overflow.
  bool is_aged(std::int64_t arrival_ns, std::int64_t now_ns) const { return arrival_ns <= now_ns - ageing_ns_; }

  bool empty() const { return heap_.empty(); }
  bool full() const { return heap_.size() >= capacity_; }
  std::size_t size() const { return heap_.size(); }
  std::size_t size(Priority priority) const { return sizes_[level(priority)]; }

 private:
  using Index = std::uint32_t;
  static constexpr Index kNone = std::numeric_limits<Index>::max();

  struct Node {
    Ticket ticket;
    std::uint64_t order = 0;  // of its push, among all
    std::size_t place = 0;    // in heap_
    Index older = kNone;
    Index newer = kNone;
    std::uint32_t generation = 1;  // raised when the entry goes, so that its handle is stale
    std::optional<T> value;        // none: the node is free
  };

  static constexpr std::size_t level(Priority priority) { return static_cast<std::size_t>(priority); }

  static bool goes_before(const Node& a, const Node& b) {
    const auto due = [](const Ticket& ticket) {
      return ticket.deadline_ns == 0 ? std::numeric_limits<std::int64_t>::max() : ticket.deadline_ns;
    };
    if (a.ticket.priority != b.ticket.priority) return a.ticket.priority > b.ticket.priority;
    return std::tuple(due(a.ticket), a.ticket.arrival_ns, a.order) <
           std::tuple(due(b.ticket), b.ticket.arrival_ns, b.order);
  }

  Index next(std::int64_t now_ns) const {
    return is_aged(nodes_[oldest_].ticket.arrival_ns, now_ns) ? oldest_ : heap_.front();
  }

  void append_by_arrival(Index index) {
    Node& node = nodes_[index];
    Index older = newest_;
    while (older != kNone && nodes_[older].ticket.arrival_ns > node.ticket.arrival_ns) older = nodes_[older].older;
    node.older = older;
    node.newer = older == kNone ? oldest_ : nodes_[older].newer;
    link_newer(node.older) = index;
    link_older(node.newer) = index;
  }
  void unlink(const Node& node) {
    link_newer(node.older) = node.newer;
    link_older(node.newer) = node.older;
  }
  // The link that leads on from a node; from none, the list's own ends.
  Index& link_newer(Index index) { return index == kNone ? oldest_ : nodes_[index].newer; }
  Index& link_older(Index index) { return index == kNone ? newest_ : nodes_[index].older; }

  void erase(Index index) {
    Node& node = nodes_[index];
    unlink(node);
    const std::size_t place = node.place;
    const Index last = heap_.back();
    heap_.pop_back();
    if (last != index) {
      put(place, last);
      sift_up(place);
      sift_down(nodes_[last].place);
    }
    --sizes_[level(node.ticket.priority)];
    node.value.reset();
    if (++node.generation == 0) node.generation = 1;
    free_.push_back(index);
  }

  void put(std::size_t place, Index index) {
    heap_[place] = index;
    nodes_[index].place = place;
  }
  void sift_up(std::size_t place) {
    const Index index = heap_[place];
    for (; place > 0; place = (place - 1) / 2) {
      const Index parent = heap_[(place - 1) / 2];
      if (!goes_before(nodes_[index], nodes_[parent])) break;
      put(place, parent);
    }
    put(place, index);
  }
  void sift_down(std::size_t place) {
    const Index index = heap_[place];
    for (std::size_t child = 2 * place + 1; child < heap_.size(); child = 2 * place + 1) {
      if (child + 1 < heap_.size() && goes_before(nodes_[heap_[child + 1]], nodes_[heap_[child]])) ++child;
      if (!goes_before(nodes_[heap_[child]], nodes_[index])) break;
      put(place, heap_[child]);
      place = child;
    }
    put(place, index);
  }

  std::size_t capacity_;
  std::int64_t ageing_ns_;
  std::vector<Node> nodes_;
  std::vector<Index> free_;
  std::vector<Index> heap_;
  Index oldest_ = kNone;
  Index newest_ = kNone;
  std::uint64_t pushed_ = 0;
  std::array<std::size_t, kPriorities> sizes_{};
};

}  // namespace rts
