#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "rts/channel_server.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace rts::bindings {
namespace {

// A request, with copies of what it carries: the lane's memory is given back.
struct Submission {
  std::uint32_t slot;
  Priority priority;
  std::int64_t arrival_ns, deadline_ns;
  PayloadKind payload_kind, answer_kind;
  SamplingParams sampling;
  std::string request_id;
  std::vector<std::string> stops;
  std::vector<TokenBias> logit_bias;
  std::vector<std::int32_t> stop_token_ids;
  py::bytes payload;
};

class BoundChannelServer {
 public:
  explicit BoundChannelServer(std::shared_ptr<Channel> channel) : server_(std::move(channel), clock_) {}

  ChannelServer& server() { return server_; }
  std::uint32_t open_slot(std::uint32_t slot) const {
    if (!server_.is_open(slot)) throw py::index_error("slot " + std::to_string(slot) + " is not open");
    return slot;
  }

  std::vector<Submission> take() {
    std::vector<Submission> taken;
    server_.take([&](std::uint32_t slot, const SubmitRecord& record) {
      const SubmitHeader& header = record.header;
      taken.push_back({slot, header.priority, header.arrival_ns, header.deadline_ns, header.payload_kind,
                       header.answer_kind, header.sampling, std::string(record.request_id), record.stops,
                       record.logit_bias, record.stop_token_ids,
                       py::bytes(record.payload.data(), record.payload.size())});
    });
    return taken;
  }

 private:
  SteadyClock clock_;
  ChannelServer server_;
};

// What passes for each request passes as a number: pybind11 takes a microsecond to convert an enumeration's member.
template <class T>
int as_int(T value) {
  return static_cast<int>(value);
}

py::dict sampling_of(const Submission& submission) {
  const SamplingParams& sampling = submission.sampling;
  py::dict all;
  all["max_tokens"] = sampling.max_tokens;
  all["temperature"] = sampling.temperature;
  all["top_p"] = sampling.top_p;
  all["top_k"] = sampling.top_k;
  all["min_p"] = sampling.min_p;
  all["repetition_penalty"] = sampling.repetition_penalty;
  all["presence_penalty"] = sampling.presence_penalty;
  all["frequency_penalty"] = sampling.frequency_penalty;
  all["ignore_eos"] = sampling.has(SamplingParams::kIgnoreEos);
  all["logprobs"] = sampling.has(SamplingParams::kLogprobs);
  all["seed"] = sampling.seed;
  py::dict logit_bias;
  for (const TokenBias& entry : submission.logit_bias) logit_bias[py::int_(entry.token)] = entry.bias;
  all["logit_bias"] = logit_bias;
  all["min_tokens"] = sampling.min_tokens;
  all["stop_token_ids"] = submission.stop_token_ids;
  all["top_logprobs"] = sampling.top_logprobs;
  return all;
}

// (text, token id, log-probability) each.
using TopLogprobs = std::vector<std::tuple<std::string, std::int32_t, float>>;

std::string to_extension(const TopLogprobs& top_logprobs) {
  std::string extension;
  for (const auto& [text, token, logprob] : top_logprobs) append_top_logprob(extension, {token, logprob}, text);
  return extension;
}

}  // namespace

void register_channel_server(py::module_& m) {
  py::native_enum<PayloadKind>(m, "PayloadKind", "enum.IntEnum", "What a payload's bytes are.")
      .value("NONE", PayloadKind::kNone)
      .value("TEXT", PayloadKind::kText)
      .value("JSON", PayloadKind::kJson)
      .value("BYTES", PayloadKind::kBytes)
      .value("NUMPY", PayloadKind::kNumpy)
      .finalize();
  py::native_enum<BatchRelease>(m, "BatchRelease", "enum.IntEnum", "Why a batch was released.")
      .value("FULL", BatchRelease::kFull)
      .value("TIMEOUT", BatchRelease::kTimeout)
      .value("IDLE", BatchRelease::kIdle)
      .value("DEADLINE", BatchRelease::kDeadline)
      .finalize();
  py::native_enum<FinishReason>(m, "FinishReason", "enum.IntEnum")
      .value("STOP", FinishReason::kStop)
      .value("LENGTH", FinishReason::kLength)
      .value("CANCELLED", FinishReason::kCancelled)
      .value("ERROR", FinishReason::kError)
      .finalize();
  py::native_enum<StreamError>(m, "StreamError", "enum.IntEnum")
      .value("NONE", StreamError::kNone)
      .value("MODEL_FAILED", StreamError::kModelFailed)
      .value("INVALID_REQUEST", StreamError::kInvalidRequest)
      .finalize();

  py::class_<Submission>(m, "Submission", "A request as a worker takes it.")
      .def_readonly("slot", &Submission::slot)
      .def_property_readonly("priority", [](const Submission& self) { return as_int(self.priority); })
      .def_readonly("arrival_ns", &Submission::arrival_ns)
      .def_readonly("deadline_ns", &Submission::deadline_ns)
      .def_property_readonly("payload_kind", [](const Submission& self) { return as_int(self.payload_kind); })
      .def_property_readonly("answer_kind", [](const Submission& self) { return as_int(self.answer_kind); })
      .def_readonly("request_id", &Submission::request_id)
      .def_readonly("stops", &Submission::stops)
      .def_readonly("stop_token_ids", &Submission::stop_token_ids)
      .def_readonly("payload", &Submission::payload)
      .def_property_readonly("max_tokens", [](const Submission& self) { return self.sampling.max_tokens; })
      .def_property_readonly("min_tokens", [](const Submission& self) { return self.sampling.min_tokens; })
      .def("sampling", &sampling_of, "Its sampling parameters by name.");

  py::class_<BoundChannelServer>(m, "ChannelServer", "A worker's side of a channel, for models that are called.")
      .def(py::init<std::shared_ptr<Channel>>(), "channel"_a)
      .def_property_readonly("bell_fd",
                             [](BoundChannelServer& self) { return self.server().channel().worker_bell_fd(); })
      .def_property_readonly("open_slots", [](BoundChannelServer& self) { return self.server().open_slots(); })
      .def_property_readonly_static("max_piece_bytes", [](const py::object&) { return ChannelServer::kMaxPieceBytes; })
      .def("take", &BoundChannelServer::take, "The requests that have come, high priority first.")
      .def(
          "cancelled", [](BoundChannelServer& self) { return self.server().cancelled(); },
          "Slots given up by their readers since the last call. They are still to be ended.")
      .def(
          "with_room", [](BoundChannelServer& self) { return self.server().with_room(); },
          "Slots that had no room for a piece and have it now.")
      .def(
          "start", [](BoundChannelServer& self, std::uint32_t slot) { self.server().start(self.open_slot(slot)); },
          "slot"_a, "The model begins to work on it.")
      .def(
          "write_token",
          [](BoundChannelServer& self, std::uint32_t slot, std::string_view text, std::int32_t token_id,
             std::optional<float> logprob, bool special, const std::optional<TopLogprobs>& top_logprobs) {
            return self.server().write_token(self.open_slot(slot), text, token_id, logprob.value_or(std::nanf("")),
                                             special, top_logprobs ? to_extension(*top_logprobs) : std::string());
          },
          "slot"_a, "text"_a, "token_id"_a, "logprob"_a, "special"_a, "top_logprobs"_a = py::none(),
          "False: there is no room at the moment.")
      .def(
          "write_payload",
          [](BoundChannelServer& self, std::uint32_t slot, std::uint8_t kind, const py::bytes& piece) {
            return self.server().write_payload(self.open_slot(slot), static_cast<PayloadKind>(kind),
                                               std::string_view(piece));
          },
          "slot"_a, "kind"_a, "piece"_a, "False: there is no room at the moment.")
      .def(
          "end",
          [](BoundChannelServer& self, std::uint32_t slot, std::uint8_t reason, std::uint8_t error,
             std::string_view detail) {
            self.server().end(self.open_slot(slot), static_cast<FinishReason>(reason), static_cast<StreamError>(error),
                              detail);
          },
          "slot"_a, "reason"_a, "error"_a = 0, "detail"_a = "")
      .def(
          "flush", [](BoundChannelServer& self) { self.server().flush(); }, "Wakes the front end where need be.")
      .def(
          "count_step", [](BoundChannelServer& self, std::int64_t took_ns) { self.server().count_step(took_ns); },
          "took_ns"_a)
      .def(
          "count_batch",
          [](BoundChannelServer& self, std::uint32_t size, BatchRelease release) {
            self.server().count_batch(size, release);
          },
          "size"_a, "release"_a)
      .def(
          "show_load",
          [](BoundChannelServer& self, std::uint32_t running, std::uint32_t waiting) {
            self.server().show_load(running, waiting);
          },
          "running"_a, "waiting"_a)
      .def(
          "arm", [](BoundChannelServer& self) { return self.server().arm(); },
          "Lets the front end ring. False: there is news already.")
      .def("wake", [](BoundChannelServer& self) { self.server().wake(); }, "Ends a sleep.");
}

}  // namespace rts::bindings
