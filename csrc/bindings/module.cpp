#include <pybind11/pybind11.h>

#include "bindings.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of realtime_serve.";
  rts::bindings::register_text(m);
  rts::bindings::register_channel(m);
  rts::bindings::register_channel_server(m);
  rts::bindings::register_native_model(m);
  rts::bindings::register_cpu_model(m);
  rts::bindings::register_engine_core(m);
  rts::bindings::register_gguf(m);
  rts::bindings::register_paged_attention(m);
  rts::bindings::register_priority_queue(m);
  rts::bindings::register_scheduling_slice(m);
}
