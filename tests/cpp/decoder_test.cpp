#include "cpu/decoder.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/anonymous_memory.hpp"
#include "stored_matrix.hpp"

namespace rts::cpu {
namespace {

using testing::random_matrix;
using testing::StoredMatrix;

constexpr std::size_t kContext = 64, kVocabulary = 90;
constexpr std::size_t kRowBlocks = kContext / kBlockPositions;

// A decoder's files, tiny: the hidden size is a group more than a whole number of rotations of quantized batches, and
// no matrix is a whole number of panels.
class TinyModel {
 public:
  TinyModel() {
    for (std::size_t i = 0; i < spec.head_dim / 2; ++i) {
      spec.frequencies.push_back(std::pow(10000.0F, -2.0F * static_cast<float>(i) / static_cast<float>(spec.head_dim)));
    }
    spec.check();
    const std::size_t queries = spec.heads * spec.head_dim, keys = spec.kv_heads * spec.head_dim;
    add("embedding", GgufTypeId::kF32, spec.vocabulary, spec.hidden);
    add("head", GgufTypeId::kQ8_0, spec.vocabulary, spec.hidden);
    add("norm", GgufTypeId::kF32, 1, spec.hidden);
    for (std::size_t layer = 0; layer < spec.layers; ++layer) {
      // Layers of 4 bits and of floats take turns.
      const GgufTypeId type = layer % 2 == 0 ? GgufTypeId::kQ4_1 : GgufTypeId::kF16;
      const std::string prefix = std::to_string(layer) + ".";
      for (const char* const norm : {"attention_norm", "mlp_norm"}) {
        add(prefix + norm, GgufTypeId::kF32, 1, spec.hidden);
      }
      add(prefix + "q", type, queries, spec.hidden);
      add(prefix + "k", type, keys, spec.hidden);
      add(prefix + "v", type, keys, spec.hidden);
      add(prefix + "output", type, spec.hidden, queries);
      add(prefix + "gate", type, spec.intermediate, spec.hidden);
      add(prefix + "up", type, spec.intermediate, spec.hidden);
      add(prefix + "down", type, spec.hidden, spec.intermediate);
    }
  }

  StoredTensors tensors() const {
    StoredTensors stored;
    for (const auto& [part, matrix] : matrices_) {
      stored[part] = {.type = matrix.type, .bytes = matrix.bytes, .rows = matrix.rows, .columns = matrix.columns};
    }
    return stored;
  }

  DecoderSpec spec{.layers = 3,
                   .hidden = 160,
                   .heads = 4,
                   .kv_heads = 2,
                   .head_dim = 40,
                   .intermediate = 224,
                   .vocabulary = kVocabulary,
                   .norm_epsilon = 1e-5F,
                   .attention_scale = 0.16F,
                   .windows = {0, 0, 0},
                   .frequencies = {},
                   .local_frequencies = {}};

 private:
  void add(const std::string& part, GgufTypeId type, std::size_t rows, std::size_t columns) {
    matrices_.emplace(part, random_matrix(type, rows, columns, matrices_.size() + 1));
  }

  std::map<std::string, StoredMatrix> matrices_;
};

// Runs texts through a decoder of so many threads, each sequence in blocks of its own.
class Reading {
 public:
  Reading(const TinyModel& model, std::size_t threads, std::size_t sequences, KvFormat kv_format = KvFormat::kInt8)
      : spec_(model.spec), threads_(threads), weights_(spec_, model.tensors()), packed_(weights_.packed_bytes()) {
    weights_.pack(packed_.bytes(), threads_);
    weights_.bind(packed_.bytes());
    decoder_.emplace(spec_, weights_, threads_, kernels(),
                     DecoderLimits{.max_tokens = sequences * kContext,
                                   .max_samples = sequences,
                                   .max_context = kContext,
                                   .num_blocks = sequences * kRowBlocks,
                                   .kv_format = kv_format});
    table_.resize(sequences * kRowBlocks);
    // Nobody's blocks are neighbours.
    for (std::size_t i = 0; i < table_.size(); ++i) {
      table_[i] = static_cast<std::int32_t>(i % kRowBlocks * sequences + i / kRowBlocks);
    }
    done_.resize(sequences);
  }

  // Computes the next positions of some sequences, side by side: what follows the last of each.
  struct Chunk {
    std::size_t sequence;
    std::vector<std::int32_t> tokens;
  };
  std::vector<std::vector<float>> step(const std::vector<Chunk>& chunks) {
    std::vector<std::int32_t> tokens, positions, starts{0}, contexts, rows;
    std::vector<std::int64_t> slots, at;
    for (const Chunk& chunk : chunks) {
      for (const std::int32_t token : chunk.tokens) {
        const std::size_t position = done_[chunk.sequence]++;
        const std::int32_t block = table_[chunk.sequence * kRowBlocks + position / kBlockPositions];
        tokens.push_back(token);
        positions.push_back(static_cast<std::int32_t>(position));
        slots.push_back(
            static_cast<std::int64_t>(static_cast<std::size_t>(block) * kBlockPositions + position % kBlockPositions));
      }
      starts.push_back(static_cast<std::int32_t>(tokens.size()));
      contexts.push_back(static_cast<std::int32_t>(done_[chunk.sequence]));
      rows.push_back(static_cast<std::int32_t>(chunk.sequence));
      at.push_back(static_cast<std::int64_t>(tokens.size()) - 1);
    }
    const std::span<const float> logits = decoder_->forward({.tokens = static_cast<std::uint32_t>(tokens.size()),
                                                             .sequences = static_cast<std::uint32_t>(chunks.size()),
                                                             .samples = static_cast<std::uint32_t>(chunks.size())},
                                                            {.tokens = tokens.data(),
                                                             .positions = positions.data(),
                                                             .kv_slots = slots.data(),
                                                             .query_start = starts.data(),
                                                             .context_len = contexts.data(),
                                                             .rows = rows.data(),
                                                             .block_table = table_.data(),
                                                             .logits_at = at.data()});
    std::vector<std::vector<float>> out;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      const auto own = logits.subspan(i * kVocabulary, kVocabulary);
      out.emplace_back(own.begin(), own.end());
    }
    return out;
  }

 private:
  DecoderSpec spec_;
  ThreadPool threads_;
  DecoderWeights weights_;
  AnonymousMemory packed_;
  std::optional<Decoder> decoder_;
  std::vector<std::int32_t> table_;
  std::vector<std::size_t> done_;
};

std::vector<std::int32_t> text(std::size_t length, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> tokens(length);
  for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(random() % kVocabulary);
  return tokens;
}

std::vector<std::int32_t> part(const std::vector<std::int32_t>& tokens, std::size_t begin, std::size_t end) {
  return {tokens.begin() + static_cast<std::ptrdiff_t>(begin), tokens.begin() + static_cast<std::ptrdiff_t>(end)};
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class EachKvFormat : public ::testing::TestWithParam<KvFormat> {};
INSTANTIATE_TEST_SUITE_P(All, EachKvFormat, ::testing::Values(KvFormat::kInt8, KvFormat::kFloat16));

// What follows a text is the same to the bit by any number of threads, in whatever chunks it was read and whatever was
// beside it.
TEST_P(EachKvFormat, IsTheSameHoweverATextIsRead) {
  const TinyModel model;
  const std::vector<std::int32_t> tokens = text(kContext - 1, 1);
  const std::vector<float> expected = Reading(model, 1, 1, GetParam()).step({{0, tokens}}).front();
  for (const float logit : expected) ASSERT_TRUE(std::isfinite(logit));

  for (const std::size_t threads : {1, 2, 3}) {
    for (const std::size_t size : {1, 2, 3, 7, 20}) {
      Reading reading(model, threads, 1, GetParam());
      std::vector<float> last;
      for (std::size_t at = 0; at < tokens.size(); at += size) {
        last = reading.step({{0, part(tokens, at, std::min(tokens.size(), at + size))}}).front();
      }
      ASSERT_TRUE(same(last, expected)) << threads << " threads, chunks of " << size;
    }

    constexpr std::size_t kOthers = 5;
    Reading reading(model, threads, kOthers + 1, GetParam());
    std::vector<float> last;
    for (std::size_t at = 0; at < tokens.size(); at += 9) {
      std::vector<Reading::Chunk> chunks = {{2, part(tokens, at, std::min(tokens.size(), at + 9))}};
      for (std::size_t other = 0; other <= kOthers; ++other) {
        if (other != 2) chunks.push_back({other, text(other + 1, static_cast<unsigned>(at + other))});
      }
      last = reading.step(chunks).front();
    }
    ASSERT_TRUE(same(last, expected)) << threads << " threads, beside others";
  }
}

TEST(Decoder, ATextIsReadToItsEnd) {
  const TinyModel model;
  std::vector<std::int32_t> tokens = text(20, 1);
  const std::vector<float> logits = Reading(model, 2, 1).step({{0, tokens}}).front();
  for (const std::size_t changed : {std::size_t{0}, std::size_t{11}, tokens.size() - 1}) {
    std::vector<std::int32_t> other = tokens;
    other[changed] = (other[changed] + 1) % static_cast<std::int32_t>(kVocabulary);
    EXPECT_FALSE(same(Reading(model, 2, 1).step({{0, other}}).front(), logits)) << changed;
  }
}

TEST(Decoder, RefusesAStepThatItHasNoMemoryFor) {
  const TinyModel model;
  Reading reading(model, 1, 1);
  EXPECT_NO_THROW(reading.step({{0, text(1, 1)}}));
  EXPECT_THROW(reading.step({{0, text(1, 1)}, {0, text(1, 2)}}), std::length_error);
}

}  // namespace
}  // namespace rts::cpu
