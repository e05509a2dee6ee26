#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.hpp"
#include "cpu/paged_attention.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace rts::bindings {
namespace {

using cpu::PagedAttention;
using cpu::TokenHeads;
using Int32 = py::array_t<std::int32_t, py::array::c_style>;
using Int64 = py::array_t<std::int64_t, py::array::c_style>;
using Floats = py::array_t<float, 0>;  // of any strides

constexpr auto kFloatSize = static_cast<py::ssize_t>(sizeof(float));

// With the arrays of the step, which must live as long.
class BoundPagedAttention {
 public:
  BoundPagedAttention(std::size_t layers, std::size_t heads, std::size_t kv_heads, std::size_t head_dim,
                      std::size_t num_blocks, std::size_t threads)
      : attention_({layers, heads, kv_heads, head_dim}, num_blocks, threads) {}

  void begin_step(const Int32& query_start, const Int32& context_len, const Int32& rows, const Int32& block_table,
                  const Int64& kv_slots) {
    const py::ssize_t sequences = context_len.size();
    if (query_start.size() != sequences + 1 || rows.size() != sequences || block_table.ndim() != 2) {
      throw std::invalid_argument("the step's arrays do not fit each other");
    }
    if (kv_slots.size() != query_start.data()[sequences]) throw std::invalid_argument("there must be a slot a token");
    held_ = py::make_tuple(block_table, kv_slots);
    attention_.begin_step({.sequences = static_cast<std::size_t>(sequences),
                           .query_start = query_start.data(),
                           .context_len = context_len.data(),
                           .rows = rows.data(),
                           .block_table = block_table.data(),
                           .row_blocks = static_cast<std::size_t>(block_table.shape(1))},
                          kv_slots.data());
  }

  void attend(std::size_t layer, const Floats& query, const Floats& key, const Floats& value, float scale,
              std::optional<std::size_t> window, py::array_t<float, py::array::c_style>& out) {
    const cpu::PagedAttentionShape& shape = attention_.shape();
    if (layer >= shape.layers) throw std::out_of_range("there is no layer " + std::to_string(layer));
    const TokenHeads queries = heads_of(query, shape.heads), keys = heads_of(key, shape.kv_heads),
                     values = heads_of(value, shape.kv_heads);
    heads_of(out, shape.heads);
    float* const to = out.mutable_data();
    const py::gil_scoped_release release;
    attention_.attend(layer, queries, keys, values, scale, window.value_or(0), to);
  }

 private:
  // [tokens, heads, head_dim]
  TokenHeads heads_of(const Floats& array, std::size_t heads) const {
    if (array.ndim() != 3 || static_cast<std::size_t>(array.shape(0)) != attention_.tokens() ||
        static_cast<std::size_t>(array.shape(1)) != heads ||
        static_cast<std::size_t>(array.shape(2)) != attention_.shape().head_dim) {
      throw std::invalid_argument("an array must be [tokens, heads, head_dim] of the step");
    }
    if (array.strides(2) != kFloatSize || array.strides(0) % kFloatSize != 0 || array.strides(1) % kFloatSize != 0) {
      throw std::invalid_argument("a head's numbers must lie beside each other");
    }
    return {array.data(), array.strides(0) / kFloatSize, array.strides(1) / kFloatSize};
  }

  PagedAttention attention_;
  py::object held_;
};

}  // namespace

void register_paged_attention(py::module_& m) {
  py::class_<BoundPagedAttention>(m, "PagedAttention")
      .def(py::init<std::size_t, std::size_t, std::size_t, std::size_t, std::size_t, std::size_t>(), py::kw_only(),
           "layers"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "num_blocks"_a, "threads"_a)
      .def("begin_step", &BoundPagedAttention::begin_step, py::kw_only(), "query_start"_a.noconvert(),
           "context_len"_a.noconvert(), "rows"_a.noconvert(), "block_table"_a.noconvert(), "kv_slots"_a.noconvert())
      .def("attend", &BoundPagedAttention::attend, "layer"_a, "query"_a.noconvert(), "key"_a.noconvert(),
           "value"_a.noconvert(), py::kw_only(), "scale"_a, "window"_a.none(true), "out"_a.noconvert());
}

}  // namespace rts::bindings
