#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <system_error>

#include "bindings.hpp"
#include "rts/engine_core.hpp"

namespace py = pybind11;

namespace rts::bindings {

namespace {

using release_gil = py::call_guard<py::gil_scoped_release>;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

SipKey random_key() {
  SipKey key;
  if (::getentropy(key.data(), sizeof key) != 0) throw std::system_error(errno, std::generic_category(), "getentropy");
  return key;
}

// The core with the arrays that it writes to, which must live as long.
class BoundEngineCore {
 public:
  BoundEngineCore(const EngineConfig& config, std::shared_ptr<Vocabulary> vocabulary)
      : config_(config.scheduler), core_(config, std::move(vocabulary), clock_) {}

  EngineCore& core() { return core_; }

  void bind_buffers(Array<std::int32_t> tokens, Array<std::int32_t> positions, Array<std::int64_t> kv_slots,
                    Array<std::int32_t> query_start, Array<std::int32_t> context_len, Array<std::int32_t> rows,
                    Array<std::int32_t> block_table, Array<std::int64_t> logits_at, Array<std::int32_t> sampled,
                    Array<float> logprobs) {
    const auto max_tokens = static_cast<py::ssize_t>(config_.token_budget);
    const auto max_rows = static_cast<py::ssize_t>(config_.max_sequences);
    const auto at_least = [](const char* name, const py::array& array, py::ssize_t least) {
      if (array.size() < least) throw std::invalid_argument(std::string(name) + " is too small for a step");
    };
    at_least("tokens", tokens, max_tokens);
    at_least("positions", positions, max_tokens);
    at_least("kv_slots", kv_slots, max_tokens);
    at_least("query_start", query_start, max_rows + 1);
    at_least("context_len", context_len, max_rows);
    at_least("rows", rows, max_rows);
    at_least("logits_at", logits_at, max_rows);
    at_least("sampled", sampled, max_rows);
    at_least("logprobs", logprobs, max_rows);
    const auto max_blocks = (config_.max_context + config_.block_size - 1) / config_.block_size;
    at_least("block_table", block_table, max_rows * static_cast<py::ssize_t>(max_blocks));

    StepBuffers buffers;
    buffers.tokens = tokens.mutable_data();
    buffers.positions = positions.mutable_data();
    buffers.kv_slots = kv_slots.mutable_data();
    buffers.query_start = query_start.mutable_data();
    buffers.context_len = context_len.mutable_data();
    buffers.rows = rows.mutable_data();
    buffers.block_table = block_table.mutable_data();
    buffers.logits_at = logits_at.mutable_data();
    core_.bind_buffers(buffers, sampled.mutable_data(), logprobs.mutable_data());
    held_ = py::make_tuple(tokens, positions, kv_slots, query_start, context_len, rows, block_table, logits_at, sampled,
                           logprobs);
  }

 private:
  SteadyClock clock_;
  SchedulerConfig config_;
  py::object held_;
  EngineCore core_;
};

}  // namespace

void register_engine_core(py::module_& m) {
  py::class_<BoundEngineCore>(m, "EngineCore", "A worker's engine but for the model.")
      .def(py::init([](std::uint32_t max_batch_size, std::uint32_t max_step_tokens, std::uint32_t block_size,
                       std::uint32_t num_blocks, std::uint32_t cached_blocks, std::uint32_t max_context,
                       std::uint32_t max_queue, std::uint32_t ageing_ms, double target_step_ms,
                       std::shared_ptr<Vocabulary> vocabulary) {
             EngineConfig config;
             config.scheduler.max_sequences = max_batch_size;
             config.scheduler.token_budget = max_step_tokens;
             config.scheduler.block_size = block_size;
             config.scheduler.num_blocks = num_blocks;
             config.scheduler.cached_blocks = cached_blocks;
             config.scheduler.max_context = max_context;
             config.scheduler.target_step_ns = static_cast<std::int64_t>(target_step_ms * 1e6);
             config.scheduler.prefix_key = random_key();
             config.max_queue = max_queue;
             config.ageing_ns = std::int64_t{ageing_ms} * 1'000'000;
             return std::make_unique<BoundEngineCore>(config, std::move(vocabulary));
           }),
           py::kw_only(), py::arg("max_batch_size"), py::arg("max_step_tokens"), py::arg("block_size"),
           py::arg("num_blocks"), py::arg("cached_blocks"), py::arg("max_context"), py::arg("max_queue"),
           py::arg("ageing_ms"), py::arg("target_step_ms"), py::arg("vocabulary"))
      .def("bind_buffers", &BoundEngineCore::bind_buffers, py::kw_only(), py::arg("tokens").noconvert(),
           py::arg("positions").noconvert(), py::arg("kv_slots").noconvert(), py::arg("query_start").noconvert(),
           py::arg("context_len").noconvert(), py::arg("rows").noconvert(), py::arg("block_table").noconvert(),
           py::arg("logits_at").noconvert(), py::arg("sampled").noconvert(), py::arg("logprobs").noconvert())
      .def("attach",
           [](BoundEngineCore& self, std::shared_ptr<Channel> channel) { self.core().attach(std::move(channel)); })
      .def("detach", [](BoundEngineCore& self, const Channel& channel) { self.core().detach(channel); })
      .def(
          "schedule",
          [](BoundEngineCore& self) -> py::object {
            std::optional<StepShape> shape;
            {
              py::gil_scoped_release released;
              shape = self.core().schedule();
            }
            if (!shape) return py::none();
            return py::make_tuple(shape->tokens, shape->sequences, shape->samples);
          },
          "Assembles the next step: (tokens, sequences, samples), or None where there is nothing to do.")
      .def(
          "sample",
          [](BoundEngineCore& self, Array<float> logits) {
            const std::span<const float> values(logits.data(), static_cast<std::size_t>(logits.size()));
            py::gil_scoped_release released;
            self.core().sample(values);
          },
          py::arg("logits").noconvert())
      .def(
          "commit", [](BoundEngineCore& self) { self.core().commit(); }, release_gil())
      .def(
          "abort", [](BoundEngineCore& self) { self.core().abort(); }, release_gil())
      .def(
          "wait", [](BoundEngineCore& self) { self.core().wait(); }, release_gil())
      .def(
          "run",
          [](BoundEngineCore& self, NativeModel& model) -> py::object {
            std::optional<ModelFailure> failure;
            {
              py::gil_scoped_release released;
              failure = self.core().run(model);
            }
            if (!failure) return py::none();
            return py::make_tuple(failure->sequences, py::bytes(failure->message).attr("decode")("utf-8", "replace"));
          },
          py::arg("model"), "Runs steps until interrupt(): None; or until the model fails: (sequences, message).")
      .def("interrupt", [](BoundEngineCore& self) { self.core().interrupt(); })
      .def("close", [](BoundEngineCore& self) { self.core().close(); }, release_gil());
}

}  // namespace rts::bindings
