#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/anonymous_memory.hpp"
#include "cpu/attention.hpp"
#include "cpu/attention_plan.hpp"
#include "cpu/kernels.hpp"
#include "cpu/kv_cache.hpp"
#include "cpu/openmp_team.hpp"

namespace rts::cpu {

// The heads of a step's tokens as they lie in memory: the numbers of one beside each other, the heads anywhere.
struct TokenHeads {
  const float* numbers = nullptr;
  std::ptrdiff_t token_stride = 0;  // in floats, as the next
  std::ptrdiff_t head_stride = 0;

  const float* of(std::size_t token, std::size_t head) const noexcept {
    return numbers + static_cast<std::ptrdiff_t>(token) * token_stride +
           static_cast<std::ptrdiff_t>(head) * head_stride;
  }
};

struct PagedAttentionShape {
  std::size_t layers = 0;
  std::size_t heads = 0;
  std::size_t kv_heads = 0;
  std::size_t head_dim = 0;
};

// The keys and values of all layers in single precision, and attention over them, for a model whose other parts are
// somebody else's.
class PagedAttention {
 public:
  // Throws std::invalid_argument where the kernels do not support the shape. `threads`: see OpenMpTeam.
  PagedAttention(const PagedAttentionShape& shape, std::size_t num_blocks, std::size_t threads);

  const PagedAttentionShape& shape() const noexcept { return shape_; }
  std::size_t tokens() const noexcept { return tokens_; }  // of the step

  // `kv_slots` has one a token. The arrays must live as long as the step.
  void begin_step(const StepSequences& sequences, const std::int64_t* kv_slots);

  // Stores the step's keys and values of a layer, then attends its queries to their contexts: [tokens][heads][head_dim]
  // into `out`. Once a layer and step. `window` as in AttentionShape.
  void attend(std::size_t layer, const TokenHeads& query, const TokenHeads& key, const TokenHeads& value, float scale,
              std::size_t window, float* out) noexcept;

 private:
  struct Layer;

  template <typename Work>
  void share(std::size_t items, const Work& work) const noexcept;
  void store(const Layer& layer, std::size_t token, std::size_t kv_head) const noexcept;
  void attend(const Layer& layer, const AttentionPlan::Piece& piece, float* scratch) const noexcept;

  const PagedAttentionShape shape_;
  const Kernels& kernels_;
  const OpenMpTeam team_;
  KvCacheFloat cache_;
  std::size_t group_;  // heads that share a KV head

  std::size_t gathered_;        // where in a thread's scratch memory there is room for a task's queries
  std::size_t scratch_floats_;  // of a thread
  AnonymousMemory scratch_;

  const std::int64_t* kv_slots_ = nullptr;
  std::size_t tokens_ = 0;
  bool is_shared_ = false;  // among the threads
  AttentionPlan plan_;
};

}  // namespace rts::cpu
