#include "cpu/decoder.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <variant>

#include "cpu/kv_kernels.hpp"

namespace rts::cpu {
namespace {

// Up to so many rows, each thread quantizes all of them for itself: half a microsecond a row, as long as waiting for
// the other threads takes.
constexpr std::size_t kOwnRows = 2;
constexpr std::size_t kPanelPair = 2;  // panels that the kernels take together: one alone costs more than half of two
constexpr std::size_t kProducts = 4;   // of a layer, as far as they follow each other
constexpr std::size_t kAttention = 2;  // phases of a layer's attention that are shared out

struct Range {
  std::size_t begin, end;
};

Range part_of(std::size_t items, std::size_t part, std::size_t parts) {
  return {items * part / parts, items * (part + 1) / parts};
}

std::size_t whole_groups(std::size_t inputs) {
  return (inputs + kGroup - 1) / kGroup * kGroup;
}

std::size_t whole_vectors(std::size_t outputs) {
  return (outputs + kLanes - 1) / kLanes * kLanes;
}

std::variant<KvCacheInt8, KvCache> make_kv_cache(const DecoderSpec& spec, const DecoderLimits& limits) {
  if (limits.kv_format == KvFormat::kFloat16) {
    return KvCache(spec.layers, spec.kv_heads, spec.head_dim, limits.num_blocks);
  }
  return KvCacheInt8(spec.layers, spec.kv_heads, spec.head_dim, limits.num_blocks);
}

}  // namespace

struct Decoder::Product {
  const PackedMatrix* matrix = nullptr;
  float* out = nullptr;
  std::size_t stride = 0;
  Epilogue epilogue = Epilogue::kStore;
};

// Products with the same rows, as if their panels were those of one.
class Decoder::Products {
 public:
  Products(std::initializer_list<Product> products) : count_(products.size()) {
    std::ranges::copy(products, products_.begin());
  }

  std::span<const Product> each() const { return {products_.data(), count_}; }
  std::size_t panels() const {
    std::size_t all = 0;
    for (const Product& product : each()) all += product.matrix->shape.panels();
    return all;
  }
  // A panel's memory with what lies behind it in the same matrix; none past the end.
  std::span<const std::byte> memory_from(std::size_t panel) const {
    for (const Product& product : each()) {
      const MatrixShape& shape = product.matrix->shape;
      if (panel < shape.panels()) {
        return std::span(product.matrix->bytes, shape.bytes()).subspan(panel * shape.panel_bytes());
      }
      panel -= shape.panels();
    }
    return {};
  }

 private:
  std::array<Product, 3> products_;
  std::size_t count_;
};

// Memory for quantized rows of any width up to a bound.
class Decoder::Activations {
 public:
  Activations(std::size_t rows, std::size_t max_inputs)
      : values_(rows * max_inputs),
        scales_(rows * max_inputs / kGroup * sizeof(float)),
        corrections_(rows * max_inputs / kGroup * sizeof(std::int32_t)),
        sums_(rows * max_inputs / kGroup * sizeof(float)) {}

  QuantizedRows rows(std::size_t inputs) const {
    return {.inputs = whole_groups(inputs),
            .values = values_.as<std::int8_t>(),
            .scales = scales_.as<float>(),
            .corrections = corrections_.as<std::int32_t>(),
            .sums = sums_.as<float>()};
  }

 private:
  AnonymousMemory values_, scales_, corrections_, sums_;
};

Decoder::Decoder(const DecoderSpec& spec, const DecoderWeights& weights, ThreadPool& threads, const Kernels& kernels,
                 const DecoderLimits& limits)
    : spec_(spec),
      weights_(weights),
      threads_(threads),
      kernels_(kernels),
      limits_(limits),
      kv_(make_kv_cache(spec, limits)),
      attention_work_(spec.layers * kAttention) {
  for (std::size_t i = 0; i < spec.layers * kProducts + 1; ++i) product_work_.emplace_back(threads.threads());
  const auto floats = [&](std::size_t rows, std::size_t columns) {
    return memory_.emplace_back(rows * columns * sizeof(float)).as<float>();
  };
  const std::size_t tokens = limits.max_tokens, queries = spec.heads * spec.head_dim;
  x_ = floats(tokens, spec.hidden);
  branch_ = floats(tokens, spec.hidden);
  q_ = floats(tokens, queries);
  k_ = floats(tokens, spec.kv_heads * spec.head_dim);
  v_ = floats(tokens, spec.kv_heads * spec.head_dim);
  attended_ = floats(tokens, queries);
  inner_ = floats(tokens, whole_vectors(spec.intermediate));
  angles_ = floats(tokens, 4 * (spec.head_dim / 2));
  logits_ = floats(limits.max_samples, spec.vocabulary);
  const std::size_t widest = whole_groups(std::max({spec.hidden, queries, whole_vectors(spec.intermediate)}));
  shared_ = std::make_unique<Activations>(std::max(tokens, limits.max_samples), widest);
  const AttentionShape shape{.heads = spec.heads / spec.kv_heads, .kv_heads = 1, .head_dim = spec.head_dim};
  for (std::size_t i = 0; i < threads.threads(); ++i) {
    own_.push_back(std::make_unique<Activations>(kOwnRows, widest));
    scratch_.push_back(floats(1, std::max(attention_scratch(shape), spec.hidden)));
  }
}

Decoder::~Decoder() = default;

std::size_t Decoder::kv_block_bytes(const DecoderSpec& spec, KvFormat format) {
  const auto bytes_of = format == KvFormat::kFloat16 ? KvCache::block_bytes : KvCacheInt8::block_bytes;
  return bytes_of(spec.layers, spec.kv_heads, spec.head_dim);
}

void Decoder::step(const NativeStep& step) {
  step.sample(forward(step.shape, step.batch));
}

std::span<const float> Decoder::forward(const StepShape& shape, const StepBuffers& batch) {
  if (shape.tokens > limits_.max_tokens || shape.samples > limits_.max_samples) {
    throw std::length_error("a step of " + std::to_string(shape.tokens) + " tokens and " +
                            std::to_string(shape.samples) + " samples is larger than the model's memory");
  }
  shape_ = shape;
  batch_ = batch;
  plan_.make({.sequences = shape.sequences,
              .query_start = batch.query_start,
              .context_len = batch.context_len,
              .rows = batch.rows,
              .block_table = batch.block_table,
              .row_blocks = (limits_.max_context + kBlockPositions - 1) / kBlockPositions},
             spec_.kv_heads);
  for (SharedWork& work : attention_work_) work.reset();
  for (PartitionedWork& work : product_work_) work.reset();
  threads_.run([this](std::size_t thread) { run(thread); });
  return {logits_, shape.samples * spec_.vocabulary};
}

// A thread's way through the layers.
void Decoder::run(std::size_t thread) {
  const std::size_t threads = threads_.threads(), tokens = shape_.tokens, hidden = spec_.hidden;
  const std::size_t queries = spec_.heads * spec_.head_dim, inner = whole_vectors(spec_.intermediate);
  float* const scratch = scratch_[thread];
  SharedWork* attention_work = attention_work_.data();
  PartitionedWork* work = product_work_.data();

  const Range mine = part_of(tokens, thread, threads);
  for (std::size_t row = mine.begin; row < mine.end; ++row) embed(row);
  threads_.wait_for_all();

  // A row of x, normalised, after what a branch has left for it is added.
  const auto normalised = [&](const NormWeights& norm, const NormWeights* post_norm) {
    return [this, &norm, post_norm, scratch](std::size_t row) -> const float* {
      if (post_norm != nullptr && *post_norm) add_branch(*post_norm, row);
      normalise(norm, x_ + row * spec_.hidden, spec_.hidden, scratch);
      return scratch;
    };
  };
  // Where a branch's product goes: to x at once, unless it is normalised before.
  const auto into_x = [&](const PackedMatrix& matrix, const NormWeights& post_norm) {
    return Products{post_norm ? Product{&matrix, branch_, hidden} : Product{&matrix, x_, hidden, Epilogue::kAdd}};
  };
  const Products head = {{&weights_.head(), logits_, spec_.vocabulary}};

  std::size_t rows = tokens;
  const NormWeights* left = nullptr;  // the post-norm of the branch before
  for (std::size_t i = 0; i < spec_.layers; ++i) {
    const LayerWeights& layer = weights_.layer(i);
    const bool is_last = i + 1 == spec_.layers;
    const Products output = into_x(layer.output, layer.attention_post_norm);
    const Products up = {{&layer.up, inner_, inner, spec_.activation}};
    const Products down = into_x(layer.down, layer.mlp_post_norm);

    QuantizedRows input =
        quantize_rows(thread, hidden, tokens, left != nullptr && *left, normalised(layer.attention_norm, left));
    multiply(thread, *work++, attention_inputs(i), output, input, tokens);
    threads_.wait_for_all();

    SharedWork& turned = *attention_work++;
    SharedWork& attended = *attention_work++;
    attend(thread, i, turned, attended);
    if (is_last) {
      rows = shape_.samples;
      if (thread == 0) keep_sampled_rows();
    }
    threads_.wait_for_all();
    if (rows == 0) return;

    input = quantize_rows(thread, queries, rows, false, [&](std::size_t row) -> const float* {
      return attended_ + (is_last ? sampled_token(row) : row) * queries;
    });
    multiply(thread, *work++, output, up, input, rows);
    threads_.wait_for_all();

    input = quantize_rows(thread, hidden, rows, static_cast<bool>(layer.attention_post_norm),
                          normalised(layer.mlp_norm, &layer.attention_post_norm));
    multiply(thread, *work++, up, down, input, rows);
    threads_.wait_for_all();

    input = quantize_rows(thread, spec_.intermediate, rows, false,
                          [&](std::size_t row) -> const float* { return inner_ + row * inner; });
    multiply(thread, *work++, down, is_last ? head : attention_inputs(i + 1), input, rows);
    threads_.wait_for_all();
    left = &layer.mlp_post_norm;
  }

  const QuantizedRows input =
      quantize_rows(thread, hidden, rows, static_cast<bool>(*left), normalised(weights_.norm(), left));
  multiply(thread, *work, head, attention_inputs(0), input, rows);
}

std::size_t Decoder::sampled_token(std::size_t sample) const {
  return static_cast<std::size_t>(batch_.logits_at[sample]);
}

// Behind the last layer's keys and values only the rows that are sampled count: they become the first of x, which is a
// thirtieth less to compute of a prompt for a model of 30 layers.
void Decoder::keep_sampled_rows() {
  for (std::size_t sample = 0; sample < shape_.samples; ++sample) {
    std::copy_n(x_ + sampled_token(sample) * spec_.hidden, spec_.hidden, x_ + sample * spec_.hidden);
  }
}

Decoder::Products Decoder::attention_inputs(std::size_t layer) const {
  const std::size_t keys = spec_.kv_heads * spec_.head_dim;
  const LayerWeights& weights = weights_.layer(layer);
  return {{&weights.q, q_, spec_.heads * spec_.head_dim}, {&weights.k, k_, keys}, {&weights.v, v_, keys}};
}

void Decoder::embed(std::size_t row) {
  float* const x = x_ + row * spec_.hidden;
  weights_.embed(static_cast<std::size_t>(batch_.tokens[row]), {x, spec_.hidden});
  if (spec_.embedding_scale != 1.0F) {
    for (std::size_t i = 0; i < spec_.hidden; ++i) x[i] *= spec_.embedding_scale;
  }
  const std::int32_t position = batch_.positions[row];
  if (weights_.has_positions()) {
    float* const own = branch_ + row * spec_.hidden;
    weights_.embed_position(static_cast<std::size_t>(position), {own, spec_.hidden});
    kernels_.add(x, own, spec_.hidden);
  }
  const std::size_t half = spec_.head_dim / 2;
  float* angles = angles_ + row * 4 * half;
  for (const std::vector<float>* table : {&spec_.frequencies, &spec_.local_frequencies}) {
    for (std::size_t i = 0; i < table->size(); ++i) {
      const double angle = static_cast<float>(position) * (*table)[i];
      angles[i] = static_cast<float>(std::cos(angle));
      angles[half + i] = static_cast<float>(std::sin(angle));
    }
    angles += 2 * half;
  }
}

void Decoder::attend(std::size_t thread, std::size_t layer, SharedWork& turned, SharedWork& attended) {
  const std::size_t group = spec_.heads / spec_.kv_heads, head_dim = spec_.head_dim;
  const std::size_t queries = spec_.heads * head_dim;
  const AttentionShape shape{.heads = group,
                             .kv_heads = 1,
                             .head_dim = head_dim,
                             .scale = spec_.attention_scale,
                             .window = spec_.windows[layer]};
  if (plan_.has_chunks()) {
    const std::size_t items = shape_.tokens * spec_.kv_heads;
    turned.share(items, SharedWork::part_of(items, threads_.threads()), [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) {
        turn_and_store(layer, i / spec_.kv_heads, i % spec_.kv_heads);
      }
    });
    threads_.wait_for_all();
  }
  attended.share(plan_.pieces().size(), 1, [&](std::size_t i, std::size_t) {
    const AttentionPlan::Piece& piece = plan_.pieces()[i];
    if (!plan_.has_chunks()) turn_and_store(layer, piece.first_token, piece.kv_head);
    const std::size_t at = piece.first_token * queries + piece.kv_head * group * head_dim;
    const AttentionTask task{.block_table = piece.block_table,
                             .kv_head = 0,
                             .first_position = piece.first_position,
                             .queries = piece.queries,
                             .query = q_ + at,
                             .query_stride = queries,
                             .out = attended_ + at,
                             .out_stride = queries,
                             .scratch = scratch_[thread]};
    std::visit([&](const auto& kv) { cpu::attend(kernels_, shape, kv.of(layer, piece.kv_head), task); }, kv_);
  });
}

// Normalises and turns the heads of a KV head, its queries and its key, and stores key and value.
void Decoder::turn_and_store(std::size_t layer, std::size_t row, std::size_t kv_head) {
  const LayerWeights& weights = weights_.layer(layer);
  const std::size_t group = spec_.heads / spec_.kv_heads, head_dim = spec_.head_dim, half = head_dim / 2;
  const bool is_local = spec_.windows[layer] != 0 && !spec_.local_frequencies.empty();
  const float* const cosines = angles_ + row * 4 * half + (is_local ? 2 * half : 0);
  const auto turn = [&](const NormWeights& norm, float* head) {
    if (norm) normalise(norm, head, head_dim, head);
    if (!spec_.frequencies.empty()) kernels_.rotate_positions(head, head_dim, cosines, cosines + half);
  };
  float* const query = q_ + (row * spec_.heads + kv_head * group) * head_dim;
  for (std::size_t head = 0; head < group; ++head) turn(weights.q_norm, query + head * head_dim);
  const std::size_t at = (row * spec_.kv_heads + kv_head) * head_dim;
  turn(weights.k_norm, k_ + at);
  const AttentionShape shape{.heads = group, .kv_heads = 1, .head_dim = head_dim};
  std::visit(
      [&](const auto& kv) { store_kv(kernels_, shape, kv.of(layer, kv_head), batch_.kv_slots[row], k_ + at, v_ + at); },
      kv_);
}

// `following` will be multiplied next.
void Decoder::multiply(std::size_t thread, PartitionedWork& work, const Products& products, const Products& following,
                       const QuantizedRows& input, std::size_t rows) {
  const auto pairs_of = [](const Products& of) { return (of.panels() + kPanelPair - 1) / kPanelPair; };
  const std::size_t panels = products.panels(), pairs = pairs_of(products), threads = threads_.threads();
  const std::size_t next_own = kPanelPair * PartitionedWork::own_begin(pairs_of(following), thread, threads);
  const auto take = [&](std::size_t first_pair, std::size_t last_pair, std::size_t range_end) {
    std::size_t begin = first_pair * kPanelPair, end = std::min(last_pair * kPanelPair, panels);
    const std::span<const std::byte> next =
        last_pair < range_end ? products.memory_from(end) : following.memory_from(next_own);
    std::size_t before = 0;  // panels of other products
    for (const Product& product : products.each()) {
      const std::size_t own = product.matrix->shape.panels();
      if (begin < own) {
        const PanelRange range{begin, std::min(end, own), end <= own ? next : products.memory_from(before + own)};
        kernels_.multiply(*product.matrix, range, input, rows, product.epilogue, product.out, product.stride);
      }
      before += own;
      if (end <= own) return;
      begin = begin > own ? begin - own : 0;
      end -= own;
    }
  };
  work.share(thread, pairs, PartitionedWork::part_of(pairs, threads), take);
}

// Quantizes the rows that `row_of` gives; all are there when it returns. `is_once`: `row_of` must be called once a row.
template <typename RowOf>
QuantizedRows Decoder::quantize_rows(std::size_t thread, std::size_t columns, std::size_t rows, bool is_once,
                                     RowOf&& row_of) {
  if (rows <= kOwnRows && (!is_once || threads_.threads() == 1)) {
    const QuantizedRows own = own_[thread]->rows(columns);
    for (std::size_t row = 0; row < rows; ++row) kernels_.quantize(row_of(row), columns, columns, 1, own, row);
    return own;
  }
  const QuantizedRows shared = shared_->rows(columns);
  const Range mine = part_of(rows, thread, threads_.threads());
  for (std::size_t row = mine.begin; row < mine.end; ++row) {
    kernels_.quantize(row_of(row), columns, columns, 1, shared, row);
  }
  threads_.wait_for_all();
  return shared;
}

void Decoder::normalise(const NormWeights& norm, const float* x, std::size_t size, float* out) const {
  if (spec_.norm == NormKind::kRms) {
    kernels_.rms_norm(x, norm.weight.data(), size, spec_.norm_epsilon, out);
  } else {
    kernels_.layer_norm(x, norm.weight.data(), norm.bias.data(), size, spec_.norm_epsilon, out);
  }
}

void Decoder::add_branch(const NormWeights& post_norm, std::size_t row) {
  float* const branch = branch_ + row * spec_.hidden;
  normalise(post_norm, branch, spec_.hidden, branch);
  kernels_.add(x_ + row * spec_.hidden, branch, spec_.hidden);
}

}  // namespace rts::cpu
