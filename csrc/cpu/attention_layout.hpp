#pragma once

#include <cstddef>

#include "cpu/attention.hpp"

namespace rts::cpu {

// How a task's scratch memory is divided. A row is a query with one of its heads; a tile is the rows whose scores are
// computed together.
struct AttentionLayout {
  static constexpr std::size_t kLanes = 16;
  static constexpr std::size_t kMaxTileRows = 16;
  // Floats from a row to the next, known when compiled so that a tile's rows need no pointers of their own, and no
  // power of two, which would put them all into a few sets of the cache.
  static constexpr std::size_t kStride = kSegment + kLanes;
  static_assert(kMaxHeadDim <= kSegment);

  std::size_t padded_dim;  // head_dim, up to a whole vector

  // Where the arrays begin, in floats.
  std::size_t scores;   // [tile rows][kStride] of a segment's positions, then their weights: floats, or 16 bits
  std::size_t parts;    // [tile rows][padded_dim] a segment's values, weighted
  std::size_t maxima;   // [tile rows] a segment's largest score
  std::size_t totals;   // [tile rows] the sum of its weights
  std::size_t queries;  // [rows][kStride] as the format wants them
  // Of all segments up to now, and a tile more that is read as part of a vector only:
  std::size_t sums;            // [rows][padded_dim]
  std::size_t running_maxima;  // [rows]
  std::size_t running_totals;  // [rows]

  std::size_t floats;
};

AttentionLayout attention_layout(const AttentionShape& shape) noexcept;

}  // namespace rts::cpu
