#include <pybind11/pybind11.h>

#include "bindings.hpp"
#include "rts/scheduling_slice.hpp"

namespace rts::bindings {

void register_scheduling_slice(pybind11::module_& m) {
  m.def("ask_for_long_slices", &ask_for_long_slices);
}

}  // namespace rts::bindings
