#include "cpu/paged_attention.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <ostream>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "openmp_runtime.hpp"

namespace rts::cpu {

void PrintTo(const PagedAttentionShape& shape, std::ostream* out) {
  *out << shape.heads << "/" << shape.kv_heads << "/" << shape.head_dim;
}

namespace {

constexpr std::size_t kRowBlocks = 40;

float scale_of(const PagedAttentionShape& shape) {
  return 1.0F / std::sqrt(static_cast<float>(shape.head_dim));
}

enum class Heads { kOfATokenBesideEachOther, kTokensBesideEachOther };

// The heads of tokens, of which each is [heads][head_dim] by itself, laid out in one array.
struct LaidOut {
  LaidOut(const std::vector<const float*>& tokens, std::size_t heads, std::size_t head_dim, Heads order)
      : numbers(tokens.size() * heads * head_dim) {
    const bool by_token = order == Heads::kOfATokenBesideEachOther;
    const std::size_t token_stride = by_token ? heads * head_dim : head_dim;
    const std::size_t head_stride = by_token ? head_dim : tokens.size() * head_dim;
    for (std::size_t token = 0; token < tokens.size(); ++token) {
      for (std::size_t head = 0; head < heads; ++head) {
        std::copy_n(tokens[token] + head * head_dim, head_dim, &numbers[token * token_stride + head * head_stride]);
      }
    }
    view = {numbers.data(), static_cast<std::ptrdiff_t>(token_stride), static_cast<std::ptrdiff_t>(head_stride)};
  }

  std::vector<float> numbers;
  TokenHeads view;
};

// What one layer of a model would give attention for a sequence.
struct Sequence {
  Sequence(const PagedAttentionShape& of_shape, std::size_t length, std::size_t of_row, std::mt19937& random)
      : shape(of_shape), row(of_row) {
    std::normal_distribution<float> normal;
    const auto draw = [&](std::size_t heads) {
      std::vector<float> numbers(length * heads * shape.head_dim);
      for (float& x : numbers) x = normal(random);
      return numbers;
    };
    queries = draw(shape.heads), keys = draw(shape.kv_heads), values = draw(shape.kv_heads);
  }

  const float* query(std::size_t position) const { return &queries[position * shape.heads * shape.head_dim]; }
  const float* key(std::size_t position) const { return &keys[position * shape.kv_heads * shape.head_dim]; }
  const float* value(std::size_t position) const { return &values[position * shape.kv_heads * shape.head_dim]; }

  // In double precision.
  std::vector<double> attended(std::size_t position, std::size_t window) const {
    const std::size_t begin = window != 0 && position + 1 > window ? position + 1 - window : 0;
    std::vector<double> out(shape.heads * shape.head_dim);
    for (std::size_t head = 0; head < shape.heads; ++head) {
      const std::size_t kv_at = head / (shape.heads / shape.kv_heads) * shape.head_dim, at = head * shape.head_dim;
      double total = 0;
      for (std::size_t other = begin; other <= position; ++other) {
        const double score =
            std::inner_product(query(position) + at, query(position) + at + shape.head_dim, key(other) + kv_at, 0.0);
        const double weight = std::exp(score * scale_of(shape));
        total += weight;
        for (std::size_t i = 0; i < shape.head_dim; ++i) out[at + i] += weight * value(other)[kv_at + i];
      }
      for (std::size_t i = 0; i < shape.head_dim; ++i) out[at + i] /= total;
    }
    return out;
  }

  PagedAttentionShape shape;
  std::size_t row;  // of the block table
  std::vector<float> queries, keys, values;
  std::vector<std::int32_t> blocks;
  std::size_t done = 0;
};

// Sequences over blocks that lie anywhere, and the arrays of a step.
class PagedAttentionRun {
 public:
  PagedAttentionRun(const PagedAttentionShape& shape, std::size_t threads)
      : shape_(shape), attention_(shape, kBlocks, threads), free_(kBlocks), table_(kRows * kRowBlocks, -1) {
    std::iota(free_.begin(), free_.end(), 0);
    std::shuffle(free_.begin(), free_.end(), random_);
  }

  Sequence add(std::size_t length, std::size_t row) { return {shape_, length, row, random_}; }

  // Computes so many next tokens of each sequence in every layer, and compares.
  void step(const std::vector<std::pair<Sequence*, std::size_t>>& work, Heads order, std::size_t window) {
    std::vector<std::int32_t> query_start{0}, context_len, rows;
    std::vector<std::int64_t> slots;
    std::vector<const float*> queries, keys, values;
    for (const auto& [sequence, count] : work) {
      for (std::size_t position = sequence->done; position < sequence->done + count; ++position) {
        if (position % kBlockPositions == 0) {
          table_[sequence->row * kRowBlocks + sequence->blocks.size()] = free_.back();
          sequence->blocks.push_back(free_.back());
          free_.pop_back();
        }
        slots.push_back(sequence->blocks.back() * static_cast<std::int64_t>(kBlockPositions) +
                        static_cast<std::int64_t>(position % kBlockPositions));
        queries.push_back(sequence->query(position));
        keys.push_back(sequence->key(position));
        values.push_back(sequence->value(position));
      }
      sequence->done += count;
      query_start.push_back(static_cast<std::int32_t>(slots.size()));
      context_len.push_back(static_cast<std::int32_t>(sequence->done));
      rows.push_back(static_cast<std::int32_t>(sequence->row));
    }
    attention_.begin_step({.sequences = work.size(),
                           .query_start = query_start.data(),
                           .context_len = context_len.data(),
                           .rows = rows.data(),
                           .block_table = table_.data(),
                           .row_blocks = kRowBlocks},
                          slots.data());
    ASSERT_EQ(attention_.tokens(), slots.size());
    const LaidOut query(queries, shape_.heads, shape_.head_dim, order);
    const LaidOut key(keys, shape_.kv_heads, shape_.head_dim, order);
    const LaidOut value(values, shape_.kv_heads, shape_.head_dim, order);
    const LaidOut negated = negative(value);
    const std::size_t columns = shape_.heads * shape_.head_dim;
    std::vector<float> out(slots.size() * columns, kNan), out_of_negated(out);
    attention_.attend(0, query.view, key.view, value.view, scale_of(shape_), window, out.data());
    attention_.attend(shape_.layers - 1, query.view, key.view, negated.view, scale_of(shape_), window,
                      out_of_negated.data());

    std::size_t token = 0;
    for (const auto& [sequence, count] : work) {
      for (std::size_t position = sequence->done - count; position < sequence->done; ++position, ++token) {
        const std::vector<double> expected = sequence->attended(position, window);
        for (std::size_t i = 0; i < columns; ++i) {
          ASSERT_NEAR(out[token * columns + i], expected[i], 1e-5) << "position " << position << ", number " << i;
          ASSERT_EQ(out_of_negated[token * columns + i], -out[token * columns + i]) << "a layer is not its own";
        }
      }
    }
  }

 private:
  static constexpr std::size_t kBlocks = 160, kRows = 8;
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

  static LaidOut negative(LaidOut heads) {
    for (float& x : heads.numbers) x = -x;
    heads.view.numbers = heads.numbers.data();
    return heads;
  }

  PagedAttentionShape shape_;
  PagedAttention attention_;
  std::mt19937 random_{1};
  std::vector<std::int32_t> free_, table_;
};

const PagedAttentionShape kShapes[] = {{2, 9, 3, 64}, {2, 4, 4, 16}, {2, 6, 2, 24}, {2, 4, 1, 256}};

class PagedAttentionTest : public testing::TestWithParam<PagedAttentionShape> {};
INSTANTIATE_TEST_SUITE_P(Shapes, PagedAttentionTest, testing::ValuesIn(kShapes));

TEST_P(PagedAttentionTest, MixedStepsAreWithinRoundingOfTheReference) {
  for (const Heads order : {Heads::kOfATokenBesideEachOther, Heads::kTokensBesideEachOther}) {
    for (const std::size_t window : {0, 20}) {
      PagedAttentionRun run(GetParam(), 1);
      Sequence a = run.add(120, 5), b = run.add(60, 0), c = run.add(300, 2);
      run.step({{&a, 40}, {&b, 1}}, order, window);
      run.step({{&b, 1}, {&a, 1}, {&c, 270}}, order, window);
      run.step({{&c, 17}, {&b, 16}}, order, window);
      for (int i = 0; i < 5; ++i) run.step({{&a, 1}, {&b, 1}, {&c, 1}}, order, window);
    }
  }
}

TEST_P(PagedAttentionTest, SeveralThreadsComputeTheSame) {
  if (!load_openmp_runtime()) GTEST_SKIP() << "no OpenMP runtime";
  PagedAttentionRun run(GetParam(), 3);
  std::vector<Sequence> sequences;
  for (std::size_t row = 0; row < 8; ++row) sequences.push_back(run.add(260, row));
  std::vector<std::pair<Sequence*, std::size_t>> prompts, tokens;
  for (Sequence& sequence : sequences) {
    prompts.emplace_back(&sequence, 200 + 7 * sequence.row);
    tokens.emplace_back(&sequence, 1);
  }
  run.step(prompts, Heads::kTokensBesideEachOther, 0);
  for (int i = 0; i < 5; ++i) run.step(tokens, Heads::kOfATokenBesideEachOther, 0);
}

TEST(PagedAttentionTest, RefusesShapesThatTheKernelsDoNotHave) {
  EXPECT_THROW(PagedAttention({1, 4, 3, 64}, 1, 1), std::invalid_argument);
  EXPECT_THROW(PagedAttention({1, 4, 0, 64}, 1, 1), std::invalid_argument);
  EXPECT_THROW(PagedAttention({1, 4, 2, 12}, 1, 1), std::invalid_argument);
  EXPECT_THROW(PagedAttention({1, 4, 2, 264}, 1, 1), std::invalid_argument);
}

}  // namespace
}  // namespace rts::cpu
