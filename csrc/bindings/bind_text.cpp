#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "rts/detokenizer.hpp"
#include "rts/sse_writer.hpp"
#include "rts/stop_matcher.hpp"
#include "rts/vocabulary.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace rts::bindings {
namespace {

// Straight from and to Python's own buffers: a vocabulary has some hundred thousand entries.
py::list decode_byte_level_entries(const py::list& entries) {
  py::list decoded(entries.size());
  for (std::size_t i = 0; i < entries.size(); ++i) {
    Py_ssize_t size = 0;
    const char* const text = PyUnicode_AsUTF8AndSize(entries[i].ptr(), &size);
    if (text == nullptr) throw py::error_already_set();
    try {
      decoded[i] = py::bytes(decode_byte_level({text, static_cast<std::size_t>(size)}));
    } catch (const std::invalid_argument& error) {
      throw py::value_error("vocabulary entry " + std::to_string(i) + ": " + error.what());
    }
  }
  return decoded;
}

// What `append` adds to an empty buffer.
template <typename Append>
py::bytes written(Append append) {
  FrameBuffer buffer;
  append(buffer);
  return {buffer.data(), buffer.size()};
}

void register_vocabulary(py::module_& m) {
  py::classh<Vocabulary>(m, "Vocabulary")
      .def(py::init<const std::vector<std::string>&, const std::vector<std::int32_t>&,
                    const std::vector<std::int32_t>&>(),
           "token_bytes"_a, "special_ids"_a, "eos_ids"_a)
      .def("__len__", &Vocabulary::size)
      .def(
          "bytes", [](const Vocabulary& self, std::int32_t id) { return py::bytes(self.bytes(id)); }, "id"_a)
      .def("special", &Vocabulary::special, "id"_a)
      .def("eos", &Vocabulary::eos, "id"_a);
  m.def("decode_byte_level", &decode_byte_level_entries, "entries"_a);
}

void register_matching(py::module_& m) {
  py::class_<Detokenizer>(m, "Detokenizer")
      .def(py::init<>())
      .def(
          "push",
          [](Detokenizer& self, const py::bytes& token_bytes) {
            std::string out;
            self.push(token_bytes, out);
            return out;
          },
          "token_bytes"_a)
      .def("flush", [](Detokenizer& self) {
        std::string out;
        self.flush(out);
        return out;
      });
  py::class_<StopMatcher>(m, "StopMatcher")
      .def(py::init<const std::vector<std::string>&>(), "stops"_a)
      .def(
          "push",
          [](StopMatcher& self, std::string_view text) {
            std::string out;
            const bool stopped = self.push(text, out);
            return std::pair(out, stopped);
          },
          "text"_a)
      .def("flush", [](StopMatcher& self) {
        std::string out;
        self.flush(out);
        return out;
      });
}

void register_framing(py::module_& m) {
  m.def(
      "json_string",
      [](std::string_view text) { return written([&](FrameBuffer& out) { append_json_string(out, text); }); },
      "text"_a);
  m.def(
      "token_event",
      [](std::uint32_t index, std::int32_t token_id, std::string_view text, std::optional<float> logprob) {
        const float value = logprob.value_or(std::numeric_limits<float>::quiet_NaN());
        return written([&](FrameBuffer& out) { append_token_event(out, index, token_id, text, value); });
      },
      "index"_a, "token_id"_a, "text"_a, "logprob"_a = py::none());
  m.def(
      "error_event",
      [](std::string_view message, std::string_view type, std::string_view code,
         std::optional<std::string_view> param) {
        return written([&](FrameBuffer& out) { append_error_event(out, message, type, code, param); });
      },
      "message"_a, "type"_a, "code"_a, "param"_a = py::none());
}

}  // namespace

void register_text(py::module_& m) {
  register_vocabulary(m);
  register_matching(m);
  register_framing(m);
}

}  // namespace rts::bindings
