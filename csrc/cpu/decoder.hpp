#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <variant>
#include <vector>

#include "cpu/anonymous_memory.hpp"
#include "cpu/attention_plan.hpp"
#include "cpu/decoder_spec.hpp"
#include "cpu/decoder_weights.hpp"
#include "cpu/kernels.hpp"
#include "cpu/kv_cache.hpp"
#include "cpu/partitioned_work.hpp"
#include "cpu/shared_work.hpp"
#include "cpu/thread_pool.hpp"
#include "rts/native_model.hpp"

namespace rts::cpu {

// What keys and values are kept as.
enum class KvFormat : std::uint8_t { kInt8, kFloat16 };

// What a decoder's memory is made for.
struct DecoderLimits {
  std::size_t max_tokens = 0;   // of a step
  std::size_t max_samples = 0;  // of a step: tokens that want logits
  std::size_t max_context = 0;  // positions of a sequence
  std::size_t num_blocks = 0;   // of the KV cache, kBlockPositions each
  KvFormat kv_format = KvFormat::kInt8;
};

// Runs a decoder's steps on the CPU: all threads go through the layers side by side, and share each layer's work. What
// a sequence gets depends on its own tokens alone, to the bit.
class Decoder final : public NativeModel {
 public:
  // `weights` must be bound; they and `threads` must outlive the object.
  Decoder(const DecoderSpec& spec, const DecoderWeights& weights, ThreadPool& threads, const Kernels& kernels,
          const DecoderLimits& limits);
  ~Decoder() override;

  // What a block of the KV cache takes.
  static std::size_t kv_block_bytes(const DecoderSpec& spec, KvFormat format);

  void step(const NativeStep& step) override;

  // The logits of batch.logits_at, [samples × vocabulary]; valid until the next call. Throws std::length_error where
  // the step is larger than its memory.
  std::span<const float> forward(const StepShape& shape, const StepBuffers& batch);

 private:
  struct Product;
  class Products;
  class Activations;

  void run(std::size_t thread);
  void embed(std::size_t row);
  void attend(std::size_t thread, std::size_t layer, SharedWork& turned, SharedWork& attended);
  void turn_and_store(std::size_t layer, std::size_t row, std::size_t kv_head);
  Products attention_inputs(std::size_t layer) const;
  void multiply(std::size_t thread, PartitionedWork& work, const Products& products, const Products& following,
                const QuantizedRows& input, std::size_t rows);
  template <typename RowOf>
  QuantizedRows quantize_rows(std::size_t thread, std::size_t columns, std::size_t rows, bool is_once, RowOf&& row_of);
  void normalise(const NormWeights& norm, const float* x, std::size_t size, float* out) const;
  void add_branch(const NormWeights& post_norm, std::size_t row);
  std::size_t sampled_token(std::size_t sample) const;
  void keep_sampled_rows();

  const DecoderSpec spec_;
  const DecoderWeights& weights_;
  ThreadPool& threads_;
  const Kernels& kernels_;
  const DecoderLimits limits_;
  const std::variant<KvCacheInt8, KvCache> kv_;
  std::vector<AnonymousMemory> memory_;
  std::vector<SharedWork> attention_work_;
  std::vector<PartitionedWork> product_work_;
  std::unique_ptr<Activations> shared_;
  std::vector<std::unique_ptr<Activations>> own_;  // of each thread
  std::vector<float*> scratch_;                    // of each thread

  float* x_ = nullptr;       // [max_tokens, hidden] what the layers add to
  float* branch_ = nullptr;  // [max_tokens, hidden] what is normalised before it is added
  float *q_ = nullptr, *k_ = nullptr, *v_ = nullptr, *attended_ = nullptr;  // [max_tokens, heads × head_dim]
  float* inner_ = nullptr;                                                  // [max_tokens, intermediate]
  float* angles_ = nullptr;  // [tables, 2, max_tokens, head_dim / 2] cosines and sines
  float* logits_ = nullptr;  // [max_samples, vocabulary]

  StepShape shape_;
  StepBuffers batch_;
  AttentionPlan plan_;
};

}  // namespace rts::cpu
