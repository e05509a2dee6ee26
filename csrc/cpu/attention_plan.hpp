#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace rts::cpu {

// What a step's sequences are, in the arrays that rts::StepBuffers describes.
struct StepSequences {
  std::size_t sequences = 0;
  const std::int32_t* query_start = nullptr;
  const std::int32_t* context_len = nullptr;
  const std::int32_t* rows = nullptr;
  const std::int32_t* block_table = nullptr;
  std::size_t row_blocks = 0;  // of block_table
};

// A step's attention in pieces, the same in every layer.
class AttentionPlan {
 public:
  // Neighbouring queries of a sequence, and the heads of one KV head.
  struct Piece {
    const std::int32_t* block_table = nullptr;  // of the sequence
    std::size_t first_token = 0;                // of the step
    std::size_t first_position = 0;             // of the sequence
    std::size_t queries = 0;
    std::size_t kv_head = 0;
  };

  void make(const StepSequences& step, std::size_t kv_heads);

  std::span<const Piece> pieces() const { return pieces_; }
  // A sequence has several tokens: the later ones see the earlier, so all keys and values must be stored before.
  bool has_chunks() const { return has_chunks_; }
  // Pairs of a query and a position that it may see, at most.
  std::size_t pairs() const { return pairs_; }

 private:
  std::vector<Piece> pieces_;
  bool has_chunks_ = false;
  std::size_t pairs_ = 0;
};

}  // namespace rts::cpu
