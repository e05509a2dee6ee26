#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>

#include "rts/cache_line.hpp"
#include "rts/doorbell.hpp"
#include "rts/file_descriptor.hpp"
#include "rts/histogram.hpp"
#include "rts/priority_queue.hpp"
#include "rts/spsc_ring.hpp"
#include "rts/token_ring.hpp"

namespace rts {

// Raised by any change of what lies in a channel's memory, the records of request.hpp included.
inline constexpr std::uint32_t kLayoutVersion = 4;

struct ChannelConfig {
  std::uint32_t slots = 1024;          // streams that can be open at once
  std::uint32_t ring_records = 100;    // tokens that a stream may be ahead of its reader
  std::uint32_t ring_bytes = 1 << 14;  // of a stream's token ring; a power of two
  std::uint32_t lane_bytes = 4 << 20;  // of one priority's lane; a power of two
  std::uint32_t generation = 1;        // which incarnation of the worker it is for
};

// A stream slot's flags. They are orders, not messages: setting one never queues and cannot be refused.
struct SlotControl {
  enum Flag : std::uint32_t { kCancel = 1, kPause = 2 };
  alignas(kCacheLine) std::atomic<std::uint32_t> flags{0};
};

// Why a batch of a callable model was released.
enum class BatchRelease : std::uint8_t { kFull = 0, kTimeout = 1, kIdle = 2, kDeadline = 3 };
inline constexpr std::size_t kBatchReleases = 4;

// What the worker counts for the front end's metrics. The worker's thread writes, relaxed; any may read.
struct WorkerStats {
  Histogram<27> step_us;                      // from a step's assembly to its commit; up to 2^26 us, 67 s
  Histogram<18> batch_sequences;              // of a step
  Histogram<22> batch_tokens;                 // positions of a step
  std::atomic<std::uint64_t> stalls{0};       // times that a sequence was paused because its reader had made no room
  std::atomic<std::uint64_t> preemptions{0};  // times that a sequence gave up its place in the steps to another
  std::atomic<std::uint64_t> running{0};
  std::atomic<std::uint64_t> waiting{0};
  std::atomic<std::uint64_t> kv_blocks{0};
  std::atomic<std::uint64_t> kv_blocks_used{0};
  std::array<std::atomic<std::uint64_t>, kBatchReleases> batch_releases{};  // by BatchRelease
};

// What lies at the start of a channel's memory. The lanes, the slots' controls and the token rings follow.
struct ChannelHeader {
  std::uint64_t magic = 0;
  std::uint32_t layout_version = 0;
  ChannelConfig config;
  std::uint64_t bytes = 0;

  DoorbellFlag worker_bell;
  DoorbellFlag front_bell;
  // Raised by the front end after any change of a slot's flags, so that the worker need not look at every slot:
  // set_flag() releases it (3), the worker acquires it (4) and then looks at the flags.
  alignas(kCacheLine) std::atomic<std::uint32_t> control_epoch{0};
  // 1 while the worker sleeps and a sequence waits for room in its token ring: the front end then rings after it has
  // made some. The worker's seq_cst fence (5), between raising it and looking at the rings, pairs with the front end's
  // (6), between giving room back and looking at it: one of them sees the other. It is raised, by a release (7), once
  // the worker's bell is armed, and taken by an acquiring exchange (8): who takes it rings a bell that wakes.
  alignas(kCacheLine) std::atomic<std::uint32_t> worker_stalled{0};
  // Raised by the worker at each committed step; the front end's measure of progress. Relaxed: it orders nothing.
  alignas(kCacheLine) std::atomic<std::uint64_t> steps{0};
  alignas(kCacheLine) WorkerStats stats;
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

// What one front end and one worker share: submit lanes one way, token rings the other, a doorbell each way. It lies in
// shared memory (a memfd) where the worker is a process, in private memory where it is a thread; either side holds a
// Channel. A channel serves one incarnation of a worker, so nothing in it is ever reset.
class Channel {
 public:
  // Throws std::invalid_argument for a shape that no channel can have.
  static std::shared_ptr<Channel> create(const ChannelConfig& config, bool shared);
  // Maps a channel that another process created. Takes over the descriptors, also where it throws: std::runtime_error,
  // where the memory is not a channel of this layout.
  static std::shared_ptr<Channel> attach(int memory_fd, int worker_bell_fd, int front_bell_fd);

  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  // This side's own copy, which a broken peer cannot change.
  const ChannelConfig& config() const { return config_; }
  ChannelHeader& header() const { return *reinterpret_cast<ChannelHeader*>(memory_); }
  // The front end pushes, the worker reads.
  LaneSet<>& lanes() { return lanes_; }
  SlotControl& control(std::uint32_t slot) const { return controls_[slot]; }
  // A slot's token ring, from either side.
  TokenWriter token_writer(std::uint32_t slot) const { return TokenWriter(token_ring(slot)); }
  SpscRing<>::Consumer token_reader(std::uint32_t slot) const { return token_ring(slot).consumer(); }
  Doorbell worker_bell() const { return {&header().worker_bell, worker_bell_fd_.get()}; }
  Doorbell front_bell() const { return {&header().front_bell, front_bell_fd_.get()}; }

  // Which slots have records that the front end has not seen: set by whoever has published, taken by the front end a
  // word at a time. A bit that is set twice is one visit, so it is bounded and cannot overflow.
  // Wait-free, any thread. (1) release: what was published to the slot's ring before is visible to whoever takes the
  // bit (2).
  void mark_ready(std::uint32_t slot) const {
    ready_[slot / 64].fetch_or(std::uint64_t{1} << (slot % 64), std::memory_order_release);
  }
  // Wait-free, the front end's thread. (2) acquire, pairs with (1).
  std::uint64_t take_ready(std::uint32_t word) const {
    if (ready_[word].load(std::memory_order_relaxed) == 0) return 0;
    return ready_[word].exchange(0, std::memory_order_acquire);
  }
  // Wait-free, any thread. Orders nothing: it is asked after the front bell was armed, and that acquires.
  bool any_ready() const;
  std::uint32_t ready_words() const { return (config().slots + 63) / 64; }

  // Sets or clears one of a slot's flags and tells the worker. Any thread; wait-free but for the doorbell's system
  // call. (3) release, of the epoch: the worker that acquires it (4) sees the flag.
  void set_flag(std::uint32_t slot, SlotControl::Flag flag, bool on);

  int memory_fd() const { return memory_fd_.get(); }
  int worker_bell_fd() const { return worker_bell_fd_.get(); }
  int front_bell_fd() const { return front_bell_fd_.get(); }

 private:
  Channel() = default;
  void lay_out();
  SpscRing<> token_ring(std::uint32_t slot) const;

  FileDescriptor memory_fd_, worker_bell_fd_, front_bell_fd_;
  std::byte* memory_ = nullptr;
  std::size_t mapped_ = 0;
  ChannelConfig config_;
  LaneSet<> lanes_;
  std::atomic<std::uint64_t>* ready_ = nullptr;
  SlotControl* controls_ = nullptr;
  std::byte* rings_ = nullptr;
};

}  // namespace rts
