#include "cpu/attention.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <ostream>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/kernels.hpp"
#include "rts/half.hpp"

namespace rts::cpu {

void PrintTo(const AttentionShape& shape, std::ostream* out) {
  *out << shape.heads << "/" << shape.kv_heads << "/" << shape.head_dim << " window " << shape.window;
}

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kGuard = 12345.0F;

template <typename Number>
Number number_of(float value) {
  if constexpr (std::is_same_v<Number, float>) return value;
  return static_cast<Number>(to_half(value));
}

template <typename Number>
float rounded(float value) {
  if constexpr (std::is_same_v<Number, float>) return value;
  return from_half(to_half(value));
}

void store(const Kernels& kernels, const AttentionShape& shape, const KvLayer& cache, std::int64_t slot,
           const float* key, const float* value) {
  kernels.store_kv(shape, cache, slot, key, value);
}
void store(const Kernels& kernels, const AttentionShape& shape, const KvLayerFloat& cache, std::int64_t slot,
           const float* key, const float* value) {
  kernels.store_kv_float(shape, cache, slot, key, value);
}
void attend(const Kernels& kernels, const AttentionShape& shape, const KvLayer& cache, const AttentionTask& task) {
  kernels.attend(shape, cache, task);
}
void attend(const Kernels& kernels, const AttentionShape& shape, const KvLayerFloat& cache, const AttentionTask& task) {
  kernels.attend_float(shape, cache, task);
}

AttentionShape shape_of(std::size_t heads, std::size_t kv_heads, std::size_t head_dim, std::size_t window = 0) {
  return {heads, kv_heads, head_dim, 1.0F / std::sqrt(static_cast<float>(head_dim)), window};
}

// What a model of this shape would give attention for a sequence: keys and values for each position, and queries, of
// which those kQueryRows apart are the same.
struct Sequence {
  static constexpr std::size_t kQueryRows = 32;

  Sequence(const AttentionShape& of_shape, std::size_t of_length, std::uint32_t seed)
      : shape(of_shape), length(of_length) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto draw = [&](std::vector<float>& numbers, std::size_t count) {
      numbers.resize(count);
      for (float& x : numbers) x = normal(random);
    };
    draw(queries, kQueryRows * query_columns());
    draw(keys, length * kv_columns());
    draw(values, length * kv_columns());
    // Scores that differ by more than a few, as a trained model's do.
    for (float& x : queries) x *= 2.0F;
  }

  std::size_t query_columns() const { return shape.heads * shape.head_dim; }
  std::size_t kv_columns() const { return shape.kv_heads * shape.head_dim; }
  const float* query(std::size_t position) const { return &queries[position % kQueryRows * query_columns()]; }
  float* query(std::size_t position) { return &queries[position % kQueryRows * query_columns()]; }

  AttentionShape shape;
  std::size_t length;
  std::vector<float> queries, keys, values;
};

// A sequence's cache in blocks that lie anywhere; what is not its own is `unwritten`.
template <typename Number>
class Cache {
 public:
  Cache(const Kernels& kernels, const Sequence& sequence, float unwritten, std::uint32_t seed)
      : kernels_(kernels), sequence_(sequence) {
    const std::size_t own_blocks = (sequence.length + kBlockPositions - 1) / kBlockPositions;
    const std::size_t blocks = own_blocks + 3;
    std::vector<std::int32_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    table_.assign(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(own_blocks));
    keys_.assign(blocks * kBlockPositions * sequence.kv_columns(), number_of<Number>(unwritten));
    values_ = keys_;
    for (std::size_t position = 0; position < sequence.length; ++position) {
      store(kernels, sequence.shape, layer(), slot(position), &sequence.keys[position * sequence.kv_columns()],
            &sequence.values[position * sequence.kv_columns()]);
    }
  }

  KvLayerOf<Number> layer() { return {keys_.data(), values_.data(), kBlockPositions * sequence_.kv_columns()}; }
  std::int64_t slot(std::size_t position) const {
    return table_[position / kBlockPositions] * static_cast<std::int64_t>(kBlockPositions) +
           static_cast<std::int64_t>(position % kBlockPositions);
  }

  // The outputs of the queries [first, first + count) with all heads, [count][heads × head_dim].
  std::vector<float> attend_to(std::size_t first, std::size_t count) {
    const AttentionShape& shape = sequence_.shape;
    const std::size_t columns = sequence_.query_columns(), stride = columns + 8;
    std::vector<float> query(count * stride, kNan), out(count * stride, kGuard);
    for (std::size_t i = 0; i < count; ++i) {
      std::copy_n(sequence_.query(first + i), columns, &query[i * stride]);
    }
    // Whatever a task finds in its scratch memory is of no account.
    const std::size_t scratch_floats = attention_scratch(shape);
    std::vector<float> memory(scratch_floats + 32, kNan);
    float* const scratch = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) / sizeof(float);
    scratch[scratch_floats] = kGuard;
    for (std::size_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
      attend(kernels_, shape, layer(),
             {table_.data(), kv_head, first, count, query.data(), stride, out.data(), stride, scratch});
      const std::size_t written = (kv_head + 1) * columns / shape.kv_heads;
      for (std::size_t i = 0; i < count; ++i) {
        const auto row = out.begin() + static_cast<std::ptrdiff_t>(i * stride);
        EXPECT_TRUE(std::all_of(row + static_cast<std::ptrdiff_t>(written), row + static_cast<std::ptrdiff_t>(stride),
                                [](float x) { return x == kGuard; }));
      }
    }
    EXPECT_EQ(scratch[scratch_floats], kGuard);
    std::vector<float> packed;
    for (std::size_t i = 0; i < count; ++i) {
      const auto row = out.begin() + static_cast<std::ptrdiff_t>(i * stride);
      packed.insert(packed.end(), row, row + static_cast<std::ptrdiff_t>(columns));
    }
    return packed;
  }

 private:
  const Kernels& kernels_;
  const Sequence& sequence_;
  std::vector<std::int32_t> table_;
  std::vector<Number> keys_, values_;
};

// The same for one query, in double precision, of keys and values as the cache rounds them.
template <typename Number>
std::vector<double> reference(const Sequence& sequence, std::size_t position) {
  const AttentionShape& shape = sequence.shape;
  const std::size_t begin = shape.window != 0 && position + 1 > shape.window ? position + 1 - shape.window : 0;
  std::vector<double> keys, values, out(sequence.query_columns());
  for (const float x : sequence.keys) keys.push_back(rounded<Number>(x));
  for (const float x : sequence.values) values.push_back(rounded<Number>(x));
  for (std::size_t head = 0; head < shape.heads; ++head) {
    const std::size_t column = head / (shape.heads / shape.kv_heads) * shape.head_dim;
    const float* const query = sequence.query(position) + head * shape.head_dim;
    std::vector<double> weights;
    for (std::size_t at = begin; at <= position; ++at) {
      const double* const key = &keys[at * sequence.kv_columns() + column];
      double score = 0;
      for (std::size_t i = 0; i < shape.head_dim; ++i) score += query[i] * key[i];
      weights.push_back(score * shape.scale);
    }
    const double largest = *std::max_element(weights.begin(), weights.end());
    double total = 0;
    for (double& weight : weights) total += weight = std::exp(weight - largest);
    for (std::size_t at = begin; at <= position; ++at) {
      const double* const value = &values[at * sequence.kv_columns() + column];
      for (std::size_t i = 0; i < shape.head_dim; ++i) {
        out[head * shape.head_dim + i] += weights[at - begin] / total * value[i];
      }
    }
  }
  return out;
}

std::vector<float> slice(const std::vector<float>& rows, std::size_t columns, std::size_t row) {
  const auto begin = rows.begin() + static_cast<std::ptrdiff_t>(row * columns);
  return {begin, begin + static_cast<std::ptrdiff_t>(columns)};
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

template <typename Expected>
double largest_difference(const std::vector<float>& a, const std::vector<Expected>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - double{b[i]});
    largest = std::isnan(difference) ? kInfinity : std::max(largest, difference);
  }
  return largest;
}

bool is_all_nan(const std::vector<float>& row) {
  return std::all_of(row.begin(), row.end(), [](float x) { return std::isnan(x); });
}

const std::vector<AttentionShape>& shapes() {
  static const std::vector<AttentionShape> shapes{
      shape_of(9, 3, 64),     shape_of(4, 1, 256, 100), shape_of(12, 12, 64), shape_of(8, 2, 80),
      shape_of(32, 8, 128),   shape_of(14, 2, 64),      shape_of(5, 1, 72),   shape_of(2, 2, 8),
      shape_of(6, 2, 96, 13), shape_of(9, 3, 64, 300),  shape_of(3, 1, 256),
  };
  return shapes;
}

template <typename Number>
class AttentionTest : public testing::Test {};
using Numbers = testing::Types<std::uint16_t, float>;
TYPED_TEST_SUITE(AttentionTest, Numbers);

TYPED_TEST(AttentionTest, IsWithinRoundingOfTheReference) {
  for (const AttentionShape& shape : shapes()) {
    for (const std::size_t length : {1, 15, 16, 17, 255, 256, 257, 700, 2000}) {
      const Sequence sequence(shape, length, 1);
      const std::vector<double> expected = reference<TypeParam>(sequence, length - 1);
      for (const Kernels* const kernels : available_kernels()) {
        Cache<TypeParam> cache(*kernels, sequence, kNan, 1);
        EXPECT_LT(largest_difference(cache.attend_to(length - 1, 1), expected), 5e-6)
            << kernels->name << " " << testing::PrintToString(shape) << " length " << length;
      }
    }
  }
}

// Neither the queries beside it, nor the blocks, nor what lies in the cache where it does not look.
TYPED_TEST(AttentionTest, AQuerysBitsAreItsOwn) {
  for (const Kernels* const kernels : available_kernels()) {
    for (const AttentionShape& shape : shapes()) {
      for (const std::size_t length : {20, 261, 530}) {
        const Sequence sequence(shape, length, 2);
        Cache<TypeParam> cache(*kernels, sequence, 0.0F, 2), elsewhere(*kernels, sequence, kNan, 3);
        const std::size_t first = length - 20;
        std::vector<std::vector<float>> alone;
        for (std::size_t i = 0; i < 20; ++i) alone.push_back(cache.attend_to(first + i, 1));
        for (const std::size_t queries : {2, 5, 16}) {
          for (std::size_t start = 0; start + queries <= 20; start += 3) {
            const std::vector<float> together = elsewhere.attend_to(first + start, queries);
            for (std::size_t i = 0; i < queries; ++i) {
              ASSERT_TRUE(same_bits(slice(together, sequence.query_columns(), i), alone[start + i]))
                  << kernels->name << " " << testing::PrintToString(shape) << " query " << first + start + i << " of "
                  << queries << " from " << first + start;
            }
          }
        }
      }
    }
  }
}

TYPED_TEST(AttentionTest, AQueryIsUntouchedByNanThatItDoesNotSee) {
  constexpr std::size_t kLength = 300, kFirst = 284, kWrong = 7;
  for (const Kernels* const kernels : available_kernels()) {
    for (const AttentionShape& shape : shapes()) {
      const Sequence sequence(shape, kLength, 4);
      Cache<TypeParam> cache(*kernels, sequence, kNan, 4);
      const std::vector<float> expected = cache.attend_to(kFirst, kMaxQueries);

      Sequence wrong = sequence;
      std::fill_n(wrong.query(kFirst + kWrong), wrong.query_columns(), kNan);
      std::fill_n(wrong.keys.begin() + (kFirst + kWrong) * wrong.kv_columns(), wrong.kv_columns(), kNan);
      std::fill_n(wrong.values.begin() + (kFirst + kWrong) * wrong.kv_columns(), wrong.kv_columns(), kNan);
      Cache<TypeParam> wrong_cache(*kernels, wrong, kNan, 4);
      const std::vector<float> found = wrong_cache.attend_to(kFirst, kMaxQueries);
      for (std::size_t i = 0; i < kMaxQueries; ++i) {
        const std::vector<float> row = slice(found, wrong.query_columns(), i);
        const bool sees = i >= kWrong && (shape.window == 0 || i < kWrong + shape.window);
        EXPECT_TRUE(sees ? is_all_nan(row) : same_bits(row, slice(expected, wrong.query_columns(), i)))
            << kernels->name << " " << testing::PrintToString(shape) << " query " << i;
      }
    }
  }
}

TYPED_TEST(AttentionTest, ANanQueryIsNanAlone) {
  constexpr std::size_t kWrong = 7;
  // A payload in the low bits, which arithmetic on bits may lose.
  const float payload = std::bit_cast<float>(0x7FC00001U);
  for (const Kernels* const kernels : available_kernels()) {
    for (const AttentionShape& shape : shapes()) {
      for (const std::size_t length : {40, 300}) {
        const std::size_t first = length - kMaxQueries;
        Sequence sequence(shape, length, 5);
        Cache<TypeParam> cache(*kernels, sequence, kNan, 5);
        const std::vector<float> expected = cache.attend_to(first, kMaxQueries);
        std::fill_n(sequence.query(first + kWrong), sequence.query_columns(), payload);
        const std::vector<float> found = cache.attend_to(first, kMaxQueries);
        for (std::size_t i = 0; i < kMaxQueries; ++i) {
          const std::vector<float> row = slice(found, sequence.query_columns(), i);
          EXPECT_TRUE(i == kWrong ? is_all_nan(row) : same_bits(row, slice(expected, sequence.query_columns(), i)))
              << kernels->name << " " << testing::PrintToString(shape) << " query " << i << " length " << length;
        }
      }
    }
  }
}

// A maximum that rises from segment to segment by far more than exp can tell, and one that falls.
TYPED_TEST(AttentionTest, LargeScoresNeitherOverflowNorVanish) {
  for (const float slope : {0.25F, -0.25F}) {
    Sequence sequence(shape_of(2, 1, 8), 1100, 6);
    sequence.shape.scale = 1.0F;
    std::fill(sequence.queries.begin(), sequence.queries.end(), 1.0F);
    for (std::size_t i = 0; i < sequence.keys.size(); ++i) sequence.keys[i] = slope * static_cast<float>(i / 8);
    const std::vector<double> expected = reference<TypeParam>(sequence, sequence.length - 1);
    for (const Kernels* const kernels : available_kernels()) {
      Cache<TypeParam> cache(*kernels, sequence, kNan, 6);
      EXPECT_LT(largest_difference(cache.attend_to(sequence.length - 1, 1), expected), 1e-6) << kernels->name;
    }
  }
}

TYPED_TEST(AttentionTest, AllInstructionSetsAgree) {
  const Kernels& portable = *available_kernels().back();
  for (const AttentionShape& shape : shapes()) {
    const Sequence sequence(shape, 600, 7);
    const std::vector<float> expected = Cache<TypeParam>(portable, sequence, kNan, 7).attend_to(584, 16);
    for (const Kernels* const kernels : available_kernels()) {
      Cache<TypeParam> cache(*kernels, sequence, kNan, 7);
      EXPECT_LT(largest_difference(cache.attend_to(584, 16), expected), 5e-6)
          << kernels->name << " " << testing::PrintToString(shape);
    }
  }
}

TEST(AttentionNumbersTest, TheCachesNumbersAreTheOnlyDifference) {
  for (const Kernels* const kernels : available_kernels()) {
    for (const AttentionShape& shape : shapes()) {
      Sequence sequence(shape, 300, 8);
      for (float& x : sequence.keys) x = rounded<std::uint16_t>(x);
      for (float& x : sequence.values) x = rounded<std::uint16_t>(x);
      Cache<std::uint16_t> halves(*kernels, sequence, kNan, 8);
      Cache<float> floats(*kernels, sequence, kNan, 8);
      EXPECT_TRUE(same_bits(halves.attend_to(290, 10), floats.attend_to(290, 10)))
          << kernels->name << " " << testing::PrintToString(shape);
    }
  }
}

TYPED_TEST(AttentionTest, APositionIsStoredInItsPlacesOnly) {
  const std::vector<float> special{0.0F,     -0.0F,    1.0F,     -2.5F,      65504.0F, 65519.0F,  65520.0F,   -1e9F,
                                   0x1p-14F, 0x1p-24F, 0x1p-25F, 0x1.8p-25F, 1e-9F,    kInfinity, -kInfinity, 2049.0F};
  for (const Kernels* const kernels : available_kernels()) {
    for (const std::size_t head_dim : {8, 64, 72}) {
      const AttentionShape shape = shape_of(4, 2, head_dim);
      constexpr std::size_t kBlocks = 3;
      constexpr std::int64_t kSlot = kBlockPositions + 5;
      const std::size_t columns = shape.kv_heads * head_dim;
      std::vector<float> key(columns), value(columns);
      for (std::size_t i = 0; i < columns; ++i) {
        key[i] = special[i % special.size()];
        value[i] = special[(i + 3) % special.size()];
      }
      const TypeParam unwritten = number_of<TypeParam>(kGuard);
      std::vector<TypeParam> keys(kBlocks * kBlockPositions * columns, unwritten), values = keys;
      std::vector<TypeParam> expected_keys = keys, expected_values = keys;
      for (std::size_t head = 0; head < shape.kv_heads; ++head) {
        for (std::size_t i = 0; i < head_dim; ++i) {
          const std::size_t block = (1 * shape.kv_heads + head) * kBlockPositions * head_dim;
          expected_keys[block + i * kBlockPositions + 5] = number_of<TypeParam>(key[head * head_dim + i]);
          expected_values[block + 5 * head_dim + i] = number_of<TypeParam>(value[head * head_dim + i]);
        }
      }
      store(*kernels, shape, KvLayerOf<TypeParam>{keys.data(), values.data(), kBlockPositions * columns}, kSlot,
            key.data(), value.data());
      EXPECT_EQ(keys, expected_keys) << kernels->name << " " << head_dim;
      EXPECT_EQ(values, expected_values) << kernels->name << " " << head_dim;
    }
  }
}

}  // namespace
}  // namespace rts::cpu
