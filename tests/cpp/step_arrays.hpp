#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "rts/batch_assembler.hpp"

namespace rts {

// The memory of a step, as a worker owns it; for fixtures to inherit. Every element begins as `fill`.
class StepArrays {
 protected:
  explicit StepArrays(const SchedulerConfig& config, std::int32_t fill = 0)
      : tokens_(config.token_budget, fill),
        positions_(tokens_),
        query_start_(config.max_sequences + 1, fill),
        context_len_(config.max_sequences, fill),
        rows_(context_len_),
        block_table_(
            std::size_t{config.max_sequences} * ((config.max_context + config.block_size - 1) / config.block_size),
            fill),
        sampled_(context_len_),
        kv_slots_(config.token_budget, fill),
        logits_at_(config.max_sequences, fill),
        logprobs_(config.max_sequences, static_cast<float>(fill)) {}

  StepBuffers buffers() {
    return {.tokens = tokens_.data(),
            .positions = positions_.data(),
            .kv_slots = kv_slots_.data(),
            .query_start = query_start_.data(),
            .context_len = context_len_.data(),
            .rows = rows_.data(),
            .block_table = block_table_.data(),
            .logits_at = logits_at_.data()};
  }

  std::vector<std::int32_t> tokens_, positions_, query_start_, context_len_, rows_, block_table_, sampled_;
  std::vector<std::int64_t> kv_slots_, logits_at_;
  std::vector<float> logprobs_;
};

}  // namespace rts
