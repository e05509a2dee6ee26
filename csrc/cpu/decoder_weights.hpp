#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/decoder_spec.hpp"
#include "cpu/packed_matrix.hpp"
#include "cpu/thread_pool.hpp"
#include "rts/gguf_types.hpp"

namespace rts::cpu {

// A tensor as it lies in a file, [rows, columns] or, with one row, [columns].
struct StoredTensor {
  const GgufTensorType* type = nullptr;
  std::span<const std::byte> bytes;
  std::size_t rows = 1;
  std::size_t columns = 0;
  std::size_t pair_heads = 0;  // not 0: of so many heads, whose rows are rotary pairs side by side, not two halves

  std::size_t row_bytes() const { return columns / type->block_values * type->block_bytes; }
};

// A decoder's tensors by their part: "embedding", "positions", "head", "norm"; of layer 7 "7.q", "7.k", "7.v",
// "7.output", "7.gate", "7.up", "7.down", "7.attention_norm", "7.mlp_norm", "7.q_norm", "7.k_norm",
// "7.attention_post_norm", "7.mlp_post_norm"; and each with ".bias" behind it.
using StoredTensors = std::map<std::string, StoredTensor, std::less<>>;

struct NormWeights {
  std::vector<float> weight;  // empty: there is no such norm
  std::vector<float> bias;

  explicit operator bool() const { return !weight.empty(); }
};

struct LayerWeights {
  NormWeights attention_norm, mlp_norm, q_norm, k_norm, attention_post_norm, mlp_post_norm;
  PackedMatrix q, k, v, output, up, down;  // of a gated network, `up` has the gate's outputs between its own
};

// A decoder's weights: what is small as floats, the embeddings as they are stored, and the matrices packed, in memory
// that the caller provides.
class DecoderWeights {
 public:
  // Raises std::invalid_argument naming the part that is missing, of another shape, or not finite. `tensors`' bytes
  // must outlive the object. The layers' matrices that are not packed as they are get `value_bits`, 4 or 8; the output
  // layer's gets 8, for it decides on the token, and nothing behind it evens its errors out.
  DecoderWeights(const DecoderSpec& spec, const StoredTensors& tensors, std::size_t value_bits = 8);
  DecoderWeights(const DecoderWeights&) = delete;
  DecoderWeights& operator=(const DecoderWeights&) = delete;

  std::size_t packed_bytes() const { return packed_bytes_; }
  // Of the layers' matrices, ascending, each once.
  std::vector<std::size_t> layer_bits() const;
  // Writes the matrices to `to`, packed_bytes() at a multiple of 64. Raises std::invalid_argument where a weight is not
  // finite.
  void pack(std::span<std::byte> to, ThreadPool& threads) const;
  // From now on the matrices are those that lie packed at `from`, which must outlive the object.
  void bind(std::span<const std::byte> from);

  // A token's embedding, [hidden], as it is stored.
  void embed(std::size_t token, std::span<float> out) const;
  // A position's, where positions are embedded.
  bool has_positions() const { return positions_.type != nullptr; }
  std::size_t positions() const { return positions_.rows; }
  void embed_position(std::size_t position, std::span<float> out) const;

  const LayerWeights& layer(std::size_t i) const { return layers_[i]; }
  const NormWeights& norm() const { return norm_; }
  const PackedMatrix& head() const { return head_; }

 private:
  // A matrix to be packed: the rows of a tensor, or of two that take turns vector by vector.
  struct Source {
    std::string part;
    StoredTensor tensor;
    StoredTensor gate;  // without a type: there is none
    MatrixShape shape;
    std::size_t offset = 0;  // in the packed bytes
    PackedMatrix* matrix = nullptr;
  };
  class Reader;

  void add(PackedMatrix& matrix, const Reader& reader, const std::string& part, std::size_t outputs, std::size_t inputs,
           std::size_t value_bits, const std::string& gate = {});

  StoredTensor embedding_, positions_;
  NormWeights norm_;
  std::vector<LayerWeights> layers_;
  PackedMatrix head_;
  std::vector<Source> sources_;
  std::vector<std::vector<float>> biases_;
  std::size_t packed_bytes_ = 0;
};

}  // namespace rts::cpu
