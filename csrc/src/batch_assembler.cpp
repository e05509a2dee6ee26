#include "rts/batch_assembler.hpp"

namespace rts {

void BatchAssembler::assemble(const Plan& plan) const noexcept {
  std::uint32_t at = 0, sample = 0, r = 0;
  for (const PlanRow& row : plan.rows) {
    Sequence& sequence = *row.sequence;
    const std::uint32_t end = row.start + row.count;
    std::int32_t* const table = out_.block_table + std::size_t{sequence.row} * row_blocks_;
    for (; sequence.assembled_blocks < sequence.blocks.size(); ++sequence.assembled_blocks) {
      table[sequence.assembled_blocks] = sequence.blocks[sequence.assembled_blocks];
    }

    out_.query_start[r] = static_cast<std::int32_t>(at);
    out_.context_len[r] = static_cast<std::int32_t>(end);
    out_.rows[r] = static_cast<std::int32_t>(sequence.row);
    ++r;
    const auto known = static_cast<std::uint32_t>(sequence.tokens.size());
    // One division a row, not one a position.
    std::uint32_t block = row.start / block_size_, offset = row.start % block_size_;
    for (std::uint32_t position = row.start; position < end; ++position, ++at) {
      out_.tokens[at] = position < known ? sequence.tokens[position] : -1;
      out_.positions[at] = static_cast<std::int32_t>(position);
      out_.kv_slots[at] = std::int64_t{sequence.blocks[block]} * block_size_ + offset;
      if (++offset == block_size_) {
        offset = 0;
        ++block;
      }
    }
    if (row.sample) out_.logits_at[sample++] = at - 1;
  }
  out_.query_start[r] = static_cast<std::int32_t>(at);
}

}  // namespace rts
