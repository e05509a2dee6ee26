#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>

#include "bindings.hpp"
#include "rts/priority_queue.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace rts::bindings {
namespace {

// Entries by number, from one producer: what they stand for stays in Python.
class NumberQueue {
 public:
  NumberQueue(std::uint32_t capacity, std::int64_t ageing_ns)
      : queue_(capacity, ageing_ns), lanes_(LaneSet<>::allocate(kLaneBytes)) {
    queue_.attach(lanes_);
  }

  bool push(int priority, std::int64_t arrival_ns, std::int64_t deadline_ns, std::uint64_t number) {
    if (priority < 0 || priority >= kPriorities) throw py::value_error("there is no such priority");
    drain();  // so that the lane has room
    if (queue_.full()) return false;
    const Entry entry{arrival_ns, deadline_ns, number};
    return lanes_.push(static_cast<Priority>(priority), std::span(&entry, 1));
  }

  std::optional<std::uint64_t> pop(std::int64_t now_ns) {
    drain();
    return queue_.pop(now_ns);
  }

 private:
  struct Entry {
    std::int64_t arrival_ns;
    std::int64_t deadline_ns;
    std::uint64_t number;
  };
  static constexpr std::uint32_t kLaneBytes = 1 << 10;

  void drain() {
    queue_.drain([](std::span<const std::byte> record) -> std::optional<std::pair<Ticket, std::uint64_t>> {
      Entry entry;
      std::memcpy(&entry, record.data(), sizeof entry);
      return std::pair{Ticket{Priority::kNormal, entry.arrival_ns, entry.deadline_ns}, entry.number};
    });
  }

  PriorityQueue<std::uint64_t> queue_;
  LaneSet<> lanes_;
};

}  // namespace

void register_priority_queue(py::module_& m) {
  py::class_<NumberQueue>(m, "PriorityQueue",
                          "Numbers by priority, deadline and arrival; one that has waited for ageing_ns goes first.")
      .def(py::init<std::uint32_t, std::int64_t>(), py::kw_only(), "capacity"_a, "ageing_ns"_a)
      .def("push", &NumberQueue::push, "priority"_a, "arrival_ns"_a, "deadline_ns"_a, "number"_a,
           "False where it is full. A deadline of 0 is none.")
      .def("pop", &NumberQueue::pop, "now_ns"_a, "None where it is empty.");
}

}  // namespace rts::bindings
