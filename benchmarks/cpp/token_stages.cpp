// From a row of logits to the frame's bytes.
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "rts/channel.hpp"
#include "rts/detokenizer.hpp"
#include "rts/publisher.hpp"
#include "rts/sampler.hpp"
#include "rts/sse_writer.hpp"
#include "rts/stop_matcher.hpp"
#include "rts/token_ring.hpp"
#include "rts/vocabulary.hpp"
#include "stage.hpp"

namespace rts::bench {

namespace {

constexpr std::uint32_t kVocabulary = 49152;
constexpr std::uint32_t kBatch = 256;
constexpr std::uint32_t kTokens = 16384;  // of a run of the stages that take one at a time

// The same bits on every machine and library: distributions of <random> are not.
double uniform(std::mt19937& bits) {
  return static_cast<double>(bits()) / 4294967296.0;
}

// Like a byte-level BPE's vocabulary: words of 1 to 12 letters, most with a space in front; one token in 64 is not
// ASCII, half of these an incomplete character.
std::vector<std::string> token_bytes() {
  std::mt19937 bits(1);
  std::vector<std::string> tokens(kVocabulary);
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    std::string& token = tokens[id];
    if (id % 64 == 0) {
      token = id % 128 == 0 ? "\xC3\xA9t\xC3\xA9" : "\xE2\x82";
      continue;
    }
    if (bits() % 4 != 0) token.push_back(' ');
    const std::size_t letters = 1 + bits() % 4 + bits() % 5 + bits() % 5;
    for (std::size_t i = 0; i < letters; ++i) token += static_cast<char>('a' + bits() % 26);
  }
  return tokens;
}

std::shared_ptr<const Vocabulary> vocabulary() {
  return std::make_shared<Vocabulary>(token_bytes(), std::vector<std::int32_t>{}, std::vector<std::int32_t>{});
}

// Frequent ones more often: half of the ids are below an eighth of the vocabulary.
std::vector<std::int32_t> token_ids(std::size_t count) {
  std::mt19937 bits(2);
  std::vector<std::int32_t> ids(count);
  for (std::int32_t& id : ids) {
    const double u = uniform(bits);
    id = static_cast<std::int32_t>(u * u * u * kVocabulary);
  }
  return ids;
}

// What a reader gets for those tokens: valid UTF-8.
std::vector<std::string> token_texts() {
  const auto words = vocabulary();
  Detokenizer detokenizer;
  std::vector<std::string> texts;
  for (const std::int32_t id : token_ids(kTokens)) detokenizer.push(words->bytes(id), texts.emplace_back());
  return texts;
}

// Sampler::sample of one row: weights as Zipf's law has them, in random order, so that top_p = 0.95 leaves some hundred
// tokens. Eight rows in turn.
class Sample : public Stage {
 public:
  static constexpr std::uint32_t kOperations = 32;

  explicit Sample(float temperature, float top_p) : logits_(kRows) {
    params_.temperature = temperature;
    params_.top_p = top_p;
    params_.seed = 42;
    std::mt19937 bits(3);
    for (std::vector<float>& row : logits_) {
      for (std::uint32_t rank = 0; rank < kVocabulary; ++rank)
        row.push_back(-1.5F * std::log(1.0F + static_cast<float>(rank)));
      for (std::size_t i = row.size(); i > 1; --i) std::swap(row[i - 1], row[bits() % i]);
    }
  }

  void run() override {
    for (std::uint32_t position = 0; position < kOperations; ++position) {
      keep(sampler_.sample(logits_[position % kRows], params_, {}, 0, position));
    }
  }

 private:
  static constexpr std::uint32_t kRows = 8;

  std::vector<std::vector<float>> logits_;
  SamplingParams params_;
  Sampler sampler_{kVocabulary};
};

struct SampleGreedy final : Sample {
  SampleGreedy() : Sample(0.0F, 1.0F) {}
};
struct SampleDefault final : Sample {
  SampleDefault() : Sample(1.0F, 0.95F) {}
};

// Detokenizer::push of one token.
class Detokenize final : public Stage {
 public:
  void run() override {
    Detokenizer detokenizer;
    for (const std::int32_t id : ids_) {
      text_.clear();
      detokenizer.push(vocabulary_->bytes(id), text_);
      keep(text_);
    }
  }

 private:
  std::shared_ptr<const Vocabulary> vocabulary_ = vocabulary();
  std::vector<std::int32_t> ids_ = token_ids(kTokens);
  std::string text_;
};

// StopMatcher::push of one token's text, for four stop strings that never come.
class StopMatch final : public Stage {
 public:
  void run() override {
    StopMatcher matcher({"\n\nUser:", "</s>", "\n###", "the end."});
    for (const std::string& text : texts_) {
      released_.clear();
      keep(matcher.push(text, released_));
    }
  }

 private:
  std::vector<std::string> texts_ = token_texts();
  std::string released_;
};

// One step's tokens, 256, into their streams' rings as EngineCore does it: Publisher::publish, the slot marked as
// ready, room for the next looked for. The front end's side is played by prepare().
class Publish final : public Stage {
 public:
  static constexpr std::uint32_t kSteps = 32;

  Publish() : sequences_(kBatch) {
    for (std::uint32_t slot = 0; slot < kBatch; ++slot) {
      writers_.push_back(channel_->token_writer(slot));
      readers_.push_back(channel_->token_reader(slot));
    }
  }

  void prepare() override {
    for (SpscRing<>::Consumer& reader : readers_) {
      while (!reader.front().empty()) reader.pop();
      reader.release();
    }
    for (std::uint32_t word = 0; word < channel_->ready_words(); ++word) channel_->take_ready(word);
  }

  void run() override {
    const std::int32_t* id = ids_.data();
    for (std::uint32_t step = 0; step < kSteps; ++step) {
      for (std::uint32_t slot = 0; slot < kBatch; ++slot) {
        publisher_.publish(sequences_[slot], writers_[slot], *id++, kNoLogprob, false);
        channel_->mark_ready(slot);
        keep(writers_[slot].has_room());
      }
    }
  }

 private:
  static constexpr float kNoLogprob = std::numeric_limits<float>::quiet_NaN();

  std::shared_ptr<Channel> channel_ = Channel::create({.slots = kBatch}, false);
  Publisher publisher_{vocabulary()};
  std::vector<Sequence> sequences_;
  std::vector<TokenWriter> writers_;
  std::vector<SpscRing<>::Consumer> readers_;
  std::vector<std::int32_t> ids_ = token_ids(kSteps * kBatch);
};

// One token record through a stream's ring: written, read, given back.
class Ring final : public Stage {
 public:
  void run() override {
    for (std::uint32_t index = 0; index < kTokens; ++index) {
      writer_.write_token({.index = index, .token_id = 7042}, " Paris");
      keep(TokenRecord(reader_.front()));
      reader_.pop();
      reader_.release();
    }
  }

 private:
  std::shared_ptr<Channel> channel_ = Channel::create({.slots = 1}, false);
  TokenWriter writer_ = channel_->token_writer(0);
  SpscRing<>::Consumer reader_ = channel_->token_reader(0);
};

// append_token_event of one token; a buffer takes 64 before it is written.
class Frame final : public Stage {
 public:
  void run() override {
    for (std::uint32_t i = 0; i < kTokens; ++i) {
      append_token_event(buffer_, i % 512, ids_[i], texts_[i], std::numeric_limits<float>::quiet_NaN());
      if (i % 64 != 63) continue;
      keep(buffer_);
      buffer_.clear();
    }
  }

 private:
  std::vector<std::int32_t> ids_ = token_ids(kTokens);
  std::vector<std::string> texts_ = token_texts();
  FrameBuffer buffer_;
};

template <class Made>
std::unique_ptr<Stage> make() {
  return std::make_unique<Made>();
}

constexpr StageEntry kStages[] = {
    {"sample_greedy", Sample::kOperations, make<SampleGreedy>},
    {"sample_default", Sample::kOperations, make<SampleDefault>},
    {"detokenize", kTokens, make<Detokenize>},
    {"stop_match", kTokens, make<StopMatch>},
    {"publish", Publish::kSteps, make<Publish>},
    {"ring", kTokens, make<Ring>},
    {"frame", kTokens, make<Frame>},
};

}  // namespace

std::span<const StageEntry> token_stages() {
  return kStages;
}

}  // namespace rts::bench
