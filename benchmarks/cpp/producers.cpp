// Several producers and one consumer, for comparison with the queues that Python has.
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "library.hpp"
#include "rts/priority_queue.hpp"
#include "rts/token_ring.hpp"

namespace rts::bench {

namespace {

constexpr SpscRingShape kRing{.bytes = 1 << 16};
constexpr std::uint32_t kLaneBytes = 1 << 17;  // 1,024 submit headers, more or less
constexpr std::uint32_t kQueueCapacity = 4096;

// Zeroed memory that child processes share.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t bytes) : bytes_(bytes) {
    void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mapping a benchmark's memory");
    at_ = static_cast<std::byte*>(memory);
  }
  ~SharedMemory() { ::munmap(at_, bytes_); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  std::byte* at() const { return at_; }

 private:
  std::size_t bytes_;
  std::byte* at_;
};

// Producers that wait for their start; they have ended when this is destroyed.
class Producers {
 public:
  Producers(std::uint32_t count, bool processes, const std::function<void(std::uint32_t)>& produce) {
    for (std::uint32_t producer = 0; producer < count; ++producer) {
      const auto wait_and_produce = [this, produce, producer] {
        while (!started().load(std::memory_order_acquire)) ::sched_yield();
        produce(producer);
      };
      if (!processes) {
        threads_.emplace_back(wait_and_produce);
      } else if (const pid_t child = ::fork(); child == 0) {
        wait_and_produce();
        ::_exit(0);
      } else if (child > 0) {
        children_.push_back(child);
      } else {
        throw std::system_error(errno, std::generic_category(), "fork");
      }
    }
  }
  ~Producers() {
    start();
    for (std::thread& thread : threads_) thread.join();
    for (const pid_t child : children_) ::waitpid(child, nullptr, 0);
  }
  Producers(const Producers&) = delete;
  Producers& operator=(const Producers&) = delete;

  void start() { started().store(true, std::memory_order_release); }

 private:
  std::atomic<bool>& started() const { return *reinterpret_cast<std::atomic<bool>*>(flag_.at()); }

  SharedMemory flag_{sizeof(std::atomic<bool>)};
  std::vector<std::thread> threads_;
  std::vector<pid_t> children_;
};

// Checks that each producer's items come once and in order.
class Arrivals {
 public:
  Arrivals(std::uint32_t producers, std::uint64_t items) : next_(producers), left_(producers * items) {}
  void take(std::uint32_t producer, std::uint64_t item) {
    in_order_ = in_order_ && item == next_[producer]++;
    --left_;
  }
  bool complete() const { return left_ == 0; }
  bool in_order() const { return in_order_; }

 private:
  std::vector<std::uint64_t> next_;
  std::uint64_t left_;
  bool in_order_ = true;
};

// `consume` takes what there is; false: nothing.
double time_until_complete(Producers& producers, Arrivals& arrivals, const std::function<bool()>& consume) {
  const auto start = std::chrono::steady_clock::now();
  producers.start();
  while (!arrivals.complete()) {
    if (!consume()) ::sched_yield();
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return arrivals.in_order() ? elapsed.count() : -1.0;
}

}  // namespace

}  // namespace rts::bench

using namespace rts;
using namespace rts::bench;

double rts_produce_to_rings(std::uint32_t producers, std::uint64_t items, bool processes) {
  const std::size_t stride = SpscRing<>::bytes_needed(kRing);
  const SharedMemory memory(producers * stride);
  const auto ring = [&](std::uint32_t producer) { return SpscRing<>(memory.at() + producer * stride, kRing); };
  std::vector<SpscRing<>::Consumer> readers;
  for (std::uint32_t producer = 0; producer < producers; ++producer) readers.push_back(ring(producer).consumer());

  Producers running(producers, processes, [&](std::uint32_t producer) {
    TokenWriter writer(ring(producer));
    for (std::uint64_t item = 0; item < items; ++item) {
      while (!writer.write_token({.index = static_cast<std::uint32_t>(item)}, " Paris")) ::sched_yield();
    }
  });
  Arrivals arrivals(producers, items);
  return time_until_complete(running, arrivals, [&] {
    bool any = false;
    for (std::uint32_t producer = 0; producer < producers; ++producer) {
      SpscRing<>::Consumer& reader = readers[producer];
      for (auto bytes = reader.front(); !bytes.empty(); bytes = reader.front()) {
        arrivals.take(producer, TokenRecord(bytes).header.index);
        reader.pop();
        any = true;
      }
      reader.release();
    }
    return any;
  });
}

double rts_produce_to_queue(std::uint32_t producers, std::uint64_t items, bool processes) {
  const std::size_t stride = LaneSet<>::bytes_needed(kLaneBytes);
  const SharedMemory memory(producers * stride);
  const auto lanes_of = [&](std::uint32_t producer) { return LaneSet<>(memory.at() + producer * stride, kLaneBytes); };
  std::vector<LaneSet<>> lanes;
  for (std::uint32_t producer = 0; producer < producers; ++producer) lanes.push_back(lanes_of(producer));
  PriorityQueue<std::pair<std::uint32_t, std::uint64_t>> queue(kQueueCapacity, 5'000'000'000);
  for (LaneSet<>& attached : lanes) queue.attach(attached);

  Producers running(producers, processes, [&](std::uint32_t producer) {
    LaneSet<> own = lanes_of(producer);
    SubmitHeader header;
    header.slot = producer;
    for (std::uint64_t item = 0; item < items; ++item) {
      header.stream_id = item;
      while (!own.push(Priority::kNormal, std::span(&header, 1))) ::sched_yield();
    }
  });
  Arrivals arrivals(producers, items);
  return time_until_complete(running, arrivals, [&] {
    const std::size_t drained = queue.drain([](std::span<const std::byte> record) {
      SubmitHeader header;
      std::memcpy(&header, record.data(), sizeof header);
      return std::optional(std::pair(Ticket{}, std::pair(header.slot, header.stream_id)));
    });
    while (const auto entry = queue.pop(0)) arrivals.take(entry->first, entry->second);
    return drained != 0;
  });
}
