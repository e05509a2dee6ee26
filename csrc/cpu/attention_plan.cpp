#include "cpu/attention_plan.hpp"

#include <algorithm>

#include "cpu/attention.hpp"

namespace rts::cpu {

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
    for (std::size_t token = first; token < end; token += kMaxQueries) {
      for (std::size_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
        pieces_.push_back({.block_table = blocks,
                           .first_token = token,
                           .first_position = context - (end - token),
                           .queries = std::min(kMaxQueries, end - token),
                           .kv_head = kv_head});
      }
    }
  }
}

}  // namespace rts::cpu
