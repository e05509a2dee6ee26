#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "bindings.hpp"
#include "cpu/decoder.hpp"
#include "cpu/packed_file.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace rts::bindings {
namespace {

using cpu::Decoder;
using cpu::DecoderLimits;
using cpu::DecoderSpec;
using cpu::DecoderWeights;
using cpu::Epilogue;
using cpu::KvFormat;
using cpu::NormKind;
using cpu::StoredTensor;
using cpu::StoredTensors;
using cpu::ThreadPool;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

const GgufTensorType& type_named(std::string_view name) {
  constexpr std::uint32_t kIds = 64;
  for (std::uint32_t id = 0; id < kIds; ++id) {
    const GgufTensorType* const type = find_gguf_type(id);
    if (type != nullptr && type->name == name) return *type;
  }
  throw std::invalid_argument("there is no tensor type '" + std::string(name) + "'");
}

// A tensor as Python has it; it keeps the memory that it describes.
struct CpuTensor {
  Bytes bytes;
  StoredTensor stored;
};

CpuTensor make_tensor(Bytes bytes, const std::string& type, std::size_t rows, std::size_t columns,
                      std::size_t pair_heads) {
  StoredTensor stored{
      .type = &type_named(type), .bytes = {}, .rows = rows, .columns = columns, .pair_heads = pair_heads};
  stored.bytes = {reinterpret_cast<const std::byte*>(bytes.data()), static_cast<std::size_t>(bytes.size())};
  return {std::move(bytes), stored};
}

Epilogue activation_named(const std::string& name) {
  if (name == "silu_gate") return Epilogue::kSiluGate;
  if (name == "gelu_gate") return Epilogue::kGeluGate;
  if (name == "gelu") return Epilogue::kGelu;
  throw std::invalid_argument("there is no activation '" + name + "'");
}

NormKind norm_named(const std::string& name) {
  if (name == "rms") return NormKind::kRms;
  if (name == "layer") return NormKind::kLayer;
  throw std::invalid_argument("there is no norm '" + name + "'");
}

KvFormat kv_format_named(const std::string& name) {
  if (name == "int8") return KvFormat::kInt8;
  if (name == "float16") return KvFormat::kFloat16;
  throw std::invalid_argument("keys and values cannot be kept as '" + name + "'");
}

DecoderSpec spec_from(const py::dict& values) {
  const auto count = [&](const char* key) { return values[key].cast<std::size_t>(); };
  const auto number = [&](const char* key) { return values[key].cast<float>(); };
  DecoderSpec spec{.layers = count("layers"),
                   .hidden = count("hidden"),
                   .heads = count("heads"),
                   .kv_heads = count("kv_heads"),
                   .head_dim = count("head_dim"),
                   .intermediate = count("intermediate"),
                   .vocabulary = count("vocabulary"),
                   .norm = norm_named(values["norm"].cast<std::string>()),
                   .activation = activation_named(values["activation"].cast<std::string>()),
                   .norm_epsilon = number("norm_epsilon"),
                   .attention_scale = number("attention_scale"),
                   .embedding_scale = number("embedding_scale"),
                   .windows = values["windows"].cast<std::vector<std::size_t>>(),
                   .frequencies = values["frequencies"].cast<std::vector<float>>(),
                   .local_frequencies = values["local_frequencies"].cast<std::vector<float>>()};
  spec.check();
  return spec;
}

// A decoder's weights with the threads that run it, and all that they point to.
class CpuWeights {
 public:
  CpuWeights(const py::dict& spec, const std::map<std::string, CpuTensor>& tensors, std::size_t threads,
             std::size_t value_bits)
      : spec_(spec_from(spec)), threads_(threads) {
    StoredTensors stored;
    for (const auto& [part, tensor] : tensors) {
      kept_.emplace(part, tensor.bytes);
      stored.emplace(part, tensor.stored);
    }
    weights_.emplace(spec_, stored, value_bits);
  }

  // Whether the file has what would be packed; then it is used.
  bool open_packed(const std::filesystem::path& path, const std::string& description) {
    std::optional<cpu::PackedFile> found;
    {
      const py::gil_scoped_release release;
      found = cpu::PackedFile::open(path, cpu::PackedKey::of(description), weights_->packed_bytes());
    }
    if (!found) return false;
    use(std::move(*found));
    return true;
  }

  // Packs into a file that open_packed() finds from then on.
  void create_packed(const std::filesystem::path& path, const std::string& description) {
    auto made = packed([&](const cpu::PackedFile::Fill& fill) {
      return cpu::PackedFile::create(path, cpu::PackedKey::of(description), weights_->packed_bytes(), fill);
    });
    if (const auto* const error = std::get_if<std::error_code>(&made)) {
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error->value(), error->message(), py::cast(path)).ptr());
      throw py::error_already_set();
    }
    use(std::get<cpu::PackedFile>(std::move(made)));
  }

  void pack() {
    use(packed(
        [&](const cpu::PackedFile::Fill& fill) { return cpu::PackedFile::in_memory(weights_->packed_bytes(), fill); }));
  }

  const DecoderSpec& spec() const { return spec_; }
  const DecoderWeights& weights() const { return *weights_; }
  ThreadPool& threads() { return threads_; }

 private:
  // What `make` makes, without the GIL, of a function that packs.
  template <typename Make>
  std::invoke_result_t<Make, const cpu::PackedFile::Fill&> packed(Make make) {
    if (packed_) throw std::invalid_argument("the weights are packed already");
    const py::gil_scoped_release release;
    return make([this](std::span<std::byte> payload) { weights_->pack(payload, threads_); });
  }

  // From now on only the embeddings are read from what Python gave: the rest may be gigabytes.
  void use(cpu::PackedFile file) {
    packed_ = std::move(file);
    weights_->bind(packed_->bytes());
    std::erase_if(kept_, [](const auto& entry) { return entry.first != "embedding" && entry.first != "positions"; });
  }

  DecoderSpec spec_;
  std::map<std::string, Bytes> kept_;  // what the weights are read from
  ThreadPool threads_;
  std::optional<DecoderWeights> weights_;
  std::optional<cpu::PackedFile> packed_;
};

// The logits of each of a text's tokens, [tokens, vocabulary], by a decoder of its own.
py::array_t<float> logits_of(CpuWeights& weights,
                             py::array_t<std::int32_t, py::array::c_style | py::array::forcecast> ids,
                             const std::string& kv_format) {
  const auto tokens = static_cast<std::size_t>(ids.size());
  const std::size_t blocks = (tokens + cpu::kBlockPositions - 1) / cpu::kBlockPositions;
  const DecoderLimits limits{.max_tokens = tokens,
                             .max_samples = tokens,
                             .max_context = tokens,
                             .num_blocks = blocks,
                             .kv_format = kv_format_named(kv_format)};
  py::array_t<float> out({ids.size(), static_cast<py::ssize_t>(weights.spec().vocabulary)});
  float* const to = out.mutable_data();
  std::vector<std::int32_t> given(ids.data(), ids.data() + tokens);
  const py::gil_scoped_release release;
  std::vector<std::int32_t> positions(tokens), table(blocks);
  std::vector<std::int64_t> at(tokens);
  std::iota(positions.begin(), positions.end(), 0);
  std::iota(table.begin(), table.end(), 0);
  std::iota(at.begin(), at.end(), 0);
  std::vector<std::int64_t> slots = at;
  std::int32_t starts[] = {0, static_cast<std::int32_t>(tokens)}, context = starts[1], row = 0;
  const StepBuffers batch{.tokens = given.data(),
                          .positions = positions.data(),
                          .kv_slots = slots.data(),
                          .query_start = starts,
                          .context_len = &context,
                          .rows = &row,
                          .block_table = table.data(),
                          .logits_at = at.data()};
  Decoder decoder(weights.spec(), weights.weights(), weights.threads(), cpu::kernels(), limits);
  const auto count = static_cast<std::uint32_t>(tokens);
  std::ranges::copy(decoder.forward({.tokens = count, .sequences = 1, .samples = count}, batch), to);
  return out;
}

// Runs a step whose arrays Python owns (a StepBatch): the logits that it wants, a view that the next step overwrites.
py::array_t<float> forward(const py::object& self, const py::object& batch) {
  auto& decoder = self.cast<Decoder&>();
  std::vector<py::array> kept;  // an array of another kind is converted
  const auto numbers = [&]<typename Number>(const char* name, Number*& to) {
    const auto array = batch.attr(name).cast<py::array_t<Number, py::array::c_style>>();
    to = const_cast<Number*>(array.data());  // they are only read
    kept.push_back(array);
    return static_cast<std::uint32_t>(array.size());
  };
  StepBuffers buffers;
  StepShape shape;
  shape.tokens = numbers("tokens", buffers.tokens);
  shape.sequences = numbers("context_len", buffers.context_len);
  shape.samples = numbers("logits_at", buffers.logits_at);
  numbers("positions", buffers.positions);
  numbers("kv_slots", buffers.kv_slots);
  numbers("query_start", buffers.query_start);
  numbers("rows", buffers.rows);
  numbers("block_table", buffers.block_table);
  std::span<const float> logits;
  {
    const py::gil_scoped_release release;
    logits = decoder.forward(shape, buffers);
  }
  const auto samples = static_cast<py::ssize_t>(shape.samples);
  const auto vocabulary = samples == 0 ? 0 : static_cast<py::ssize_t>(logits.size()) / samples;
  return py::array_t<float>({samples, vocabulary}, logits.data(), self);
}

}  // namespace

void register_cpu_model(py::module_& m) {
  py::class_<CpuTensor>(m, "CpuTensor")
      .def(py::init(&make_tensor), "bytes"_a, "type"_a, "rows"_a, "columns"_a, py::kw_only(), "pair_heads"_a = 0);
  py::class_<CpuWeights>(m, "CpuWeights")
      .def(py::init<const py::dict&, const std::map<std::string, CpuTensor>&, std::size_t, std::size_t>(), "spec"_a,
           "tensors"_a, py::kw_only(), "threads"_a, "value_bits"_a = 8)
      .def_property_readonly("layer_bits", [](const CpuWeights& self) { return self.weights().layer_bits(); })
      .def_property_readonly("packed_bytes", [](const CpuWeights& self) { return self.weights().packed_bytes(); })
      .def(
          "kv_block_bytes",
          [](const CpuWeights& self, const std::string& kv_format) {
            return Decoder::kv_block_bytes(self.spec(), kv_format_named(kv_format));
          },
          "kv_format"_a)
      .def("open_packed", &CpuWeights::open_packed, "path"_a, "description"_a)
      .def("create_packed", &CpuWeights::create_packed, "path"_a, "description"_a)
      .def("pack", &CpuWeights::pack)
      .def("logits", &logits_of, "ids"_a, py::kw_only(), "kv_format"_a = "int8");
  py::class_<Decoder, NativeModel>(m, "CpuModel")
      .def(py::init([](CpuWeights& weights, std::size_t max_tokens, std::size_t max_samples, std::size_t max_context,
                       std::size_t num_blocks, const std::string& kv_format) {
             const DecoderLimits limits{max_tokens, max_samples, max_context, num_blocks, kv_format_named(kv_format)};
             return std::make_unique<Decoder>(weights.spec(), weights.weights(), weights.threads(), cpu::kernels(),
                                              limits);
           }),
           "weights"_a, py::kw_only(), "max_tokens"_a, "max_samples"_a, "max_context"_a, "num_blocks"_a,
           "kv_format"_a = "int8", py::keep_alive<1, 2>())
      .def("forward", &forward, "batch"_a);
  m.attr("KV_BLOCK_POSITIONS") = cpu::kBlockPositions;
  m.def("cpu_kernels", [] { return cpu::kernels().name; });
  m.def("available_cpu_kernels", [] {
    std::vector<std::string_view> names;
    for (const cpu::Kernels* const available : cpu::available_kernels()) names.push_back(available->name);
    return names;
  });
}

}  // namespace rts::bindings
