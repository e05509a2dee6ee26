#include "rts/channel.hpp"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <bit>
#include <cerrno>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

namespace rts {

namespace {

constexpr std::uint64_t kMagic = 0x6c656e6e61686352;  // "Rchannel"

SpscRingShape ring_shape(const ChannelConfig& config) {
  return {config.ring_bytes, config.ring_records + TokenWriter::kReservedRecords};
}
std::size_t ring_stride(const ChannelConfig& config) {
  return SpscRing<>::bytes_needed(ring_shape(config));
}

// Where each part lies, from the memory's start.
struct Layout {
  explicit Layout(const ChannelConfig& config) {
    std::size_t end = align_up(sizeof(ChannelHeader), kCacheLine);
    const auto part = [&end](std::size_t part_bytes) {
      const std::size_t start = end;
      end = align_up(end + part_bytes, kCacheLine);
      return start;
    };
    lanes = part(LaneSet<>::bytes_needed(config.lane_bytes));
    ready = part((config.slots + 63) / 64 * sizeof(std::uint64_t));
    controls = part(config.slots * sizeof(SlotControl));
    rings = part(config.slots * ring_stride(config));
    bytes = end;
  }

  std::size_t lanes, ready, controls, rings, bytes;
};

void check(const ChannelConfig& config) {
  const auto power_of_two = [](std::uint32_t n) { return std::has_single_bit(n) && n <= (1U << 31); };
  if (config.slots == 0 || config.slots > (1U << 20)) throw std::invalid_argument("a channel has 1 to 2^20 slots");
  if (config.ring_records == 0 || config.ring_records > (1U << 30)) {
    throw std::invalid_argument("a token ring holds 1 to 2^30 tokens");
  }
  if (!power_of_two(config.lane_bytes) || config.lane_bytes < kCacheLine) {
    throw std::invalid_argument("lane_bytes must be a power of two of 64 or more");
  }
  if (!power_of_two(config.ring_bytes) || config.ring_bytes < kMinRingBytes) {
    throw std::invalid_argument("ring_bytes must be a power of two with room for the longest tokens");
  }
}

int checked(int fd, const char* what) {
  if (fd < 0) throw std::system_error(errno, std::generic_category(), what);
  return fd;
}

FileDescriptor new_event() {
  return FileDescriptor(checked(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd"));
}

std::byte* map(std::size_t bytes, int fd) {
  const int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mapping a channel");
  return static_cast<std::byte*>(memory);
}

}  // namespace

std::shared_ptr<Channel> Channel::create(const ChannelConfig& config, bool shared) {
  check(config);
  const Layout layout(config);
  std::shared_ptr<Channel> channel(new Channel);
  channel->worker_bell_fd_ = new_event();
  channel->front_bell_fd_ = new_event();
  if (shared) {
    channel->memory_fd_ = FileDescriptor(
        checked(::memfd_create("realtime-serve-channel", MFD_CLOEXEC | MFD_ALLOW_SEALING), "memfd_create"));
    checked(::ftruncate(channel->memory_fd_.get(), static_cast<off_t>(layout.bytes)), "sizing a channel");
    // A peer that could shrink it could have the other side killed by a bus error.
    checked(::fcntl(channel->memory_fd_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL),
            "sealing a channel");
  }
  channel->memory_ = map(layout.bytes, channel->memory_fd_.get());
  channel->mapped_ = layout.bytes;
  channel->config_ = config;
  channel->lay_out();

  auto* header = new (channel->memory_) ChannelHeader;
  header->magic = kMagic;
  header->layout_version = kLayoutVersion;
  header->config = config;
  header->bytes = layout.bytes;
  // The pages are fresh from the kernel, so zero: that is what empty lanes and rings, ready words and flags are, and
  // those of slots that no stream uses stay untouched.
  return channel;
}

std::shared_ptr<Channel> Channel::attach(int memory_fd, int worker_bell_fd, int front_bell_fd) {
  std::shared_ptr<Channel> channel(new Channel);
  channel->memory_fd_ = FileDescriptor(memory_fd);
  channel->worker_bell_fd_ = FileDescriptor(worker_bell_fd);
  channel->front_bell_fd_ = FileDescriptor(front_bell_fd);
  struct stat status;
  checked(::fstat(memory_fd, &status), "a channel's memory");
  const auto bytes = static_cast<std::size_t>(status.st_size);
  if (bytes < sizeof(ChannelHeader)) throw std::runtime_error("not a channel: its memory is too small");
  channel->memory_ = map(bytes, memory_fd);
  channel->mapped_ = bytes;
  const ChannelHeader& header = channel->header();
  if (header.magic != kMagic) throw std::runtime_error("not a channel: its memory has another content");
  if (header.layout_version != kLayoutVersion) {
    throw std::runtime_error("a channel of layout " + std::to_string(header.layout_version) + "; this worker knows " +
                             std::to_string(kLayoutVersion));
  }
  channel->config_ = header.config;
  try {
    check(channel->config_);
  } catch (const std::invalid_argument& wrong) {
    throw std::runtime_error(std::string("not a channel: ") + wrong.what());
  }
  if (header.bytes != bytes || Layout(channel->config_).bytes != bytes) {
    throw std::runtime_error("not a channel: its memory has another size");
  }
  channel->lay_out();
  return channel;
}

void Channel::lay_out() {
  const Layout layout(config_);
  lanes_ = LaneSet<>(memory_ + layout.lanes, config_.lane_bytes);
  ready_ = reinterpret_cast<std::atomic<std::uint64_t>*>(memory_ + layout.ready);
  controls_ = reinterpret_cast<SlotControl*>(memory_ + layout.controls);
  rings_ = memory_ + layout.rings;
}

SpscRing<> Channel::token_ring(std::uint32_t slot) const {
  return {rings_ + slot * ring_stride(config_), ring_shape(config_)};
}

Channel::~Channel() {
  if (memory_ != nullptr) ::munmap(memory_, mapped_);
}

bool Channel::any_ready() const {
  for (std::uint32_t word = 0; word < ready_words(); ++word) {
    if (ready_[word].load(std::memory_order_relaxed) != 0) return true;
  }
  return false;
}

void Channel::set_flag(std::uint32_t slot, SlotControl::Flag flag, bool on) {
  std::atomic<std::uint32_t>& flags = control(slot).flags;
  if (on) {
    flags.fetch_or(flag, std::memory_order_relaxed);
  } else {
    flags.fetch_and(~std::uint32_t{flag}, std::memory_order_relaxed);
  }
  header().control_epoch.fetch_add(1, std::memory_order_release);  // (3)
  worker_bell().ring();
}

}  // namespace rts
