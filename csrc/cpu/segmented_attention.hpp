#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/attention.hpp"
#include "cpu/attention_layout.hpp"
#include "cpu/vector_exp.hpp"

namespace rts::cpu {

// What attention is whatever the cache's numbers are: a task's way through segments and tiles, and how segments are
// merged. An object a call. `Own` is the derived class, which has
//
//   using TileRows = std::index_sequence<...>;  // the tiles that are compiled, the largest first
//   void load_query(const float* head, float* row);  // into a row of AttentionLayout::queries
//   void find_block(std::size_t index, std::size_t block);  // the segment's index-th is the cache's block-th
//   template <std::size_t kRows> void attend_rows(std::size_t first_row, const TileView<kRows>& seen);
//
// The last leaves the values of the rows first_row.., weighted, in `parts`, and their `maxima` and `totals`.
template <typename Own, typename Vector>
class SegmentedAttention {
 public:
  SegmentedAttention(const AttentionShape& shape, const AttentionTask& task)
      : shape_(shape),
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
        row += take_tile(typename Own::TileRows{}, rows_ - row,
                         [&](auto tile_rows) { attend_tile<decltype(tile_rows)::value>(row); });
      }
    }
    write_out();
  }

 protected:
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
  // What a tile's rows see of a segment.
  template <std::size_t kRows>
  struct TileView {
    Range by_row[kRows];
    Range by_any, by_all;
  };

  // How many vectors beside each other a tile takes, so that they and a sum for each row fit into the registers: a
  // number that is broadcast serves all of them. Few rows take several, whose sums do not wait for each other.
  static constexpr std::size_t vectors_beside(std::size_t rows, std::size_t registers) {
    std::size_t vectors = 4;
    while (vectors > 1 && (rows + 1) * vectors > registers) vectors /= 2;
    return vectors;
  }

  float* scratch(std::size_t offset) const { return task_.scratch + offset; }

  // A vector of positions, the first being `first`, with `other` where a row does not see them: there may lie anything.
  static Vector seen_or(Vector x, Vector other, std::size_t first, Range seen) {
    if (first >= seen.begin && first + kLanes <= seen.end) return x;
    return Vector::select_lanes(first < seen.begin ? seen.begin - first : 0,
                                first + kLanes > seen.end ? seen.end - first : kLanes, x, other);
  }

  static constexpr float kRuledOut = -std::numeric_limits<float>::infinity();

  const AttentionShape& shape_;
  const AttentionTask& task_;
  const AttentionLayout layout_;

 private:
  Own& own() { return static_cast<Own&>(*this); }

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
    float* to = scratch(layout_.queries);
    for (std::size_t query = 0; query < task_.queries; ++query) {
      const float* from = task_.query + query * task_.query_stride + task_.kv_head * group_ * shape_.head_dim;
      for (std::size_t head = 0; head < group_; ++head, from += shape_.head_dim, to += kStride) {
        own().load_query(from, to);
      }
    }
  }

  void find_blocks(std::size_t end) {
    const std::int32_t* const table = task_.block_table + segment_ / kBlockPositions;
    for (std::size_t i = 0; i < kSegmentBlocks && segment_ + i * kBlockPositions < end; ++i) {
      own().find_block(i, static_cast<std::size_t>(table[i]));
    }
  }

  // The rows first_row.. over this segment.
  template <std::size_t kRows>
  void attend_tile(std::size_t first_row) {
    static_assert(kRows <= AttentionLayout::kMaxTileRows);
    TileView<kRows> seen;
    Range &by_any = seen.by_any = {kSegment, 0}, &by_all = seen.by_all = {0, kSegment};
    for (std::size_t row = 0; row < kRows; ++row) {
      const Range own = seen.by_row[row] = seen_of_segment((first_row + row) / group_);
      by_all = {own.begin > by_all.begin ? own.begin : by_all.begin, own.end < by_all.end ? own.end : by_all.end};
      if (own.is_empty()) continue;
      by_any = {own.begin < by_any.begin ? own.begin : by_any.begin, own.end > by_any.end ? own.end : by_any.end};
    }
    if (by_any.is_empty()) return;
    own().template attend_rows<kRows>(first_row, seen);
    merge(first_row, seen.by_row, kRows);
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

  const std::size_t group_;  // heads that share the KV head
  const std::size_t rows_;
  std::size_t segment_ = 0;  // its first position
};

}  // namespace rts::cpu
