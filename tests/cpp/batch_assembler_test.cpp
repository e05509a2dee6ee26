#include "rts/batch_assembler.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "step_arrays.hpp"

namespace rts {
namespace {

constexpr std::int32_t kUntouched = -77;

class BatchAssemblerTest : public testing::Test, protected StepArrays {
 protected:
  // 4 positions a block, 10 of a context: 3 blocks a row of the block table.
  static constexpr SchedulerConfig kConfig{.max_sequences = 3, .token_budget = 8, .block_size = 4, .max_context = 10};

  BatchAssemblerTest() : StepArrays(kConfig, kUntouched) { assembler_.bind(buffers()); }

  static Sequence sequence(std::uint32_t row, std::vector<std::int32_t> tokens, std::vector<std::int32_t> blocks) {
    Sequence sequence;
    sequence.row = row;
    sequence.tokens = std::move(tokens);
    sequence.blocks = std::move(blocks);
    return sequence;
  }
  static PlanRow row(Sequence& sequence, std::uint32_t start, std::uint32_t count, bool sample) {
    return {.sequence = &sequence, .start = start, .count = count, .sample = sample};
  }
  void assemble(std::vector<PlanRow> rows) {
    Plan plan;
    plan.rows = std::move(rows);
    assembler_.assemble(plan);
  }

  BatchAssembler assembler_{kConfig};
};

constexpr std::int32_t kU = kUntouched;
using Ints = std::vector<std::int32_t>;
using Longs = std::vector<std::int64_t>;

TEST_F(BatchAssemblerTest, WritesAPlanAsFlatArrays) {
  Sequence decoding = sequence(2, {50, 51, 52, 53, 54, 55}, {7, 3});
  Sequence reading = sequence(0, {60, 61, 62, 63, 64, 65, 66}, {5, 1});
  Sequence starting = sequence(1, {70, 71, 72}, {0});
  assemble({row(decoding, 5, 1, true), row(reading, 2, 4, false), row(starting, 0, 3, true)});

  EXPECT_EQ(tokens_, (Ints{55, 62, 63, 64, 65, 70, 71, 72}));
  EXPECT_EQ(positions_, (Ints{5, 2, 3, 4, 5, 0, 1, 2}));
  EXPECT_EQ(kv_slots_, (Longs{3 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 1 * 4 + 0, 1 * 4 + 1, 0, 1, 2}));
  EXPECT_EQ(query_start_, (Ints{0, 1, 5, 8}));
  EXPECT_EQ(context_len_, (Ints{6, 6, 3}));
  EXPECT_EQ(rows_, (Ints{2, 0, 1}));
  EXPECT_EQ(block_table_, (Ints{5, 1, kU, 0, kU, kU, 7, 3, kU}));
  EXPECT_EQ(logits_at_, (Longs{0, 7, kU}));
}

TEST_F(BatchAssemblerTest, ATokenThatIsBeingSampledIsMinusOne) {
  Sequence decoding = sequence(1, {50, 51, 52, 53}, {6, 2});
  Sequence other = sequence(0, {60}, {9});
  assemble({row(decoding, 4, 1, true), row(other, 0, 1, true)});

  EXPECT_EQ(tokens_, (Ints{-1, 60, kU, kU, kU, kU, kU, kU}));
  EXPECT_EQ(positions_, (Ints{4, 0, kU, kU, kU, kU, kU, kU}));
  EXPECT_EQ(kv_slots_, (Longs{2 * 4, 9 * 4, kU, kU, kU, kU, kU, kU}));
  EXPECT_EQ(query_start_, (Ints{0, 1, 2, kU}));
  EXPECT_EQ(context_len_, (Ints{5, 1, kU}));
  EXPECT_EQ(logits_at_, (Longs{0, 1, kU}));
}

// The block table is the caller's from step to step: what stands there already is not written again.
TEST_F(BatchAssemblerTest, WritesOnlyTheBlocksThatAreNew) {
  Sequence one = sequence(1, {1, 2, 3, 4, 5, 6, 7, 8, 9}, {4});
  assemble({row(one, 0, 4, false)});
  EXPECT_EQ(block_table_, (Ints{kU, kU, kU, 4, kU, kU, kU, kU, kU}));
  EXPECT_EQ(one.assembled_blocks, 1U);

  block_table_[3] = 1000;
  one.blocks = {4, 8};
  assemble({row(one, 4, 4, false)});
  EXPECT_EQ(block_table_, (Ints{kU, kU, kU, 1000, 8, kU, kU, kU, kU}));
  EXPECT_EQ(kv_slots_[0], 8 * 4);

  one.blocks = {4, 8, 2};
  assemble({row(one, 8, 1, true)});
  EXPECT_EQ(block_table_, (Ints{kU, kU, kU, 1000, 8, 2, kU, kU, kU}));
  assemble({row(one, 9, 1, true)});
  EXPECT_EQ(block_table_, (Ints{kU, kU, kU, 1000, 8, 2, kU, kU, kU}));

  Sequence next = sequence(1, {1, 2}, {6});  // the row's next owner starts from its first block
  assemble({row(next, 0, 2, true)});
  EXPECT_EQ(block_table_, (Ints{kU, kU, kU, 6, 8, 2, kU, kU, kU}));
}

TEST_F(BatchAssemblerTest, AnEmptyPlanHasNoRows) {
  assemble({});
  EXPECT_EQ(query_start_, (Ints{0, kU, kU, kU}));
  EXPECT_EQ(tokens_, Ints(8, kU));
  EXPECT_EQ(logits_at_, Longs(3, kU));
}

}  // namespace
}  // namespace rts
