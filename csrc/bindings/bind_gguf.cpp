#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "bindings.hpp"
#include "rts/gguf.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace rts::bindings {
namespace {

// What stands for bytes that are not UTF-8. A text is read by people, who can do with U+FFFD. The strings of an array
// and names are looked up by what they are, so two that differ must stay two: each such byte becomes a surrogate of its
// own, and encoding with "surrogateescape" gives the bytes back. A tokenizer then refuses the entry instead of silently
// merging it with another.
constexpr const char* kText = "replace";
constexpr const char* kExact = "surrogateescape";

py::str decode(std::string_view bytes, const char* errors) {
  PyObject* const text = PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), errors);
  if (text == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(text);
}

py::object to_python(const GgufValue& value, const char* errors = kText);

py::list to_list(const GgufArray& array) {
  py::list list(array.size);
  Py_ssize_t i = 0;
  for (const GgufValue& element : array) {
    PyList_SET_ITEM(list.ptr(), i++, to_python(element, kExact).release().ptr());
  }
  return list;
}

py::object to_python(const GgufValue& value, const char* errors) {
  return std::visit(
      [&](const auto& alternative) -> py::object {
        using Alternative = std::decay_t<decltype(alternative)>;
        if constexpr (std::is_same_v<Alternative, std::string_view>) {
          return decode(alternative, errors);
        } else if constexpr (std::is_same_v<Alternative, GgufArray>) {
          return to_list(alternative);
        } else if constexpr (std::is_same_v<Alternative, bool>) {
          return py::bool_(alternative);
        } else if constexpr (std::is_floating_point_v<Alternative>) {
          return py::float_(static_cast<double>(alternative));
        } else {
          return py::int_(alternative);
        }
      },
      value);
}

py::object read_only(const py::dict& dict) {
  PyObject* const proxy = PyDictProxy_New(dict.ptr());
  if (proxy == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(proxy);
}

std::vector<py::ssize_t> numpy_shape(const GgufTensor& tensor) {
  return {tensor.shape().begin(), tensor.shape().end()};
}

// A tensor's description. It holds nothing of the file, which itself holds these.
struct TensorInfo {
  py::tuple shape;
  py::str type;
  std::size_t nbytes;
};

TensorInfo describe(const GgufTensor& tensor) {
  return {py::tuple(py::cast(numpy_shape(tensor))), decode(tensor.type->name, kExact), tensor.bytes.size()};
}

// Runs `call` without the GIL. Messages hold the path, which need not be UTF-8.
template <typename Call>
auto without_gil(Call call) {
  std::string message;
  try {
    const py::gil_scoped_release release;
    return call();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  PyErr_SetObject(PyExc_RuntimeError, decode(message, kExact).ptr());
  throw py::error_already_set();
}

class BoundGgufFile {
 public:
  explicit BoundGgufFile(const std::filesystem::path& path)
      : file_(without_gil([&] { return GgufFile(path.native()); })) {}

  py::object tensors() {
    if (!tensors_) {
      py::dict dict;
      for (const GgufTensor& tensor : file_.tensors()) dict[decode(tensor.name, kExact)] = describe(tensor);
      tensors_ = read_only(dict);
    }
    return tensors_;
  }

  py::array_t<float> dequantize(const py::str& name) const {
    const GgufTensor& tensor = find(name);
    if (tensor.type->dequantize == nullptr) without_gil([&] { file_.dequantize(tensor, {}); });
    py::array_t<float> out(numpy_shape(tensor));
    const std::span values(out.mutable_data(), tensor.values);
    without_gil([&] { file_.dequantize(tensor, values); });
    return out;
  }

  const GgufFile& file() const { return file_; }

  const GgufTensor& find(const py::str& name) const {
    const auto bytes = py::reinterpret_steal<py::bytes>(PyUnicode_AsEncodedString(name.ptr(), "utf-8", kExact));
    if (!bytes) throw py::error_already_set();
    const GgufTensor* const tensor = file_.find_tensor(std::string_view(bytes));
    if (tensor == nullptr) {
      const py::str message = py::str("{}: there is no tensor {!r}").format(decode(file_.path(), kExact), name);
      PyErr_SetObject(PyExc_KeyError, message.ptr());
      throw py::error_already_set();
    }
    return *tensor;
  }

 private:
  GgufFile file_;
  py::object tensors_;
};

// A read-only mapping that makes Python's values when they are asked for, each time anew: a vocabulary with its merges
// takes ten megabytes of them, and who wants a number need not have those.
class GgufMetadata {
 public:
  explicit GgufMetadata(py::object file) : file_(std::move(file)) {}

  std::size_t size() const { return entries().size(); }
  py::iterator keys() const {
    py::list names;
    for (const GgufEntry& entry : entries()) names.append(decode(entry.name, kExact));
    return py::iter(names);
  }
  bool contains(const py::object& key) const { return find(key) != nullptr; }
  py::object at(const py::object& key) const {
    if (const GgufEntry* const entry = find(key)) return to_python(entry->value);
    PyErr_SetObject(PyExc_KeyError, key.ptr());
    throw py::error_already_set();
  }

 private:
  std::span<const GgufEntry> entries() const { return file_.cast<const BoundGgufFile&>().file().metadata(); }
  const GgufEntry* find(const py::object& key) const {
    const auto is_it = [&](const GgufEntry& entry) { return decode(entry.name, kExact).equal(key); };
    const std::span all = entries();
    const auto found = std::ranges::find_if(all, is_it);
    return found == all.end() ? nullptr : &*found;
  }

  py::object file_;
};

// A view of the mapping that keeps its file.
py::array raw(const py::object& self, const py::str& name) {
  const std::span bytes = self.cast<const BoundGgufFile&>().find(name).bytes;
  py::array_t<std::uint8_t> view(static_cast<py::ssize_t>(bytes.size()),
                                 reinterpret_cast<const std::uint8_t*>(bytes.data()), self);
  view.attr("setflags")("write"_a = false);
  return view;
}

}  // namespace

void register_gguf(py::module_& m) {
  py::class_<TensorInfo>(m, "GgufTensor")
      .def_readonly("shape", &TensorInfo::shape)
      .def_readonly("type", &TensorInfo::type)
      .def_readonly("nbytes", &TensorInfo::nbytes);
  auto metadata = py::class_<GgufMetadata>(m, "GgufMetadata")
                      .def("__len__", &GgufMetadata::size)
                      .def("__iter__", &GgufMetadata::keys)
                      .def("__contains__", &GgufMetadata::contains)
                      .def("__getitem__", &GgufMetadata::at);
  // What a mapping has besides is Python's own.
  const py::object mapping = py::module_::import("collections.abc").attr("Mapping");
  for (const char* const name : {"get", "keys", "items", "values"}) metadata.attr(name) = mapping.attr(name);
  mapping.attr("register")(metadata);
  py::class_<BoundGgufFile>(m, "GgufFile")
      .def(py::init<const std::filesystem::path&>(), "path"_a)
      .def_property_readonly("metadata", [](py::object self) { return GgufMetadata(std::move(self)); })
      .def_property_readonly("tensors", &BoundGgufFile::tensors)
      .def("dequantize", &BoundGgufFile::dequantize, "name"_a)
      .def("release_pages", [](const BoundGgufFile& self) { self.file().release_pages(); })
      .def("raw", &raw, "name"_a);
}

}  // namespace rts::bindings
