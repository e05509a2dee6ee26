#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "bindings.hpp"
#include "rts/null_model.hpp"

namespace py = pybind11;

namespace rts::bindings {

void register_native_model(py::module_& m) {
  static const SteadyClock clock;
  py::class_<NativeModel>(m, "NativeModel", "A model in C++, for EngineCore.run.");
  py::class_<NullModel, NativeModel>(m, "NullModel", "Says first_token + position % tokens, every step_ns.")
      .def(py::init([](std::int32_t first_token, std::int32_t tokens, std::int64_t step_ns) {
             return std::make_unique<NullModel>(first_token, tokens, step_ns, clock);
           }),
           py::kw_only(), py::arg("first_token"), py::arg("tokens"), py::arg("step_ns"));
}

}  // namespace rts::bindings
