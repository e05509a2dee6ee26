#include "cpu/decoder_weights.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>
#include <stdexcept>

namespace rts::cpu {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kNoRow = static_cast<std::size_t>(-1);

constexpr std::size_t rounded_up(std::size_t value, std::size_t to) {
  return (value + to - 1) / to * to;
}

std::string shape_text(std::size_t rows, std::size_t columns) {
  std::string text = "[";
  text.append(std::to_string(rows)).append(", ").append(std::to_string(columns)).append("]");
  return text;
}

// Where a row of a matrix is stored.
std::size_t stored_row(const StoredTensor& tensor, std::size_t row) {
  if (tensor.pair_heads == 0) return row;
  const std::size_t size = tensor.rows / tensor.pair_heads, head = row / size, i = row % size;
  return head * size + i % (size / 2) * 2 + i / (size / 2);
}

void read_row(const StoredTensor& tensor, std::size_t row, std::span<float> out) {
  const std::byte* const from = tensor.bytes.data() + row * tensor.row_bytes();
  tensor.type->dequantize(from, tensor.columns / tensor.type->block_values, out.data());
}

const GgufTensorType& float_type() {
  static const GgufTensorType& type = *find_gguf_type(static_cast<std::uint32_t>(GgufTypeId::kF32));
  return type;
}

}  // namespace

// Looks tensors up and checks their shapes.
class DecoderWeights::Reader {
 public:
  explicit Reader(const StoredTensors& tensors) : tensors_(tensors) {}

  const StoredTensor* find(const std::string& part) const {
    const auto found = tensors_.find(part);
    return found == tensors_.end() ? nullptr : &found->second;
  }

  StoredTensor matrix(const std::string& part, std::size_t rows, std::size_t columns) const {
    const StoredTensor* const tensor = find(part);
    if (tensor == nullptr) throw std::invalid_argument("tensor '" + part + "' is missing");
    if (tensor->rows != rows || tensor->columns != columns) {
      throw std::invalid_argument("tensor '" + part + "' has shape " + shape_text(tensor->rows, tensor->columns) +
                                  ", the model needs " + shape_text(rows, columns));
    }
    if (tensor->type->dequantize == nullptr) {
      throw std::invalid_argument("tensor '" + part + "' is stored as " + std::string(tensor->type->name) +
                                  ", which is not read here");
    }
    if (columns % tensor->type->block_values != 0 || tensor->bytes.size() != rows * tensor->row_bytes()) {
      throw std::invalid_argument("tensor '" + part + "' has " + std::to_string(tensor->bytes.size()) +
                                  " bytes, which are not rows of " + std::to_string(columns) + " values");
    }
    return *tensor;
  }

  std::vector<float> vector(const std::string& part, std::size_t size) const {
    const StoredTensor* const tensor = find(part);
    if (tensor == nullptr) return {};
    std::vector<float> values(size);
    read_row(matrix(part, 1, size), 0, values);
    if (!std::ranges::all_of(values, [](float value) { return std::isfinite(value); })) {
      throw std::invalid_argument("tensor '" + part + "' has values that are not finite");
    }
    return values;
  }

  NormWeights norm(const std::string& part, std::size_t size) const {
    return {vector(part, size), vector(part + ".bias", size)};
  }

  NormWeights required_norm(const std::string& part, std::size_t size) const {
    if (find(part) == nullptr) throw std::invalid_argument("tensor '" + part + "' is missing");
    return norm(part, size);
  }

 private:
  const StoredTensors& tensors_;
};

DecoderWeights::DecoderWeights(const DecoderSpec& spec, const StoredTensors& tensors, std::size_t value_bits)
    : layers_(spec.layers) {
  if (value_bits != 4 && value_bits != 8) throw std::invalid_argument("weights have 4 or 8 bits");
  const Reader reader(tensors);
  const std::size_t hidden = spec.hidden, head_dim = spec.head_dim;
  const std::size_t queries = spec.heads * head_dim, keys = spec.kv_heads * head_dim;
  embedding_ = reader.matrix("embedding", spec.vocabulary, hidden);
  if (const StoredTensor* const positions = reader.find("positions")) {
    positions_ = reader.matrix("positions", positions->rows, hidden);
  }
  norm_ = reader.required_norm("norm", hidden);
  for (std::size_t i = 0; i < spec.layers; ++i) {
    LayerWeights& layer = layers_[i];
    const std::string prefix = std::to_string(i) + ".";
    layer.attention_norm = reader.required_norm(prefix + "attention_norm", hidden);
    layer.mlp_norm = reader.required_norm(prefix + "mlp_norm", hidden);
    layer.q_norm = reader.norm(prefix + "q_norm", head_dim);
    layer.k_norm = reader.norm(prefix + "k_norm", head_dim);
    layer.attention_post_norm = reader.norm(prefix + "attention_post_norm", hidden);
    layer.mlp_post_norm = reader.norm(prefix + "mlp_post_norm", hidden);
    add(layer.q, reader, prefix + "q", queries, hidden, value_bits);
    add(layer.k, reader, prefix + "k", keys, hidden, value_bits);
    add(layer.v, reader, prefix + "v", keys, hidden, value_bits);
    add(layer.output, reader, prefix + "output", hidden, queries, value_bits);
    add(layer.up, reader, prefix + "up", spec.intermediate, hidden, value_bits, spec.is_gated() ? prefix + "gate" : "");
    add(layer.down, reader, prefix + "down", hidden, spec.intermediate, value_bits);
  }
  add(head_, reader, "head", spec.vocabulary, hidden, 8);
}

std::vector<std::size_t> DecoderWeights::layer_bits() const {
  std::set<std::size_t> bits;
  for (const Source& source : sources_) {
    if (source.matrix != &head_) bits.insert(source.shape.value_bits);
  }
  return {bits.begin(), bits.end()};
}

void DecoderWeights::add(PackedMatrix& matrix, const Reader& reader, const std::string& part, std::size_t outputs,
                         std::size_t inputs, std::size_t value_bits, const std::string& gate) {
  Source source{
      .part = part, .tensor = reader.matrix(part, outputs, inputs), .gate = {}, .shape = {}, .matrix = &matrix};
  std::vector<float> bias = reader.vector(part + ".bias", outputs);
  bool is_exact = packs_exactly(*source.tensor.type), minimums = has_minimums(*source.tensor.type);
  std::size_t packed_outputs = outputs;
  if (!gate.empty()) {
    source.gate = reader.matrix(gate, outputs, inputs);
    // Rows of two types are packed as floats.
    is_exact = is_exact && source.gate.type == source.tensor.type;
    minimums = minimums && is_exact;
    packed_outputs = 2 * rounded_up(outputs, kLanes);
    const std::vector<float> gate_bias = reader.vector(gate + ".bias", outputs);
    if (!bias.empty() || !gate_bias.empty()) {
      std::vector<float> both(packed_outputs);
      for (std::size_t i = 0; i < outputs; ++i) {
        const std::size_t at = i / kLanes * 2 * kLanes + i % kLanes;
        if (!gate_bias.empty()) both[at] = gate_bias[i];
        if (!bias.empty()) both[at + kLanes] = bias[i];
      }
      bias = std::move(both);
    }
  }
  source.shape = {.outputs = packed_outputs,
                  .inputs = inputs,
                  .has_minimums = is_exact ? minimums : value_bits == 4,
                  .value_bits = is_exact ? std::size_t{4} : value_bits};
  source.offset = packed_bytes_;
  packed_bytes_ += rounded_up(source.shape.bytes(), kAlignment) + kAlignment;  // the multiplier is behind it
  matrix.shape = source.shape;
  if (!bias.empty()) matrix.bias = biases_.emplace_back(std::move(bias)).data();
  sources_.push_back(std::move(source));
}

namespace {

// The rows of a panel side by side, in the order of its outputs.
class PanelRows {
 public:
  // `gate` has no type where there is none.
  PanelRows(const StoredTensor& tensor, const StoredTensor& gate) : tensor_(tensor), gate_(gate) {
    as_floats_ = gate.type != nullptr && gate.type != tensor.type;
    rows_.type = as_floats_ ? &float_type() : tensor.type;
    rows_.columns = tensor.columns;
    rows_.row_bytes = as_floats_ ? tensor.columns * sizeof(float) : tensor.row_bytes();
    bytes_.resize(kPanelOutputs * rows_.row_bytes);
    rows_.bytes = bytes_.data();
  }

  // `outputs` of them: those past the matrix's end are zero, as zero bytes are in every type.
  const StoredRows& gather(std::size_t panel, std::size_t outputs) {
    for (std::size_t i = 0; i < outputs; ++i) {
      std::byte* const to = bytes_.data() + i * rows_.row_bytes;
      const StoredTensor& from = gate_.type != nullptr && i < kLanes ? gate_ : tensor_;
      const std::size_t row = gate_.type == nullptr ? panel * kPanelOutputs + i : panel * kLanes + i % kLanes;
      if (row >= tensor_.rows) {
        std::memset(to, 0, rows_.row_bytes);
        continue;
      }
      const std::size_t stored = stored_row(from, row);
      if (as_floats_) {
        read_row(from, stored, {reinterpret_cast<float*>(to), rows_.columns});
      } else {
        std::memcpy(to, from.bytes.data() + stored * rows_.row_bytes, rows_.row_bytes);
      }
    }
    return rows_;
  }

 private:
  const StoredTensor& tensor_;
  const StoredTensor& gate_;
  bool as_floats_;
  StoredRows rows_;
  std::vector<std::byte> bytes_;
};

constexpr auto kPanelRowNumbers = [] {
  std::array<std::size_t, kPanelOutputs> numbers{};
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}();

}  // namespace

void DecoderWeights::pack(std::span<std::byte> to, ThreadPool& threads) const {
  std::atomic<std::size_t> next{0}, not_finite{kNoRow};
  threads.run([&](std::size_t) {
    std::vector<float> scratch;
    for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < sources_.size();) {
      // The output layer, often the largest matrix by far, is the last of them: it is begun first.
      const Source& source = sources_[sources_.size() - 1 - i];
      PanelRows rows(source.tensor, source.gate);
      scratch.resize(source.shape.inputs);
      const auto outputs_of = [&](std::size_t panel) {
        return std::min(kPanelOutputs, source.shape.outputs - panel * kPanelOutputs);
      };
      float largest = 0;
      for (std::size_t panel = 0; panel < source.shape.panels(); ++panel) {
        const std::size_t outputs = outputs_of(panel);
        const float of_panel =
            largest_scale(rows.gather(panel, outputs), {kPanelRowNumbers.data(), outputs}, source.shape.value_bits);
        if (!std::isfinite(of_panel)) not_finite.store(sources_.size() - 1 - i, std::memory_order_relaxed);
        largest = std::max(largest, of_panel);
      }
      const float multiplier = multiplier_for(largest);
      std::byte* const begin = to.data() + source.offset;
      std::memcpy(begin + rounded_up(source.shape.bytes(), kAlignment), &multiplier, sizeof multiplier);
      for (std::size_t panel = 0; panel < source.shape.panels(); ++panel) {
        const std::size_t outputs = outputs_of(panel);
        pack_panel(rows.gather(panel, outputs), {kPanelRowNumbers.data(), outputs}, source.shape, multiplier, scratch,
                   begin + panel * source.shape.panel_bytes());
      }
    }
  });
  if (const std::size_t i = not_finite.load(std::memory_order_relaxed); i != kNoRow) {
    throw std::invalid_argument("tensor '" + sources_[i].part + "' has values that are not finite");
  }
}

void DecoderWeights::bind(std::span<const std::byte> from) {
  for (const Source& source : sources_) {
    source.matrix->bytes = from.data() + source.offset;
    std::memcpy(&source.matrix->multiplier, source.matrix->bytes + rounded_up(source.shape.bytes(), kAlignment),
                sizeof source.matrix->multiplier);
  }
}

void DecoderWeights::embed(std::size_t token, std::span<float> out) const {
  read_row(embedding_, token, out);
}

void DecoderWeights::embed_position(std::size_t position, std::span<float> out) const {
  read_row(positions_, position, out);
}

}  // namespace rts::cpu
