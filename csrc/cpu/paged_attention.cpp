#include "cpu/paged_attention.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace rts::cpu {
namespace {

// A thread takes about so many parts of the work: one that was delayed leaves the rest to the others.
constexpr std::size_t kPartsOfAThread = 6;
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
    : shape_(shape), kernels_(kernels()), team_(threads), head_numbers_(num_blocks * kBlockPositions * shape.head_dim) {
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
  cache_ = AnonymousMemory(2 * shape.layers * shape.kv_heads * head_numbers_ * sizeof(float));
}

void PagedAttention::begin_step(const PagedSequences& sequences) {
  kv_slots_ = sequences.kv_slots;
  tokens_ = static_cast<std::size_t>(sequences.query_start[sequences.sequences]);
  has_chunks_ = false;
  tasks_.clear();
  std::size_t pairs = 0;  // of a query and a position, at most
  for (std::size_t sequence = 0; sequence < sequences.sequences; ++sequence) {
    const auto first = static_cast<std::size_t>(sequences.query_start[sequence]);
    const auto end = static_cast<std::size_t>(sequences.query_start[sequence + 1]);
    const auto context = static_cast<std::size_t>(sequences.context_len[sequence]);
    has_chunks_ = has_chunks_ || end - first > 1;
    pairs += (end - first) * context;
    const std::int32_t* const blocks =
        sequences.block_table + static_cast<std::size_t>(sequences.rows[sequence]) * sequences.row_blocks;
    for (std::size_t token = first; token < end; token += kMaxQueries) {
      for (std::size_t kv_head = 0; kv_head < shape_.kv_heads; ++kv_head) {
        tasks_.push_back({.block_table = blocks,
                          .first_token = token,
                          .first_position = context - (end - token),
                          .queries = std::min(kMaxQueries, end - token),
                          .kv_head = kv_head});
      }
    }
  }
  is_shared_ = team_.threads() > 1 && pairs * shape_.heads * shape_.head_dim >= kSharedWork;
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
  if (has_chunks_) {  // a chunk's later queries see its earlier ones
    share(tokens_ * shape_.kv_heads,
          [&](std::size_t, std::size_t i) { store(given, i / shape_.kv_heads, i % shape_.kv_heads); });
  }
  share(tasks_.size(), [&](std::size_t thread, std::size_t i) {
    const Task& task = tasks_[i];
    if (!has_chunks_) store(given, task.first_token, task.kv_head);
    attend(given, task, scratch_.as<float>() + thread * scratch_floats_);
  });
}

// Calls work(thread, i) for each i < items.
template <typename Work>
void PagedAttention::share(std::size_t items, const Work& work) const noexcept {
  if (!is_shared_) {
    for (std::size_t i = 0; i < items; ++i) work(0, i);
    return;
  }
  struct Items {
    const Work& work;
    std::size_t count, part;
    std::atomic<std::size_t> next{0};
  } all{work, items, std::max<std::size_t>(1, items / (team_.threads() * kPartsOfAThread))};
  team_.run([&all](std::size_t thread) {
    for (std::size_t begin; (begin = all.next.fetch_add(all.part, std::memory_order_relaxed)) < all.count;) {
      for (std::size_t i = begin; i < std::min(begin + all.part, all.count); ++i) all.work(thread, i);
    }
  });
}

void PagedAttention::store(const Layer& layer, std::size_t token, std::size_t kv_head) const noexcept {
  kernels_.store_kv_float(layer.shape, kv_of(layer.index, kv_head), kv_slots_[token], layer.key.of(token, kv_head),
                          layer.value.of(token, kv_head));
}

void PagedAttention::attend(const Layer& layer, const Task& task, float* scratch) const noexcept {
  const std::size_t columns = shape_.heads * shape_.head_dim, first_head = task.kv_head * group_;
  const float* query = layer.query.of(task.first_token, first_head);
  auto query_stride = static_cast<std::size_t>(layer.query.token_stride);
  if (group_ > 1 && layer.query.head_stride != static_cast<std::ptrdiff_t>(shape_.head_dim)) {
    float* to = scratch + gathered_;
    query = to;
    query_stride = group_ * shape_.head_dim;
    for (std::size_t i = 0; i < task.queries; ++i) {
      for (std::size_t head = first_head; head < first_head + group_; ++head, to += shape_.head_dim) {
        std::memcpy(to, layer.query.of(task.first_token + i, head), shape_.head_dim * sizeof(float));
      }
    }
  }
  kernels_.attend_float(layer.shape, kv_of(layer.index, task.kv_head),
                        {.block_table = task.block_table,
                         .kv_head = 0,
                         .first_position = task.first_position,
                         .queries = task.queries,
                         .query = query,
                         .query_stride = query_stride,
                         .out = layer.out + task.first_token * columns + first_head * shape_.head_dim,
                         .out_stride = columns,
                         .scratch = scratch});
}

KvLayerFloat PagedAttention::kv_of(std::size_t layer, std::size_t kv_head) const noexcept {
  float* const keys = cache_.as<float>() + 2 * (layer * shape_.kv_heads + kv_head) * head_numbers_;
  return {keys, keys + head_numbers_};
}

}  // namespace rts::cpu
