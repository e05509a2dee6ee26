#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "cpu/quantized_head.hpp"
#include "cpu/segmented_attention.hpp"
#include "cpu/unrolled.hpp"

namespace rts::cpu {

// Attention over KvLayerInt8. Scores are products of 8-bit integers, and values are weighted by 16-bit ones, whose unit
// is the largest value scale that the row sees of the segment / 32767: 8 bits would lose the many small weights beside
// a large one. Both sums are exact: 256 positions of 32767 × 127 fit into 31 bits. Integers::TileRows and kRegisters
// are as in FloatAttention.
template <typename Vector, typename Integers>
class Int8Attention : public SegmentedAttention<Int8Attention<Vector, Integers>, Vector> {
  using Base = SegmentedAttention<Int8Attention, Vector>;
  using Base::kLanes, Base::kRuledOut, Base::kStride;
  using Base::layout_, Base::scratch, Base::shape_;
  using typename Base::Range;

 public:
  using TileRows = typename Integers::TileRows;

  Int8Attention(const AttentionShape& shape, const KvLayerInt8& cache, const AttentionTask& task)
      : Base(shape, task),
        cache_(cache),
        head_offset_(task.kv_head * kv_record_bytes(shape.head_dim)),
        number_bytes_(kBlockPositions * shape.head_dim),
        scale_(shape.scale / static_cast<float>(turned_together(shape.head_dim))) {}

  void load_query(const float* head, float* row) const {
    auto& query = *new (row) Query;
    float turned[kMaxHeadDim];
    turn_head<Vector>(head, shape_.head_dim, turned);
    query.scale = quantize_head<Vector>(turned, shape_.head_dim, query.values) * scale_;
    std::int32_t sum = 0;
    for (std::size_t i = 0; i < shape_.head_dim; ++i) sum += query.values[i];
    query.correction = -kKeyBias * sum;
  }

  void find_block(std::size_t index, std::size_t block) {
    records_[index] = cache_.records + block * cache_.block_stride + head_offset_;
  }

  template <std::size_t kRows>
  void attend_rows(std::size_t first_row, const typename Base::template TileView<kRows>& seen) {
    const Range blocks = {seen.by_any.begin / kBlockPositions,
                          (seen.by_any.end + kBlockPositions - 1) / kBlockPositions};
    score<kRows>(scratch(layout_.queries) + first_row * kStride, blocks);
    for (std::size_t row = 0; row < kRows; ++row) weigh(row, seen.by_row[row], blocks);

    constexpr std::size_t kBeside = vectors_beside(kRows);
    std::size_t column = 0;
    for (; column + kBeside * kLanes <= shape_.head_dim; column += kBeside * kLanes) {
      add_columns<kRows, kBeside>(blocks, column);
    }
    for (; column < shape_.head_dim; column += kLanes) add_columns<kRows, 1>(blocks, column);
  }

 private:
  static constexpr std::size_t kPair = 2;
  static constexpr float kLargestWeight = 32767.0F;

  // A row of AttentionLayout::queries.
  struct Query {
    float scale;              // of products with keys, the key's own scale aside
    std::int32_t correction;  // what the bias of keys adds, taken away
    alignas(kLanes) std::int8_t values[kMaxHeadDim];
  };
  static_assert(sizeof(Query) <= kStride * sizeof(float));

  static constexpr std::size_t vectors_beside(std::size_t rows) {
    return Base::vectors_beside(rows, Integers::kRegisters);
  }
  static const Query& query_of(const float* queries, std::size_t row) {
    return *std::launder(reinterpret_cast<const Query*>(queries + row * kStride));
  }

  const std::byte* keys(std::size_t block) const { return records_[block]; }
  const std::byte* values(std::size_t block) const { return records_[block] + number_bytes_; }
  const float* key_scales(std::size_t block) const {
    return reinterpret_cast<const float*>(records_[block] + 2 * number_bytes_);
  }
  const float* value_scales(std::size_t block) const { return key_scales(block) + kBlockPositions; }

  // Scores for whole blocks, those included that nobody has written yet: `weigh` selects.
  template <std::size_t kRows>
  void score(const float* queries, Range blocks) {
    constexpr std::size_t kBeside = vectors_beside(kRows);
    std::size_t block = blocks.begin;
    for (; block + kBeside <= blocks.end; block += kBeside) score_blocks<kRows, kBeside>(queries, block, blocks.end);
    for (; block < blocks.end; ++block) score_blocks<kRows, 1>(queries, block, blocks.end);
  }

  template <std::size_t kRows, std::size_t kBlocks>
  void score_blocks(const float* queries, std::size_t first_block, std::size_t end_block) {
    Integers sums[kRows][kBlocks];
    unrolled<kRows>([&](auto row) {
      const Integers correction = Integers::broadcast(query_of(queries, row).correction);
      unrolled<kBlocks>([&](auto block) { sums[row][block] = correction; });
    });
    const std::byte* next[kBlocks];  // keys that will be read next
    unrolled<kBlocks>([&](auto block) {
      const std::size_t other = first_block + kBlocks + block;
      next[block] = keys(other < end_block ? other : first_block + block);
    });
    for (std::size_t i = 0; i < shape_.head_dim; i += kQuad) {
      typename Integers::Quads key[kBlocks];
      unrolled<kBlocks>([&](auto block) {
        key[block] = typename Integers::Quads(keys(first_block + block) + i * kBlockPositions);
        __builtin_prefetch(next[block] + i * kBlockPositions);
        __builtin_prefetch(values(first_block + block) + i * kBlockPositions, 0, 2);
      });
      unrolled<kRows>([&](auto row) {
        std::int32_t quad;
        std::memcpy(&quad, query_of(queries, row).values + i, sizeof quad);
        unrolled<kBlocks>([&](auto block) { sums[row][block] = add_products(sums[row][block], key[block], quad); });
      });
    }
    float* const scores = scratch(layout_.scores) + first_block * kBlockPositions;
    unrolled<kBlocks>([&](auto block) {
      const Vector key_scale = Vector::load(key_scales(first_block + block));
      unrolled<kRows>([&](auto row) {
        const Vector scale = Vector::broadcast(query_of(queries, row).scale);
        (sums[row][block].to_floats() * key_scale * scale).store(scores + row * kStride + block * kBlockPositions);
      });
    });
  }

  // Makes a row's scores into weights, the largest being 1, times the values' scales, in 16 bits and in the same place:
  // what is written lies before what is read next. What the row does not see of the blocks weighs nothing.
  void weigh(std::size_t row, Range seen, Range blocks) {
    float* const scores = scratch(layout_.scores) + row * kStride;
    const auto weights_of = [=](std::size_t block) {
      return reinterpret_cast<std::int16_t*>(scores) + block * kBlockPositions;
    };
    const auto seen_scales = [&](std::size_t block) {
      return Base::seen_or(Vector::load(value_scales(block)), Vector(), block * kBlockPositions, seen);
    };
    const Range seen_blocks =
        seen.is_empty() ? Range{blocks.begin, blocks.begin}
                        : Range{seen.begin / kBlockPositions, (seen.end + kBlockPositions - 1) / kBlockPositions};
    Vector largest = Vector::broadcast(kRuledOut), largest_scale;
    for (std::size_t block = seen_blocks.begin; block < seen_blocks.end; ++block) {
      const std::size_t first = block * kBlockPositions;
      const Vector score = Base::seen_or(Vector::load(scores + first), Vector::broadcast(kRuledOut), first, seen);
      score.store(scores + first);
      largest = max(score, largest);
      largest_scale = max(seen_scales(block), largest_scale);
    }
    const float maximum = max_of_lanes(largest), unit = max_of_lanes(largest_scale) * (1.0F / kLargestWeight);
    const Vector units = Vector::broadcast(inverse_or_zero(unit));
    const Vector zero;
    Vector total;
    for (std::size_t block = seen_blocks.begin; block < seen_blocks.end; ++block) {
      const Vector scale = seen_scales(block);
      const Vector weight = exp_or_zero(Vector::load(scores + block * kBlockPositions) - Vector::broadcast(maximum));
      (weight * (scale * units)).store_nearest(weights_of(block));
      total = total + multiply_add(scale, zero, weight);  // NaN with the scale
    }
    for (std::size_t block = blocks.begin; block < seen_blocks.begin; ++block) zero.store_nearest(weights_of(block));
    for (std::size_t block = seen_blocks.end; block < blocks.end; ++block) zero.store_nearest(weights_of(block));
    units_[row] = unit;
    scratch(layout_.maxima)[row] = maximum;
    scratch(layout_.totals)[row] = sum_of_lanes(total);
  }

  // The values' columns [column, column + 16 kVectors). Those past the head are read from what follows, and not used.
  template <std::size_t kRows, std::size_t kVectors>
  void add_columns(Range blocks, std::size_t column) {
    const float* const weights = scratch(layout_.scores);
    Integers sums[kRows][kVectors];
    for (std::size_t block = blocks.begin; block < blocks.end; ++block) {
      const std::byte* const from = values(block) + column * kPair;
      for (std::size_t i = 0; i < kBlockPositions; i += kPair) {
        typename Integers::Pairs value[kVectors];
        unrolled<kVectors>(
            [&](auto v) { value[v] = typename Integers::Pairs(from + i * shape_.head_dim + v * kLanes * kPair); });
        unrolled<kRows>([&](auto row) {
          std::int32_t pair;
          const auto* const own = reinterpret_cast<const std::byte*>(weights + row * kStride);
          std::memcpy(&pair, own + (block * kBlockPositions + i) * sizeof(std::int16_t), sizeof pair);
          unrolled<kVectors>([&](auto v) { sums[row][v] = add_products(sums[row][v], value[v], pair); });
        });
      }
    }
    float* const parts = scratch(layout_.parts) + column;
    unrolled<kRows>([&](auto row) {
      const Vector unit = Vector::broadcast(units_[row]);
      unrolled<kVectors>(
          [&](auto v) { (sums[row][v].to_floats() * unit).store(parts + row * layout_.padded_dim + v * kLanes); });
    });
  }

  const KvLayerInt8& cache_;
  const std::size_t head_offset_;
  const std::size_t number_bytes_;  // of a block's keys, and of its values
  const float scale_;
  const std::byte* records_[Base::kSegmentBlocks];
  float units_[AttentionLayout::kMaxTileRows];  // of each row's weights
};

}  // namespace rts::cpu
