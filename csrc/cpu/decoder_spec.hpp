#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/kernels.hpp"

namespace rts::cpu {

enum class NormKind : std::uint8_t { kRms, kLayer };

// What a decoder computes, beside its weights: pre-norm attention with grouped heads, then a feed-forward network,
// layer by layer. Which biases and which further norms there are is told by the weights.
struct DecoderSpec {
  std::size_t layers = 0;
  std::size_t hidden = 0;
  std::size_t heads = 0;
  std::size_t kv_heads = 0;
  std::size_t head_dim = 0;
  std::size_t intermediate = 0;
  std::size_t vocabulary = 0;
  NormKind norm = NormKind::kRms;
  Epilogue activation = Epilogue::kSiluGate;  // kSiluGate, kGeluGate or kGelu
  float norm_epsilon = 0;
  float attention_scale = 0;
  float embedding_scale = 1;
  std::vector<std::size_t> windows;      // [layers] positions that a query sees, its own being the last; 0: all
  std::vector<float> frequencies;        // [head_dim / 2] of rotary positions; empty: positions are embedded
  std::vector<float> local_frequencies;  // of layers with a window; empty: as the others

  bool is_gated() const { return activation != Epilogue::kGelu; }
  // Throws std::invalid_argument where the numbers make no decoder.
  void check() const;
};

}  // namespace rts::cpu
