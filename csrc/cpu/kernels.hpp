#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "cpu/attention.hpp"
#include "cpu/packed_matrix.hpp"
#include "cpu/quantized_rows.hpp"

namespace rts::cpu {

// What becomes of a product.
enum class Epilogue : std::uint8_t {
  kStore,     // out = y
  kAdd,       // out += y
  kSiluGate,  // outputs come in vectors of kLanes: a gate's, then those it opens; out[j] = silu(gate[j]) × up[j]
  kGeluGate,  // the same with GELU, by tanh
  kGelu,      // out = gelu(y), by tanh
};

// Panels [begin, end) of a matrix.
struct PanelRange {
  std::size_t begin, end;
  // What will be multiplied after them, its beginning at least, or nothing: it is fetched into the caches meanwhile.
  std::span<const std::byte> next = {};
};

// The inner loops of one instruction set. All do the same to a row, whatever rows are beside it and however panels are
// split among threads: integer sums are exact, and what is rounded is rounded in one order. No state, no allocation.
struct Kernels {
  std::string_view name;

  // Rotates and quantizes `rows` rows of `columns` values, `stride` floats apart, into rows first_row.. of `out`.
  // A row that holds NaN or an infinity gets a NaN scale.
  void (*quantize)(const float* values, std::size_t columns, std::size_t stride, std::size_t rows,
                   const QuantizedRows& out, std::size_t first_row) noexcept;

  // Multiplies `rows` rows with some panels of a matrix. out[row × stride + output]; with a gate, half as many outputs
  // a row. Outputs past the matrix's own are not written.
  void (*multiply)(const PackedMatrix& matrix, const PanelRange& panels, const QuantizedRows& input, std::size_t rows,
                   Epilogue epilogue, float* out, std::size_t stride) noexcept;

  // See attention.hpp.
  void (*store_kv)(const AttentionShape& shape, const KvLayer& cache, std::int64_t slot, const float* key,
                   const float* value) noexcept;
  void (*attend)(const AttentionShape& shape, const KvLayer& cache, const AttentionTask& task) noexcept;
  void (*store_kv_float)(const AttentionShape& shape, const KvLayerFloat& cache, std::int64_t slot, const float* key,
                         const float* value) noexcept;
  void (*attend_float)(const AttentionShape& shape, const KvLayerFloat& cache, const AttentionTask& task) noexcept;

  void (*store_kv_int8)(const AttentionShape& shape, const KvLayerInt8& cache, std::int64_t slot, const float* key,
                        const float* value) noexcept;
  void (*attend_int8)(const AttentionShape& shape, const KvLayerInt8& cache, const AttentionTask& task) noexcept;

  // out = x / sqrt(mean(x²) + epsilon) × weight. `out` may be `x`.
  void (*rms_norm)(const float* x, const float* weight, std::size_t size, float epsilon, float* out) noexcept;
  // out = (x - mean) / sqrt(variance + epsilon) × weight + bias.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, std::size_t size, float epsilon,
                     float* out) noexcept;
  // Turns the pairs (x[i], x[i + size / 2]) of a head by the angles whose cosines and sines are given, [size / 2] each.
  void (*rotate_positions)(float* x, std::size_t size, const float* cosines, const float* sines) noexcept;
  // x += y
  void (*add)(float* x, const float* y, std::size_t size) noexcept;
};

// The best that this processor runs; RTS_CPU_ISA in the environment ("avx512", "avx2", "portable") asks for another,
// and throws std::invalid_argument where that cannot be had here.
const Kernels& kernels();
// Those that this processor runs, the best first.
std::span<const Kernels* const> available_kernels() noexcept;

}  // namespace rts::cpu
