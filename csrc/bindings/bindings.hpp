#pragma once

#include <pybind11/pybind11.h>

// One function a concern, each in its bind_<concern>.cpp.
namespace rts::bindings {

void register_channel(pybind11::module_& m);
void register_channel_server(pybind11::module_& m);
void register_cpu_model(pybind11::module_& m);
void register_engine_core(pybind11::module_& m);
void register_gguf(pybind11::module_& m);
void register_native_model(pybind11::module_& m);
void register_paged_attention(pybind11::module_& m);
void register_priority_queue(pybind11::module_& m);
void register_scheduling_slice(pybind11::module_& m);
void register_text(pybind11::module_& m);

}  // namespace rts::bindings
