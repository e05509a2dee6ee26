#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "cpu/kernels.hpp"

namespace rts::testing {

// Rows of activations and what quantize makes of them.
class Activations {
 public:
  Activations(std::size_t rows, std::size_t columns) : columns_(columns) {
    quantized_.inputs = (columns + cpu::kGroup - 1) / cpu::kGroup * cpu::kGroup;
    const std::size_t groups = rows * quantized_.groups();
    quantized_.values = aligned(values_, rows * quantized_.inputs);
    quantized_.scales = aligned(scales_, groups);
    quantized_.corrections = aligned(corrections_, groups);
    quantized_.sums = aligned(sums_, groups);
  }

  void quantize(const cpu::Kernels& kernels, const std::vector<float>& from, std::size_t stride,
                std::size_t first_row = 0) {
    kernels.quantize(from.data(), columns_, stride, from.size() / stride, quantized_, first_row);
  }
  const cpu::QuantizedRows& rows() const { return quantized_; }
  std::size_t inputs() const { return quantized_.inputs; }

 private:
  template <typename Number>
  static Number* aligned(std::vector<Number>& memory, std::size_t count) {
    constexpr std::size_t kAlignment = 64;
    memory.resize(count + kAlignment);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    return memory.data() + (kAlignment - address % kAlignment) % kAlignment / sizeof(Number);
  }

  std::size_t columns_;
  cpu::QuantizedRows quantized_;
  std::vector<std::int8_t> values_;
  std::vector<float> scales_, sums_;
  std::vector<std::int32_t> corrections_;
};

inline std::vector<float> random_rows(std::size_t rows, std::size_t columns, std::uint64_t seed = 7) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(rows * columns);
  for (float& value : values) value = normal(random);
  // Outliers, as activations have them.
  for (std::size_t i = 0; i < values.size(); i += 97) values[i] *= 30;
  return values;
}

}  // namespace rts::testing
