#include "cpu/attention_plan.hpp"

#include <algorithm>
#include <utility>

#include "cpu/attention.hpp"

namespace rts::cpu {
namespace {

// A short chunk is cut as well: a long context times few queries is work for more than one thread.
constexpr std::size_t kLeastQueries = 4;
constexpr std::size_t kChunkPieces = 4;

std::size_t queries_of_piece(std::size_t queries) {
  const std::size_t even = (queries + kChunkPieces - 1) / kChunkPieces;
  return std::min(std::max(even, kLeastQueries), kMaxQueries);
}

std::size_t pairs_of(const AttentionPlan::Piece& piece) {
  return piece.queries * (piece.first_position + piece.queries);
}

}  // namespace

void AttentionPlan::make(const StepSequences& step, std::size_t kv_heads) {
  pieces_.clear();
  has_chunks_ = false;
  pairs_ = 0;
  for (std::size_t sequence = 0; sequence < step.sequences; ++sequence) {
    const auto first = static_cast<std::size_t>(step.query_start[sequence]);
    const auto end = static_cast<std::size_t>(step.query_start[sequence + 1]);
    const auto context = static_cast<std::size_t>(step.context_len[sequence]);
    has_chunks_ = has_chunks_ || end - first > 1;
    pairs_ += (end - first) * context;
    const std::int32_t* const blocks =
        step.block_table + static_cast<std::size_t>(step.rows[sequence]) * step.row_blocks;
    const std::size_t most = queries_of_piece(end - first);
    for (std::size_t token = first; token < end; token += most) {
      for (std::size_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
        pieces_.push_back({.block_table = blocks,
                           .first_token = token,
                           .first_position = context - (end - token),
                           .queries = std::min(most, end - token),
                           .kv_head = kv_head});
      }
    }
  }
  // The largest first, so that threads end at the same time.
  if (has_chunks_) {
    std::ranges::sort(pieces_, [](const Piece& a, const Piece& b) {
      return std::pair(pairs_of(a), b.first_token) > std::pair(pairs_of(b), a.first_token);
    });
  }
}

}  // namespace rts::cpu
