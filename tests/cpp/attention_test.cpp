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
#include <span>
#include <type_traits>
#include <vector>

#include "cpu/kernels.hpp"
#include "cpu/kv_kernels.hpp"
#include "rts/half.hpp"

namespace rts::cpu {

void PrintTo(const AttentionShape& shape, std::ostream* out) {
  *out << shape.heads << "/" << shape.kv_heads << "/" << shape.head_dim << " window " << shape.window;
}

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kGuard = 12345.0F;

// A cache of one layer, and what it makes of the numbers that it is given.
template <typename Number>
class FloatFormat {
 public:
  static constexpr double kTolerance = 5e-6;

  FloatFormat(const AttentionShape& shape, std::size_t blocks, float unwritten)
      : block_numbers_(kBlockPositions * shape.kv_heads * shape.head_dim) {
    keys_.assign(blocks * block_numbers_, number_of(unwritten));
    values_ = keys_;
  }

  KvLayerOf<Number> layer() { return {keys_.data(), values_.data(), block_numbers_}; }

  static Number number_of(float value) {
    if constexpr (std::is_same_v<Number, float>) return value;
    return static_cast<Number>(to_half(value));
  }
  static std::vector<float> kept(std::span<const float> head) {
    std::vector<float> numbers(head.begin(), head.end());
    if constexpr (std::is_same_v<Number, std::uint16_t>) {
      for (float& x : numbers) x = from_half(to_half(x));
    }
    return numbers;
  }
  static std::vector<float> kept_key(std::span<const float> head) { return kept(head); }
  static std::vector<float> kept_query(std::span<const float> head) { return {head.begin(), head.end()}; }
  static std::vector<float> kept_value(std::span<const float> head) { return kept(head); }

 private:
  std::size_t block_numbers_;
  std::vector<Number> keys_, values_;
};
using HalfFormat = FloatFormat<std::uint16_t>;
using SingleFormat = FloatFormat<float>;

class Int8Format {
 public:
  // A segment's 256 weights are rounded to 1/32767 of the largest value, of numbers that are 4 at most.
  static constexpr double kTolerance = 6e-4;

  Int8Format(const AttentionShape& shape, std::size_t blocks, float unwritten)
      : block_bytes_(shape.kv_heads * kv_record_bytes(shape.head_dim)), memory_(blocks * block_bytes_ / sizeof(float)) {
    std::ranges::fill(memory_, unwritten);
  }

  KvLayerInt8 layer() { return {reinterpret_cast<std::byte*>(memory_.data()), block_bytes_}; }

  // Turned, rounded, and turned back.
  static std::vector<float> kept_key(std::span<const float> head) {
    const std::size_t together = head.size() & ~(head.size() - 1);
    return turned(rounded(turned(head, together)), together, 1.0 / static_cast<double>(together));
  }
  static std::vector<float> kept_query(std::span<const float> head) { return kept_key(head); }
  static std::vector<float> kept_value(std::span<const float> head) { return rounded(head); }

  struct Quantized {
    std::vector<int> numbers;
    float scale;
  };
  static Quantized quantized(std::span<const float> head) {
    float largest = 0;
    for (const float x : head) largest = std::max(largest, std::abs(x));
    Quantized result{{}, largest * (1.0F / 127.0F)};
    for (const float x : head) {
      result.numbers.push_back(static_cast<int>(std::nearbyint(x * (127.0F * (1.0F / largest)))));
    }
    return result;
  }
  static std::vector<float> rounded(std::span<const float> head) {
    std::vector<float> result;
    const auto [numbers, scale] = quantized(head);
    for (const int number : numbers) result.push_back(static_cast<float>(number) * scale);
    return result;
  }
  // Products with each row of a Hadamard matrix.
  static std::vector<float> turned(std::span<const float> head, std::size_t together, double factor = 1) {
    std::vector<float> out(head.size());
    for (std::size_t i = 0; i < head.size(); ++i) {
      double sum = 0;
      for (std::size_t k = 0; k < together; ++k) {
        const double x = head[i / together * together + k];
        sum += std::popcount(i % together & k) % 2 == 0 ? x : -x;
      }
      out[i] = static_cast<float>(sum * factor);
    }
    return out;
  }

 private:
  std::size_t block_bytes_;
  std::vector<float> memory_;
};

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
template <typename Format>
class Cache {
 public:
  Cache(const Kernels& kernels, const Sequence& sequence, float unwritten, std::uint32_t seed)
      : kernels_(kernels),
        sequence_(sequence),
        own_blocks_((sequence.length + kBlockPositions - 1) / kBlockPositions),
        format_(sequence.shape, own_blocks_ + 3, unwritten) {
    std::vector<std::int32_t> order(own_blocks_ + 3);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    table_.assign(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(own_blocks_));
    for (std::size_t position = 0; position < sequence.length; ++position) {
      store_kv(kernels, sequence.shape, format_.layer(), slot(position),
               &sequence.keys[position * sequence.kv_columns()], &sequence.values[position * sequence.kv_columns()]);
    }
  }

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
      attend(kernels_, shape, format_.layer(),
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
  std::size_t own_blocks_;
  Format format_;
  std::vector<std::int32_t> table_;
};

// The same for one query, in double precision, of keys and values as the cache rounds them.
template <typename Format>
std::vector<double> reference(const Sequence& sequence, std::size_t position) {
  const AttentionShape& shape = sequence.shape;
  const std::size_t begin = shape.window != 0 && position + 1 > shape.window ? position + 1 - shape.window : 0;
  std::vector<double> keys, values, out(sequence.query_columns());
  const auto append = [](std::vector<double>& to, const std::vector<float>& head) {
    to.insert(to.end(), head.begin(), head.end());
  };
  for (std::size_t i = 0; i < sequence.keys.size(); i += shape.head_dim) {
    append(keys, Format::kept_key({&sequence.keys[i], shape.head_dim}));
    append(values, Format::kept_value({&sequence.values[i], shape.head_dim}));
  }
  for (std::size_t head = 0; head < shape.heads; ++head) {
    const std::size_t column = head / (shape.heads / shape.kv_heads) * shape.head_dim;
    const std::vector<float> query =
        Format::kept_query({sequence.query(position) + head * shape.head_dim, shape.head_dim});
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
      shape_of(6, 2, 96, 13), shape_of(9, 3, 64, 300),  shape_of(3, 1, 256),  shape_of(4, 2, 200),
  };
  return shapes;
}

template <typename Format>
class AttentionTest : public testing::Test {};
using Formats = testing::Types<HalfFormat, SingleFormat, Int8Format>;
TYPED_TEST_SUITE(AttentionTest, Formats);

TYPED_TEST(AttentionTest, IsWithinRoundingOfTheReference) {
  for (const AttentionShape& shape : shapes()) {
    for (const std::size_t length : {1, 15, 16, 17, 255, 256, 257, 700, 2000}) {
      const Sequence sequence(shape, length, 1);
      const std::vector<double> expected = reference<TypeParam>(sequence, length - 1);
      for (const Kernels* const kernels : available_kernels()) {
        Cache<TypeParam> cache(*kernels, sequence, kNan, 1);
        EXPECT_LT(largest_difference(cache.attend_to(length - 1, 1), expected), TypeParam::kTolerance)
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

      for (std::vector<float> Sequence::* const part : {&Sequence::keys, &Sequence::values}) {
        Sequence wrong = sequence;
        std::fill_n((wrong.*part).begin() + (kFirst + kWrong) * wrong.kv_columns(), wrong.kv_columns(), kNan);
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
      EXPECT_LT(largest_difference(cache.attend_to(sequence.length - 1, 1), expected), TypeParam::kTolerance / 5)
          << kernels->name;
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
      EXPECT_LT(largest_difference(cache.attend_to(584, 16), expected), TypeParam::kTolerance)
          << kernels->name << " " << testing::PrintToString(shape);
    }
  }
}

TEST(AttentionNumbersTest, TheCachesNumbersAreTheOnlyDifference) {
  for (const Kernels* const kernels : available_kernels()) {
    for (const AttentionShape& shape : shapes()) {
      Sequence sequence(shape, 300, 8);
      sequence.keys = HalfFormat::kept(sequence.keys);
      sequence.values = HalfFormat::kept(sequence.values);
      Cache<HalfFormat> halves(*kernels, sequence, kNan, 8);
      Cache<SingleFormat> floats(*kernels, sequence, kNan, 8);
      EXPECT_TRUE(same_bits(halves.attend_to(290, 10), floats.attend_to(290, 10)))
          << kernels->name << " " << testing::PrintToString(shape);
    }
  }
}

template <typename Number>
class FloatStoreTest : public testing::Test {};
using Numbers = testing::Types<std::uint16_t, float>;
TYPED_TEST_SUITE(FloatStoreTest, Numbers);

TYPED_TEST(FloatStoreTest, APositionIsStoredInItsPlacesOnly) {
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
      const TypeParam unwritten = FloatFormat<TypeParam>::number_of(kGuard);
      std::vector<TypeParam> keys(kBlocks * kBlockPositions * columns, unwritten), values = keys;
      std::vector<TypeParam> expected_keys = keys, expected_values = keys;
      for (std::size_t head = 0; head < shape.kv_heads; ++head) {
        for (std::size_t i = 0; i < head_dim; ++i) {
          const std::size_t block = (1 * shape.kv_heads + head) * kBlockPositions * head_dim;
          expected_keys[block + i * kBlockPositions + 5] = FloatFormat<TypeParam>::number_of(key[head * head_dim + i]);
          expected_values[block + 5 * head_dim + i] = FloatFormat<TypeParam>::number_of(value[head * head_dim + i]);
        }
      }
      store_kv(*kernels, shape, KvLayerOf<TypeParam>{keys.data(), values.data(), kBlockPositions * columns}, kSlot,
               key.data(), value.data());
      EXPECT_EQ(keys, expected_keys) << kernels->name << " " << head_dim;
      EXPECT_EQ(values, expected_values) << kernels->name << " " << head_dim;
    }
  }
}

TEST(Int8StoreTest, APositionIsStoredInItsPlacesOnly) {
  for (const Kernels* const kernels : available_kernels()) {
    for (const std::size_t head_dim : {8, 16, 64, 72, 96, 200, 256}) {
      const AttentionShape shape = shape_of(4, 2, head_dim);
      constexpr std::size_t kBlocks = 3, kOffset = 5;
      const std::size_t record = kv_record_bytes(head_dim), columns = shape.kv_heads * head_dim;
      std::mt19937 random(9);
      std::uniform_int_distribution<int> some(-99, 99);  // whose sums are exact in any order
      std::vector<float> key(columns), value(columns);
      for (float& x : key) x = static_cast<float>(some(random));
      for (float& x : value) x = static_cast<float>(some(random));

      std::vector<std::byte> expected(kBlocks * shape.kv_heads * record, std::byte{77});
      std::vector<std::byte> found = expected;
      for (std::size_t head = 0; head < shape.kv_heads; ++head) {
        std::byte* const to = &expected[(shape.kv_heads + head) * record];
        const auto put_scale = [&](std::size_t number, float scale) {
          std::memcpy(to + 2 * kBlockPositions * head_dim + number * sizeof scale, &scale, sizeof scale);
        };
        const std::size_t together = head_dim & ~(head_dim - 1);
        const auto [keys, key_scale] =
            Int8Format::quantized(Int8Format::turned({&key[head * head_dim], head_dim}, together));
        const auto [values, value_scale] = Int8Format::quantized({&value[head * head_dim], head_dim});
        put_scale(kOffset, key_scale);
        put_scale(kBlockPositions + kOffset, value_scale);
        for (std::size_t i = 0; i < head_dim; ++i) {
          to[i / 4 * 4 * kBlockPositions + kOffset * 4 + i % 4] = static_cast<std::byte>(keys[i] + kKeyBias);
          to[kBlockPositions * head_dim + kOffset / 2 * 2 * head_dim + 2 * i + kOffset % 2] =
              static_cast<std::byte>(values[i]);
        }
      }
      store_kv(*kernels, shape, KvLayerInt8{found.data(), shape.kv_heads * record}, kBlockPositions + kOffset,
               key.data(), value.data());
      EXPECT_EQ(found, expected) << kernels->name << " " << head_dim;
    }
  }
}

// A channel of keys that is a hundred times the others, as some models have: it takes the others' precision only where
// nothing is turned.
TEST(Int8AttentionTest, AnOutlyingChannelOfKeysDoesNotDrownTheOthers) {
  Sequence sequence(shape_of(9, 3, 64), 300, 10);
  for (std::size_t i = 17; i < sequence.keys.size(); i += 64) sequence.keys[i] = 100;
  for (std::size_t i = 17; i < sequence.queries.size(); i += 64) sequence.queries[i] = 0;
  const std::vector<double> expected = reference<SingleFormat>(sequence, 299);
  for (const Kernels* const kernels : available_kernels()) {
    EXPECT_LT(largest_difference(Cache<Int8Format>(*kernels, sequence, kNan, 10).attend_to(299, 1), expected), 0.15)
        << kernels->name;
  }
}

// One number of a head is enough, the last one too; heads that do not share it are as they were.
TEST(Int8AttentionTest, ANumberThatIsNotFiniteMakesItsHeadNan) {
  for (const AttentionShape& shape : {shape_of(9, 3, 64), shape_of(4, 2, 72), shape_of(4, 2, 200)}) {
    const Sequence sequence(shape, 40, 12);
    const std::size_t group = shape.heads / shape.kv_heads * shape.head_dim;
    for (const Kernels* const kernels : available_kernels()) {
      const std::vector<float> expected = Cache<Int8Format>(*kernels, sequence, kNan, 12).attend_to(39, 1);
      for (std::vector<float> Sequence::* const part : {&Sequence::keys, &Sequence::values}) {
        for (const float number : {kNan, kInfinity, -kInfinity}) {
          Sequence wrong = sequence;
          (wrong.*part)[30 * wrong.kv_columns() - 1] = number;
          const std::vector<float> found = Cache<Int8Format>(*kernels, wrong, kNan, 12).attend_to(39, 1);
          const auto own = static_cast<std::ptrdiff_t>(found.size() - group);
          EXPECT_TRUE(is_all_nan({found.begin() + own, found.end()}))
              << kernels->name << " " << testing::PrintToString(shape) << " " << number;
          EXPECT_TRUE(same_bits({found.begin(), found.begin() + own}, {expected.begin(), expected.begin() + own}));
        }
      }
    }
  }
}

// 255 small weights beside a large one, whose value is small: in 8 bits they would all be 0.
TEST(Int8AttentionTest, ManySmallWeightsCountBesideALargeOne) {
  Sequence sequence(shape_of(1, 1, 64), 256, 11);
  std::ranges::fill(sequence.queries, 1.0F);
  std::ranges::fill(sequence.keys, 0.0F);
  std::fill_n(sequence.keys.begin(), 64, 6.5F / 64 / sequence.shape.scale);  // e^6.5 = 665 times the others' weight
  std::ranges::fill(sequence.values, 1.0F);
  std::fill_n(sequence.values.begin(), 64, 0.01F);
  const std::vector<double> expected = reference<SingleFormat>(sequence, 255);
  for (const Kernels* const kernels : available_kernels()) {
    const std::vector<float> found = Cache<Int8Format>(*kernels, sequence, kNan, 11).attend_to(255, 1);
    EXPECT_NEAR(found[0], expected[0], 0.03 * expected[0]) << kernels->name;
  }
}

}  // namespace
}  // namespace rts::cpu
