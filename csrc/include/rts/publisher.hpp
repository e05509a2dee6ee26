#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "rts/request.hpp"
#include "rts/sequence.hpp"
#include "rts/token_ring.hpp"
#include "rts/top_logprobs.hpp"
#include "rts/vocabulary.hpp"

namespace rts {

// Turns sampled tokens into token records: detokenizes, holds back what may be part of a stop string, and sees where a
// sequence ends by its text. No allocation once its scratch text is warm.
class Publisher {
 public:
  explicit Publisher(std::shared_ptr<const Vocabulary> vocabulary);

  // Writes the record of the sequence's next token. kStop where that ends the sequence: by its id, or by completing a
  // stop string; the first min_tokens do neither, and their text is not searched for stop strings. `last`: it ends for
  // another reason anyway, so nothing is held back.
  FinishReason publish(Sequence& sequence, TokenWriter& writer, std::int32_t token, float logprob, bool last,
                       std::span<const TopLogprob> top = {});

  // Writes the stream's last record: the sequence's finish reason and timings.
  static void publish_end(const Sequence& sequence, TokenWriter& writer, std::int64_t now_ns);

 private:
  bool is_end(const Sequence& sequence, std::int32_t token) const;
  void spell(std::span<const TopLogprob> top);

  std::shared_ptr<const Vocabulary> vocabulary_;
  std::string decoded_;
  std::string released_;
  std::string spelled_;  // an extension
};

}  // namespace rts
