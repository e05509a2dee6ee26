#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "activations.hpp"
#include "cpu/kernels.hpp"
#include "stored_matrix.hpp"

namespace rts::cpu {
namespace {

using testing::Activations;
using testing::PackedWeights;
using testing::random_matrix;
using testing::random_rows;

class EachKernels : public ::testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& kernels() const { return *GetParam(); }

  // One run over all panels.
  std::vector<float> multiply(const PackedWeights& weights, const Activations& activations, std::size_t rows,
                              Epilogue epilogue = Epilogue::kStore, std::vector<float> out = {}) const {
    const PackedMatrix matrix = weights.packed();
    const std::size_t outputs = outputs_of(matrix, epilogue);
    if (out.empty()) out.resize(rows * outputs);
    kernels().multiply(matrix, {0, matrix.shape.panels()}, activations.rows(), rows, epilogue, out.data(), outputs);
    return out;
  }
  static std::size_t outputs_of(const PackedMatrix& matrix, Epilogue epilogue) {
    const bool is_gated = epilogue == Epilogue::kSiluGate || epilogue == Epilogue::kGeluGate;
    return matrix.shape.outputs / (is_gated ? 2 : 1);
  }
};

std::string name_of(const ::testing::TestParamInfo<const Kernels*>& info) {
  return std::string(info.param->name);
}
INSTANTIATE_TEST_SUITE_P(All, EachKernels, ::testing::ValuesIn(available_kernels().begin(), available_kernels().end()),
                         name_of);

// What the integers and scales say, and the norm that an error is measured by.
struct Reference {
  double value = 0;
  double norm = 0;
};
Reference reference_of(const PackedWeights& weights, const Activations& activations, std::size_t row,
                       std::size_t output) {
  const QuantizedRows& rows = activations.rows();
  Reference reference;
  double squares = 0;
  for (std::size_t group = 0; group < rows.groups(); ++group) {
    const std::size_t at = row * rows.groups() + group;
    std::int64_t products = 0;
    for (std::size_t i = 0; i < kGroup; ++i) {
      products += weights.value(output, group * kGroup + i) * rows.values[at * kGroup + i];
    }
    const double product = weights.scale(output, group) * rows.scales[at] * static_cast<double>(products);
    const double rest = weights.minimum(output, group) * rows.sums[at];
    reference.value += product + rest;
    squares += product * product + rest * rest;
  }
  if (!weights.bias.empty()) {
    reference.value += weights.bias[output];
    squares += static_cast<double>(weights.bias[output]) * weights.bias[output];
  }
  reference.norm = std::sqrt(squares);
  return reference;
}

struct Shape {
  GgufTypeId type;
  std::size_t inputs, outputs, rows, value_bits = 8;
};
constexpr Shape kShapes[] = {
    {GgufTypeId::kQ4_1, 576, 960, 5},  {GgufTypeId::kQ4_1, 1536, 576, 13}, {GgufTypeId::kQ8_0, 576, 49152, 1},
    {GgufTypeId::kQ4_0, 576, 576, 64}, {GgufTypeId::kF16, 40, 7, 3},       {GgufTypeId::kF32, 1, 1, 1},
    {GgufTypeId::kQ4_1, 32, 33, 100},  {GgufTypeId::kQ4_K, 2048, 70, 7},   {GgufTypeId::kBF16, 31, 95, 50},
    {GgufTypeId::kF16, 40, 7, 3, 4},   {GgufTypeId::kF32, 576, 96, 20, 4},
};

TEST_P(EachKernels, MultipliesAsTheNumbersSay) {
  for (const Shape& shape : kShapes) {
    PackedWeights weights(random_matrix(shape.type, shape.outputs, shape.inputs), shape.value_bits);
    weights.bias = random_rows(1, shape.outputs, 3);
    Activations activations(shape.rows, shape.inputs);
    activations.quantize(kernels(), random_rows(shape.rows, shape.inputs), shape.inputs);
    const std::vector<float> out = multiply(weights, activations, shape.rows);
    const std::size_t step = shape.outputs > 1000 ? 97 : 1;
    for (std::size_t row = 0; row < shape.rows; ++row) {
      for (std::size_t output = 0; output < shape.outputs; output += step) {
        const Reference reference = reference_of(weights, activations, row, output);
        ASSERT_NEAR(out[row * shape.outputs + output], reference.value, 2e-6 * reference.norm)
            << shape.inputs << " to " << shape.outputs << ", row " << row << ", output " << output;
      }
    }
  }
}

// The whole way, from stored weights and floats.
TEST_P(EachKernels, AProductIsNearThatOfTheWeights) {
  for (const GgufTypeId type : {GgufTypeId::kQ4_1, GgufTypeId::kQ4_0, GgufTypeId::kF32, GgufTypeId::kQ8_0}) {
    constexpr std::size_t kRows = 3, kInputs = 576, kOutputs = 64;
    const testing::StoredMatrix matrix = random_matrix(type, kOutputs, kInputs);
    const PackedWeights weights(matrix);
    const std::vector<float> values = random_rows(kRows, kInputs);
    Activations activations(kRows, kInputs);
    activations.quantize(kernels(), values, kInputs);
    const std::vector<float> out = multiply(weights, activations, kRows);
    double error = 0, power = 0;
    for (std::size_t output = 0; output < kOutputs; ++output) {
      const std::vector<float> row = matrix.row(output);
      for (std::size_t i = 0; i < kRows; ++i) {
        double expected = 0;
        for (std::size_t input = 0; input < kInputs; ++input) {
          expected += static_cast<double>(row[input]) * values[i * kInputs + input];
        }
        error += std::pow(out[i * kOutputs + output] - expected, 2);
        power += std::pow(expected, 2);
      }
    }
    EXPECT_LT(std::sqrt(error / power), 0.01) << matrix.type->name;
  }
}

TEST_P(EachKernels, ARowIsTheSameInAnyCompany) {
  constexpr std::size_t kMostRows = 70, kInputs = 608, kOutputs = 150;
  for (const GgufTypeId type : {GgufTypeId::kQ4_1, GgufTypeId::kQ4_0}) {
    const PackedWeights weights(random_matrix(type, kOutputs, kInputs));
    const std::vector<float> values = random_rows(kMostRows, kInputs);
    Activations alone(1, kInputs);
    std::vector<float> expected;
    for (std::size_t row = 0; row < kMostRows; ++row) {
      alone.quantize(kernels(), {values.begin() + row * kInputs, values.begin() + (row + 1) * kInputs}, kInputs);
      const std::vector<float> out = multiply(weights, alone, 1);
      expected.insert(expected.end(), out.begin(), out.end());
    }
    Activations together(kMostRows, kInputs);
    together.quantize(kernels(), values, kInputs);
    for (std::size_t rows = 1; rows <= kMostRows; ++rows) {
      const std::vector<float> out = multiply(weights, together, rows);
      ASSERT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0) << rows;
    }
  }
}

TEST_P(EachKernels, ManyRowsAreTheSameAsFew) {
  constexpr std::size_t kRows = 1000, kInputs = 1536, kOutputs = 96;
  const PackedWeights weights(random_matrix(GgufTypeId::kQ4_1, kOutputs, kInputs));
  const std::vector<float> values = random_rows(kRows, kInputs);
  Activations together(kRows, kInputs), alone(1, kInputs);
  together.quantize(kernels(), values, kInputs);
  const std::vector<float> out = multiply(weights, together, kRows);
  for (std::size_t row = 0; row < kRows; row += 37) {
    alone.quantize(kernels(), {values.begin() + row * kInputs, values.begin() + (row + 1) * kInputs}, kInputs);
    const std::vector<float> expected = multiply(weights, alone, 1);
    ASSERT_EQ(std::memcmp(out.data() + row * kOutputs, expected.data(), kOutputs * sizeof(float)), 0) << row;
  }
}

TEST_P(EachKernels, PanelsMayBeSplitAnyhow) {
  constexpr std::size_t kRows = 9, kInputs = 320, kOutputs = 210;
  const PackedWeights weights(random_matrix(GgufTypeId::kQ4_1, kOutputs, kInputs));
  const PackedMatrix matrix = weights.packed();
  Activations activations(kRows, kInputs);
  activations.quantize(kernels(), random_rows(kRows, kInputs), kInputs);
  const std::vector<float> expected = multiply(weights, activations, kRows);
  for (std::size_t split = 0; split <= matrix.shape.panels(); ++split) {
    std::vector<float> out(kRows * kOutputs);
    kernels().multiply(matrix, {split, matrix.shape.panels(), {matrix.bytes, 100}}, activations.rows(), kRows,
                       Epilogue::kStore, out.data(), kOutputs);
    kernels().multiply(matrix, {0, split}, activations.rows(), kRows, Epilogue::kStore, out.data(), kOutputs);
    EXPECT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0) << split;
  }
}

TEST_P(EachKernels, AgreesWithThePortableOnes) {
  for (const Shape& shape : kShapes) {
    const PackedWeights weights(random_matrix(shape.type, shape.outputs, shape.inputs), shape.value_bits);
    const PackedMatrix matrix = weights.packed();
    Activations activations(shape.rows, shape.inputs);
    activations.quantize(kernels(), random_rows(shape.rows, shape.inputs), shape.inputs);
    const std::vector<float> out = multiply(weights, activations, shape.rows);
    std::vector<float> expected(out.size());
    available_kernels().back()->multiply(matrix, {0, matrix.shape.panels()}, activations.rows(), shape.rows,
                                         Epilogue::kStore, expected.data(), shape.outputs);
    for (std::size_t row = 0; row < shape.rows; ++row) {
      double norm = 0;
      for (std::size_t i = 0; i < shape.outputs; ++i) norm += std::pow(expected[row * shape.outputs + i], 2);
      for (std::size_t i = row * shape.outputs; i < (row + 1) * shape.outputs; ++i) {
        ASSERT_NEAR(out[i], expected[i], 1e-5 * std::sqrt(norm));
      }
    }
  }
}

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
double silu(double x) {
  return x * sigmoid(x);
}
double gelu(double x) {
  return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

TEST_P(EachKernels, WhatFollowsAProduct) {
  constexpr std::size_t kRows = 7, kInputs = 576, kOutputs = 160;
  PackedWeights weights(random_matrix(GgufTypeId::kQ4_1, kOutputs, kInputs));
  Activations activations(kRows, kInputs);
  // Products of all sizes, to the ends of what a sigmoid tells from 0 and 1.
  std::vector<float> values = random_rows(kRows, kInputs);
  for (std::size_t row = 0; row < kRows; ++row) {
    for (std::size_t i = 0; i < kInputs; ++i) values[row * kInputs + i] *= std::pow(10.0F, static_cast<float>(row) - 4);
  }
  activations.quantize(kernels(), values, kInputs);
  for (const bool has_bias : {false, true}) {
    if (has_bias) weights.bias = random_rows(1, kOutputs, 3);
    const std::vector<float> product = multiply(weights, activations, kRows);
    const std::vector<float> before = random_rows(kRows, kOutputs, 11);
    const std::vector<float> added = multiply(weights, activations, kRows, Epilogue::kAdd, before);
    const std::vector<float> gelus = multiply(weights, activations, kRows, Epilogue::kGelu);
    for (std::size_t i = 0; i < product.size(); ++i) {
      EXPECT_EQ(added[i], before[i] + product[i]);
      const double expected = gelu(product[i]);
      EXPECT_NEAR(gelus[i], expected, 1e-6 * std::fabs(product[i])) << product[i];
    }
    for (const Epilogue epilogue : {Epilogue::kSiluGate, Epilogue::kGeluGate}) {
      const std::vector<float> gated = multiply(weights, activations, kRows, epilogue);
      ASSERT_EQ(gated.size(), kRows * kOutputs / 2);
      for (std::size_t i = 0; i < gated.size(); ++i) {
        const std::size_t row = i / (kOutputs / 2), output = i % (kOutputs / 2);
        const std::size_t at = row * kOutputs + output / kLanes * 2 * kLanes + output % kLanes;
        const double gate = product[at], up = product[at + kLanes];
        const double expected = (epilogue == Epilogue::kSiluGate ? silu(gate) : gelu(gate)) * up;
        EXPECT_NEAR(gated[i], expected, 1e-6 * std::fabs(gate * up)) << gate << " × " << up;
        if (gate > -5) {
          EXPECT_NEAR(gated[i], expected, 3e-6 * std::fabs(expected)) << gate << " × " << up;
        }
      }
    }
  }
}

TEST_P(EachKernels, ANaNRowGivesNaNForItselfOnly) {
  constexpr std::size_t kRows = 14, kInputs = 96, kOutputs = 64;
  const PackedWeights weights(random_matrix(GgufTypeId::kQ4_1, kOutputs, kInputs));
  std::vector<float> values = random_rows(kRows, kInputs);
  Activations activations(kRows, kInputs);
  for (const Epilogue epilogue : {Epilogue::kStore, Epilogue::kAdd, Epilogue::kGelu, Epilogue::kSiluGate}) {
    const std::size_t outputs = outputs_of(weights.packed(), epilogue);
    activations.quantize(kernels(), values, kInputs);
    const std::vector<float> zero(kRows * outputs);
    const std::vector<float> expected = multiply(weights, activations, kRows, epilogue, zero);
    for (std::size_t row = 0; row < kRows; ++row) {
      std::vector<float> with_nan = values;
      with_nan[row * kInputs + 40] = std::numeric_limits<float>::quiet_NaN();
      activations.quantize(kernels(), with_nan, kInputs);
      const std::vector<float> out = multiply(weights, activations, kRows, epilogue, zero);
      for (std::size_t i = 0; i < out.size(); ++i) {
        if (i / outputs == row) {
          ASSERT_TRUE(std::isnan(out[i]));
        } else {
          ASSERT_EQ(out[i], expected[i]);
        }
      }
    }
  }
}

TEST_P(EachKernels, WritesItsOutputsOnly) {
  constexpr std::size_t kRows = 8, kInputs = 64, kStride = 131;
  constexpr float kUntouched = 12345.0F;
  for (const std::size_t outputs : {1U, 7U, 16U, 17U, 31U, 33U, 63U, 64U, 96U, 100U, 128U}) {
    const PackedWeights weights(random_matrix(GgufTypeId::kQ4_1, outputs, kInputs));
    Activations activations(kRows, kInputs);
    activations.quantize(kernels(), random_rows(kRows, kInputs), kInputs);
    for (const Epilogue epilogue :
         {Epilogue::kStore, Epilogue::kAdd, Epilogue::kGelu, Epilogue::kSiluGate, Epilogue::kGeluGate}) {
      if (outputs_of(weights.packed(), epilogue) != outputs && outputs % kPanelOutputs != 0) continue;
      std::vector<float> out(kRows * kStride, kUntouched);
      kernels().multiply(weights.packed(), {0, weights.shape.panels()}, activations.rows(), kRows, epilogue, out.data(),
                         kStride);
      for (std::size_t i = 0; i < out.size(); ++i) {
        const bool is_output = i % kStride < outputs_of(weights.packed(), epilogue);
        ASSERT_EQ(out[i] != kUntouched, is_output) << outputs << " outputs, at " << i;
      }
    }
  }
}

TEST_P(EachKernels, NoRowsAndNoPanelsAreNoWork) {
  const PackedWeights weights(random_matrix(GgufTypeId::kQ4_0, 64, 64));
  Activations activations(1, 64);
  activations.quantize(kernels(), random_rows(1, 64), 64);
  float out = 1;
  kernels().multiply(weights.packed(), {0, 2}, activations.rows(), 0, Epilogue::kStore, &out, 64);
  kernels().multiply(weights.packed(), {1, 1}, activations.rows(), 1, Epilogue::kStore, &out, 64);
  EXPECT_EQ(out, 1);
}

}  // namespace
}  // namespace rts::cpu
