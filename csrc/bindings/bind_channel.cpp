#include <pybind11/pybind11.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <memory>

#include "bindings.hpp"
#include "rts/channel.hpp"

namespace py = pybind11;

namespace rts::bindings {

namespace {

// So that a ring is full by its count of tokens, and only of unusually long ones before: a token's record has 56 bytes
// with the text of most.
std::uint32_t ring_bytes_for(std::uint32_t records, std::uint32_t least) {
  constexpr std::uint64_t kRecordBytes = 128, kMost = 1U << 31;
  const std::uint64_t wanted = std::min(records * kRecordBytes, kMost);
  return std::max({kMinRingBytes, least, static_cast<std::uint32_t>(std::bit_ceil(wanted))});
}

}  // namespace

namespace {

template <std::size_t kSize>
py::tuple to_python(const Histogram<kSize>& histogram) {
  py::list counts(kSize);
  for (std::size_t bucket = 0; bucket < kSize; ++bucket) counts[bucket] = histogram.count(bucket);
  return py::make_tuple(counts, histogram.sum());
}

constexpr std::array<const char*, kBatchReleases> kReleaseNames{"full", "timeout", "idle", "deadline"};

py::dict stats_of(const Channel& channel) {
  const WorkerStats& stats = channel.header().stats;
  const auto number = [](const std::atomic<std::uint64_t>& counter) { return counter.load(std::memory_order_relaxed); };
  py::dict all;
  all["step_us"] = to_python(stats.step_us);
  all["batch_sequences"] = to_python(stats.batch_sequences);
  all["batch_tokens"] = to_python(stats.batch_tokens);
  all["stalls"] = number(stats.stalls);
  all["preemptions"] = number(stats.preemptions);
  all["running"] = number(stats.running);
  all["waiting"] = number(stats.waiting);
  all["kv_blocks"] = number(stats.kv_blocks);
  all["kv_blocks_used"] = number(stats.kv_blocks_used);
  py::dict releases;
  for (std::size_t reason = 0; reason < kBatchReleases; ++reason) {
    releases[kReleaseNames[reason]] = number(stats.batch_releases[reason]);
  }
  all["batch_releases"] = releases;
  return all;
}

}  // namespace

void register_channel(py::module_& m) {
  py::class_<Channel, std::shared_ptr<Channel>>(m, "Channel", "What one front end and one worker share.")
      .def_static(
          "create",
          [](std::uint32_t slots, std::uint32_t ring_records, std::uint32_t lane_bytes, std::uint32_t generation,
             bool shared, std::uint32_t least_ring_bytes) {
            ChannelConfig config;
            config.slots = slots;
            config.ring_records = ring_records;
            config.ring_bytes = ring_bytes_for(ring_records, least_ring_bytes);
            config.lane_bytes = lane_bytes;
            config.generation = generation;
            return Channel::create(config, shared);
          },
          py::kw_only(), py::arg("slots"), py::arg("ring_records"), py::arg("lane_bytes"), py::arg("generation"),
          py::arg("shared"), py::arg("least_ring_bytes") = 0,
          "Makes one in shared memory, for a worker process, or in private memory, for a thread.")
      .def_static("attach", &Channel::attach, py::arg("memory_fd"), py::arg("worker_bell_fd"), py::arg("front_bell_fd"),
                  "Maps one that another process made, and takes over the descriptors, in the order of fds().")
      .def("fds",
           [](const Channel& channel) {
             return py::make_tuple(channel.memory_fd(), channel.worker_bell_fd(), channel.front_bell_fd());
           })
      .def_property_readonly("generation", [](const Channel& channel) { return channel.config().generation; })
      .def_property_readonly("slots", [](const Channel& channel) { return channel.config().slots; })
      .def_property_readonly(
          "steps", [](const Channel& channel) { return channel.header().steps.load(std::memory_order_relaxed); },
          "Steps that the worker has committed while it was attached.")
      .def("stats", &stats_of, "What the worker counts: histograms as (counts by significant bits, sum), and numbers.")
      // For the Cython module, which shares the object and not a copy. The capsule holds a reference of its own.
      .def("capsule", [](const std::shared_ptr<Channel>& channel) {
        return py::capsule(new std::shared_ptr<Channel>(channel), "rts.Channel",
                           [](void* held) { delete static_cast<std::shared_ptr<Channel>*>(held); });
      });
}

}  // namespace rts::bindings
