#include "cpu/paged_attention.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/shared_work.hpp"

namespace rts::cpu {
namespace {

// Products of a query's number and a key's, in one layer: some 25 µs by one thread, where meeting the others begins to
// pay.
constexpr std::size_t kSharedWork = 100'000;
constexpr std::size_t kAlignment = 16;  // of scratch memory, in floats

std::size_t aligned(std::size_t floats) {
  return (floats + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

// What attend() was called with.
struct PagedAttention::Layer {
  AttentionShape shape;  // of one KV head
  std::size_t index;
  TokenHeads query, key, value;
  float* out;
};

PagedAttention::PagedAttention(const PagedAttentionShape& shape, std::size_t num_blocks, std::size_t threads)
    : shape_(shape),
      kernels_(kernels()),
      team_(threads),
      cache_(shape.layers, shape.kv_heads, shape.head_dim, num_blocks) {
  if (shape.kv_heads == 0 || shape.heads == 0 || shape.heads % shape.kv_heads != 0) {
    throw std::invalid_argument(std::to_string(shape.heads) + " heads cannot share " + std::to_string(shape.kv_heads) +
                                " KV heads");
  }
  if (shape.head_dim == 0 || shape.head_dim % 8 != 0 || shape.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("heads of " + std::to_string(shape.head_dim) + " numbers are not supported");
  }
  group_ = shape.heads / shape.kv_heads;
  gathered_ = aligned(attention_scratch({.heads = group_, .kv_heads = 1, .head_dim = shape.head_dim}));
  scratch_floats_ = gathered_ + aligned(kMaxQueries * group_ * shape.head_dim);
  scratch_ = AnonymousMemory(team_.threads() * scratch_floats_ * sizeof(float));
}

void PagedAttention::begin_step(const StepSequences& sequences, const std::int64_t* kv_slots) {
  kv_slots_ = kv_slots;
  tokens_ = static_cast<std::size_t>(sequences.query_start[sequences.sequences]);
  plan_.make(sequences, shape_.kv_heads);
  is_shared_ = team_.threads() > 1 && plan_.pairs() * shape_.heads * shape_.head_dim >= kSharedWork;
}

void PagedAttention::attend(std::size_t layer, const TokenHeads& query, const TokenHeads& key, const TokenHeads& value,
                            float scale, std::size_t window, float* out) noexcept {
  const Layer given{
      .shape = {.heads = group_, .kv_heads = 1, .head_dim = shape_.head_dim, .scale = scale, .window = window},
      .index = layer,
      .query = query,
      .key = key,
      .value = value,
      .out = out};
  if (plan_.has_chunks()) {
    share(tokens_ * shape_.kv_heads,
          [&](std::size_t, std::size_t i) { store(given, i / shape_.kv_heads, i % shape_.kv_heads); });
  }
  share(plan_.pieces().size(), [&](std::size_t thread, std::size_t i) {
    const AttentionPlan::Piece& piece = plan_.pieces()[i];
    if (!plan_.has_chunks()) store(given, piece.first_token, piece.kv_head);
    attend(given, piece, scratch_.as<float>() + thread * scratch_floats_);
  });
}

// Calls work(thread, i) for each i < items.
template <typename Work>
void PagedAttention::share(std::size_t items, const Work& work) const noexcept {
  if (!is_shared_) {
    for (std::size_t i = 0; i < items; ++i) work(0, i);
    return;
  }
  SharedWork all;
  const std::size_t part = SharedWork::part_of(items, team_.threads());
  team_.run([&](std::size_t thread) {
    all.share(items, part, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) work(thread, i);
    });
  });
}

void PagedAttention::store(const Layer& layer, std::size_t token, std::size_t kv_head) const noexcept {
  kernels_.store_kv_float(layer.shape, cache_.of(layer.index, kv_head), kv_slots_[token], layer.key.of(token, kv_head),
                          layer.value.of(token, kv_head));
}

void PagedAttention::attend(const Layer& layer, const AttentionPlan::Piece& piece, float* scratch) const noexcept {
  const std::size_t columns = shape_.heads * shape_.head_dim, first_head = piece.kv_head * group_;
  const float* query = layer.query.of(piece.first_token, first_head);
  auto query_stride = static_cast<std::size_t>(layer.query.token_stride);
  if (group_ > 1 && layer.query.head_stride != static_cast<std::ptrdiff_t>(shape_.head_dim)) {
    float* to = scratch + gathered_;
    query = to;
    query_stride = group_ * shape_.head_dim;
    for (std::size_t i = 0; i < piece.queries; ++i) {
      for (std::size_t head = first_head; head < first_head + group_; ++head, to += shape_.head_dim) {
        std::memcpy(to, layer.query.of(piece.first_token + i, head), shape_.head_dim * sizeof(float));
      }
    }
  }
  kernels_.attend_float(layer.shape, cache_.of(layer.index, piece.kv_head),
                        {.block_table = piece.block_table,
                         .kv_head = 0,
                         .first_position = piece.first_position,
                         .queries = piece.queries,
                         .query = query,
                         .query_stride = query_stride,
                         .out = layer.out + piece.first_token * columns + first_head * shape_.head_dim,
                         .out_stride = columns,
                         .scratch = scratch});
}

}  // namespace rts::cpu
