#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/attention.hpp"
#include "cpu/attention_layout.hpp"
#include "cpu/unrolled.hpp"
#include "cpu/vector_exp.hpp"
#include "rts/cache_line.hpp"

// Attention over a vector type and the cache's number type. Vector::TileRows are the tiles that are compiled, the
// largest first; Vector::kRegisters is what a tile may take of the processor's registers.
namespace rts::cpu {

// A task while it runs: an object a call.
template <typename Vector, typename Number>
class Attention {
 public:
  Attention(const AttentionShape& shape, const KvLayerOf<Number>& cache, const AttentionTask& task)
      : shape_(shape),
        cache_(cache),
        task_(task),
        layout_(attention_layout(shape)),
        group_(shape.heads / shape.kv_heads),
        rows_(task.queries * group_) {}

  void run() {
    load_queries();
    const std::size_t end = task_.first_position + task_.queries;
    for (segment_ = segment_of(first_seen(0)); segment_ < end; segment_ += kSegment) {
      find_blocks(end);
      for (std::size_t row = 0; row < rows_;) {
        row += take_tile(typename Vector::TileRows{}, rows_ - row,
                         [&](auto tile_rows) { attend_tile<decltype(tile_rows)::value>(row); });
      }
    }
    write_out();
  }

 private:
  static constexpr std::size_t kLanes = AttentionLayout::kLanes;
  static constexpr std::size_t kStride = AttentionLayout::kStride;
  static constexpr std::size_t kSegmentBlocks = kSegment / kBlockPositions;
  static_assert(kBlockPositions == kLanes);

  // Positions of a segment, counted from its first.
  struct Range {
    std::size_t begin = 0;
    std::size_t end = 0;
    bool is_empty() const { return begin >= end; }
  };

  // How many vectors beside each other a tile takes, so that they and a sum for each row fit into the registers: a
  // number that is broadcast serves all of them. Few rows take several, whose sums do not wait for each other.
  static constexpr std::size_t vectors_beside(std::size_t rows) {
    std::size_t vectors = 4;
    while (vectors > 1 && (rows + 1) * vectors > Vector::kRegisters) vectors /= 2;
    return vectors;
  }

  template <std::size_t... Sizes, typename Work>
  static std::size_t take_tile(std::index_sequence<Sizes...>, std::size_t rows, Work work) {
    std::size_t taken = 0;
    const auto take_if_it_fits = [&](auto size) {
      if (rows < decltype(size)::value) return false;
      work(size);
      taken = decltype(size)::value;
      return true;
    };
    static_cast<void>((take_if_it_fits(std::integral_constant<std::size_t, Sizes>{}) || ...));
    return taken;
  }

  float* scratch(std::size_t offset) const { return task_.scratch + offset; }

  static std::size_t segment_of(std::size_t position) { return position / kSegment * kSegment; }
  std::size_t first_seen(std::size_t query) const {
    const std::size_t seen_end = task_.first_position + query + 1;
    return shape_.window != 0 && seen_end > shape_.window ? seen_end - shape_.window : 0;
  }
  Range seen_of_segment(std::size_t query) const {
    const auto within = [this](std::size_t position) {
      const std::size_t offset = position > segment_ ? position - segment_ : 0;
      return offset < kSegment ? offset : kSegment;
    };
    return {within(first_seen(query)), within(task_.first_position + query + 1)};
  }

  void load_queries() {
    const Vector scale = Vector::broadcast(shape_.scale);
    float* to = scratch(layout_.queries);
    for (std::size_t query = 0; query < task_.queries; ++query) {
      const float* from = task_.query + query * task_.query_stride + task_.kv_head * group_ * shape_.head_dim;
      for (std::size_t head = 0; head < group_; ++head, from += shape_.head_dim, to += kStride) {
        std::size_t i = 0;
        for (; i + kLanes <= shape_.head_dim; i += kLanes) (Vector::load(from + i) * scale).store(to + i);
        if (i < shape_.head_dim) (Vector::load_eight(from + i) * scale).store(to + i);
      }
    }
  }

  void find_blocks(std::size_t end) {
    const std::int32_t* const table = task_.block_table + segment_ / kBlockPositions;
    const std::size_t head = task_.kv_head * kBlockPositions * shape_.head_dim;
    for (std::size_t i = 0; i < kSegmentBlocks && segment_ + i * kBlockPositions < end; ++i) {
      const std::size_t offset = static_cast<std::size_t>(table[i]) * cache_.block_stride + head;
      keys_[i] = cache_.keys + offset;
      values_[i] = cache_.values + offset;
    }
  }

  // The rows first_row.. over this segment.
  template <std::size_t kRows>
  void attend_tile(std::size_t first_row) {
    static_assert(kRows <= AttentionLayout::kMaxTileRows);
    Range seen[kRows];
    Range by_any{kSegment, 0}, by_all{0, kSegment};
    for (std::size_t row = 0; row < kRows; ++row) {
      const Range own = seen[row] = seen_of_segment((first_row + row) / group_);
      by_all = {own.begin > by_all.begin ? own.begin : by_all.begin, own.end < by_all.end ? own.end : by_all.end};
      if (own.is_empty()) continue;
      by_any = {own.begin < by_any.begin ? own.begin : by_any.begin, own.end > by_any.end ? own.end : by_any.end};
    }
    if (by_any.is_empty()) return;

    score<kRows>(first_row, by_any);
    for (std::size_t row = 0; row < kRows; ++row) {
      if (!seen[row].is_empty()) weigh(row, seen[row]);
    }

    std::memset(scratch(layout_.parts), 0, kRows * layout_.padded_dim * sizeof(float));
    if (by_all.is_empty()) {
      for (std::size_t row = 0; row < kRows; ++row) add_values<1>(row, seen[row]);
    } else {
      // What only some rows see is added to these alone: where a row sees nothing, the value may be NaN.
      for (std::size_t row = 0; row < kRows; ++row) add_values<1>(row, {seen[row].begin, by_all.begin});
      add_values<kRows>(0, by_all);
      for (std::size_t row = 0; row < kRows; ++row) add_values<1>(row, {by_all.end, seen[row].end});
    }
    merge(first_row, seen, kRows);
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
    constexpr float kRuledOut = -std::numeric_limits<float>::infinity();
    const Vector ruled_out = Vector::broadcast(kRuledOut);
    const std::size_t first = seen.begin / kLanes * kLanes;
    Vector largest = ruled_out;
    for (std::size_t i = first; i < seen.end; i += kLanes) {
      Vector score = Vector::load(scores + i);
      if (i < seen.begin || i + kLanes > seen.end) {
        const std::size_t begin = i < seen.begin ? seen.begin - i : 0;
        const std::size_t end = i + kLanes > seen.end ? seen.end - i : kLanes;
        score = Vector::select_lanes(begin, end, score, ruled_out);
        score.store(scores + i);
      }
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

  // Adds the tile's parts to what the segments before gave. A row that sees nothing of this one stays as it is.
  void merge(std::size_t first_row, const Range* seen, std::size_t tile_rows) {
    float* const running_maxima = scratch(layout_.running_maxima) + first_row;
    float* const running_totals = scratch(layout_.running_totals) + first_row;
    const float* const maxima = scratch(layout_.maxima);
    const float* const totals = scratch(layout_.totals);

    // That with the smaller maximum is scaled down to the other's.
    const Vector difference = Vector::load(running_maxima) - Vector::load(maxima);
    const Vector one = Vector::broadcast(1.0F);
    const Vector smaller = exp_or_zero(select_less(difference, Vector(), difference, Vector() - difference));
    float old_shares[kLanes], new_shares[kLanes];
    select_less(difference, Vector(), smaller, one).store(old_shares);
    select_less(difference, Vector(), one, smaller).store(new_shares);

    for (std::size_t row = 0; row < tile_rows; ++row) {
      if (seen[row].is_empty()) continue;
      const float* const part = scratch(layout_.parts) + row * layout_.padded_dim;
      float* const sum = scratch(layout_.sums) + (first_row + row) * layout_.padded_dim;
      if (segment_ == segment_of(first_seen((first_row + row) / group_))) {
        running_maxima[row] = maxima[row];
        running_totals[row] = totals[row];
        std::memcpy(sum, part, layout_.padded_dim * sizeof(float));
        continue;
      }
      const Vector old_share = Vector::broadcast(old_shares[row]), new_share = Vector::broadcast(new_shares[row]);
      if (!(running_maxima[row] >= maxima[row])) running_maxima[row] = maxima[row];
      running_totals[row] = running_totals[row] * old_shares[row] + totals[row] * new_shares[row];
      for (std::size_t i = 0; i < layout_.padded_dim; i += kLanes) {
        multiply_add(Vector::load(sum + i), old_share, Vector::load(part + i) * new_share).store(sum + i);
      }
    }
  }

  void write_out() const {
    const float* sum = scratch(layout_.sums);
    const float* total = scratch(layout_.running_totals);
    for (std::size_t query = 0; query < task_.queries; ++query) {
      float* out = task_.out + query * task_.out_stride + task_.kv_head * group_ * shape_.head_dim;
      for (std::size_t head = 0; head < group_; ++head, sum += layout_.padded_dim, ++total, out += shape_.head_dim) {
        const Vector divisor = Vector::broadcast(*total);
        std::size_t i = 0;
        for (; i + kLanes <= shape_.head_dim; i += kLanes) (Vector::load(sum + i) / divisor).store(out + i);
        if (i < shape_.head_dim) (Vector::load(sum + i) / divisor).store_eight(out + i);
      }
    }
  }

  const AttentionShape& shape_;
  const KvLayerOf<Number>& cache_;
  const AttentionTask& task_;
  const AttentionLayout layout_;
  const std::size_t group_;  // heads that share the KV head
  const std::size_t rows_;
  std::size_t segment_ = 0;  // its first position
  const Number* keys_[kSegmentBlocks];
  const Number* values_[kSegmentBlocks];
};

}  // namespace rts::cpu
