#pragma once

#include <cstdint>
#include <vector>

#include "rts/scheduler.hpp"

namespace rts {

// Caller-owned memory that steps are assembled into, for up to token_budget tokens T of up to max_sequences sequences
// R.
struct StepBuffers {
  std::int32_t* tokens = nullptr;       // [T]; -1 where the token is still being sampled
  std::int32_t* positions = nullptr;    // [T]
  std::int64_t* kv_slots = nullptr;     // [T] block × block_size + offset in it
  std::int32_t* query_start = nullptr;  // [R + 1]
  std::int32_t* context_len = nullptr;  // [R] positions after the step
  std::int32_t* rows = nullptr;         // [R] of block_table
  std::int32_t* block_table = nullptr;  // [max_sequences × blocks of a full context], kept from step to step
  std::int64_t* logits_at = nullptr;    // [samples] indices into the T tokens, ascending
};

// Writes a plan as flat arrays. A sequence keeps its row of the block table for as long as it runs, so only the blocks
// that it was given since the last step are written.
class BatchAssembler {
 public:
  explicit BatchAssembler(const SchedulerConfig& config)
      : block_size_(config.block_size), row_blocks_((config.max_context + config.block_size - 1) / config.block_size) {}

  void bind(const StepBuffers& buffers) { out_ = buffers; }
  void assemble(const Plan& plan) const noexcept;

 private:
  std::uint32_t block_size_;
  std::uint32_t row_blocks_;
  StepBuffers out_;
};

}  // namespace rts
