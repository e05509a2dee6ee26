#include "cpu/attention.hpp"

#include "cpu/attention_layout.hpp"

namespace rts::cpu {

AttentionLayout attention_layout(const AttentionShape& shape) noexcept {
  constexpr std::size_t kLanes = AttentionLayout::kLanes, kTile = AttentionLayout::kMaxTileRows;
  const auto padded = [](std::size_t floats) { return (floats + kLanes - 1) / kLanes * kLanes; };
  const std::size_t rows = kMaxQueries * (shape.heads / shape.kv_heads);

  AttentionLayout layout{};
  layout.padded_dim = padded(shape.head_dim);
  const auto take = [&](std::size_t floats) {
    const std::size_t begin = layout.floats;
    layout.floats += padded(floats);
    return begin;
  };
  layout.scores = take(kTile * AttentionLayout::kStride);
  layout.parts = take(kTile * layout.padded_dim);
  layout.maxima = take(kTile);
  layout.totals = take(kTile);
  layout.queries = take(rows * AttentionLayout::kStride);
  layout.sums = take(rows * layout.padded_dim);
  layout.running_maxima = take(rows + kLanes);
  layout.running_totals = take(rows);
  return layout;
}

std::size_t attention_scratch(const AttentionShape& shape) noexcept {
  return attention_layout(shape).floats;
}

}  // namespace rts::cpu
