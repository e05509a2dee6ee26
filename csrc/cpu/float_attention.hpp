#pragma once

#include <cstddef>
#include <cstring>

#include "cpu/segmented_attention.hpp"
#include "cpu/unrolled.hpp"
#include "rts/cache_line.hpp"

namespace rts::cpu {

// Attention over a cache of floating-point numbers. Vector::TileRows are the tiles that are compiled, the largest
// first; Vector::kRegisters is what a tile may take of the processor's registers.
template <typename Vector, typename Number>
class FloatAttention : public SegmentedAttention<FloatAttention<Vector, Number>, Vector> {
  using Base = SegmentedAttention<FloatAttention, Vector>;
  using Base::kLanes, Base::kRuledOut, Base::kStride;
  using Base::layout_, Base::scratch, Base::shape_;
  using typename Base::Range;

 public:
  using TileRows = typename Vector::TileRows;

  FloatAttention(const AttentionShape& shape, const KvLayerOf<Number>& cache, const AttentionTask& task)
      : Base(shape, task), cache_(cache), head_offset_(task.kv_head * kBlockPositions * shape.head_dim) {}

  void load_query(const float* head, float* row) const {
    const Vector scale = Vector::broadcast(shape_.scale);
    std::size_t i = 0;
    for (; i + kLanes <= shape_.head_dim; i += kLanes) (Vector::load(head + i) * scale).store(row + i);
    if (i < shape_.head_dim) (Vector::load_eight(head + i) * scale).store(row + i);
  }

  void find_block(std::size_t index, std::size_t block) {
    const std::size_t offset = block * cache_.block_stride + head_offset_;
    keys_[index] = cache_.keys + offset;
    values_[index] = cache_.values + offset;
  }

  template <std::size_t kRows>
  void attend_rows(std::size_t first_row, const typename Base::template TileView<kRows>& seen) {
    score<kRows>(first_row, seen.by_any);
    for (std::size_t row = 0; row < kRows; ++row) {
      if (!seen.by_row[row].is_empty()) weigh(row, seen.by_row[row]);
    }

    std::memset(scratch(layout_.parts), 0, kRows * layout_.padded_dim * sizeof(float));
    if (seen.by_all.is_empty()) {
      for (std::size_t row = 0; row < kRows; ++row) add_values<1>(row, seen.by_row[row]);
    } else {
      // What only some rows see is added to these alone: where a row sees nothing, the value may be NaN.
      for (std::size_t row = 0; row < kRows; ++row) add_values<1>(row, {seen.by_row[row].begin, seen.by_all.begin});
      add_values<kRows>(0, seen.by_all);
      for (std::size_t row = 0; row < kRows; ++row) add_values<1>(row, {seen.by_all.end, seen.by_row[row].end});
    }
  }

 private:
  static constexpr std::size_t vectors_beside(std::size_t rows) {
    return Base::vectors_beside(rows, Vector::kRegisters);
  }

  // Scores for whole blocks, those included that nobody has written yet: `weigh` selects.
  template <std::size_t kRows>
  void score(std::size_t first_row, Range positions) {
    constexpr std::size_t kBeside = vectors_beside(kRows);
    const float* const queries = scratch(layout_.queries) + first_row * kStride;
    const std::size_t end = (positions.end + kBlockPositions - 1) / kBlockPositions;
    std::size_t block = positions.begin / kBlockPositions;
    for (; block + kBeside <= end; block += kBeside) {
      fetch_keys(block + kBeside, block + 2 * kBeside < end ? block + 2 * kBeside : end);
      score_blocks<kRows, kBeside>(queries, block);
    }
    for (; block < end; ++block) score_blocks<kRows, 1>(queries, block);
  }

  void fetch_keys(std::size_t first_block, std::size_t last_block) const {
    for (std::size_t block = first_block; block < last_block; ++block) {
      const Number* const keys = keys_[block];
      for (std::size_t i = 0; i < kBlockPositions * shape_.head_dim; i += kCacheLine / sizeof(Number)) {
        __builtin_prefetch(keys + i);
      }
    }
  }

  template <std::size_t kRows, std::size_t kBlocks>
  void score_blocks(const float* queries, std::size_t first_block) {
    Vector sums[kRows][kBlocks];
    for (std::size_t i = 0; i < shape_.head_dim; ++i) {
      Vector key[kBlocks];
      unrolled<kBlocks>([&](auto block) {
        key[block] = Vector::load(keys_[first_block + block] + i * kBlockPositions);
        // The values lie as the keys do, and come into the second-level cache meanwhile: of a cache in main memory, a
        // single query's attention reads 9.5 GB/s instead of 6.3.
        __builtin_prefetch(values_[first_block + block] + i * kBlockPositions, 0, 2);
      });
      unrolled<kRows>([&](auto row) {
        const Vector query = Vector::broadcast(queries[row * kStride + i]);
        unrolled<kBlocks>([&](auto block) { sums[row][block] = multiply_add(query, key[block], sums[row][block]); });
      });
    }
    float* const scores = scratch(layout_.scores) + first_block * kBlockPositions;
    unrolled<kRows>([&](auto row) {
      unrolled<kBlocks>([&](auto block) { sums[row][block].store(scores + row * kStride + block * kBlockPositions); });
    });
  }

  // Makes a row's scores into weights, of which the largest is 1.
  void weigh(std::size_t row, Range seen) {
    float* const scores = scratch(layout_.scores) + row * kStride;
    const std::size_t first = seen.begin / kLanes * kLanes;
    Vector largest = Vector::broadcast(kRuledOut);
    for (std::size_t i = first; i < seen.end; i += kLanes) {
      const Vector score = Base::seen_or(Vector::load(scores + i), Vector::broadcast(kRuledOut), i, seen);
      score.store(scores + i);
      largest = max(score, largest);
    }
    const float maximum = max_of_lanes(largest);
    Vector total;
    for (std::size_t i = first; i < seen.end; i += kLanes) {
      const Vector weight = exp_or_zero(Vector::load(scores + i) - Vector::broadcast(maximum));
      weight.store(scores + i);
      total = total + weight;
    }
    scratch(layout_.maxima)[row] = maximum;
    scratch(layout_.totals)[row] = sum_of_lanes(total);
  }

  // Adds values to the parts of the tile's rows first_row.. .
  template <std::size_t kRows>
  void add_values(std::size_t first_row, Range positions) {
    constexpr std::size_t kBeside = vectors_beside(kRows);
    if (positions.is_empty()) return;
    std::size_t i = 0;
    for (; i + kBeside * kLanes <= shape_.head_dim; i += kBeside * kLanes) {
      add_columns<kRows, kBeside>(first_row, positions, i);
    }
    for (; i < shape_.head_dim; i += kLanes) add_columns<kRows, 1>(first_row, positions, i);
  }

  template <std::size_t kRows, std::size_t kVectors>
  void add_columns(std::size_t first_row, Range positions, std::size_t column) {
    const float* const weights = scratch(layout_.scores) + first_row * kStride;
    float* const parts = scratch(layout_.parts) + first_row * layout_.padded_dim + column;
    const std::size_t stride = layout_.padded_dim;
    const bool has_only_eight = kVectors == 1 && column + kLanes > shape_.head_dim;
    Vector sums[kRows][kVectors];
    unrolled<kRows>([&](auto row) {
      unrolled<kVectors>([&](auto i) { sums[row][i] = Vector::load(parts + row * stride + i * kLanes); });
    });
    for (std::size_t position = positions.begin; position < positions.end; ++position) {
      const Number* const from =
          values_[position / kBlockPositions] + position % kBlockPositions * shape_.head_dim + column;
      Vector value[kVectors];
      unrolled<kVectors>(
          [&](auto i) { value[i] = has_only_eight ? Vector::load_eight(from) : Vector::load(from + i * kLanes); });
      unrolled<kRows>([&](auto row) {
        const Vector weight = Vector::broadcast(weights[row * kStride + position]);
        unrolled<kVectors>([&](auto i) { sums[row][i] = multiply_add(weight, value[i], sums[row][i]); });
      });
    }
    unrolled<kRows>(
        [&](auto row) { unrolled<kVectors>([&](auto i) { sums[row][i].store(parts + row * stride + i * kLanes); }); });
  }

  const KvLayerOf<Number>& cache_;
  const std::size_t head_offset_;
  const Number* keys_[Base::kSegmentBlocks];
  const Number* values_[Base::kSegmentBlocks];
};

}  // namespace rts::cpu
