#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "rts/request.hpp"
#include "rts/sequence.hpp"
#include "rts/token_ring.hpp"
#include "rts/vocabulary.hpp"

namespace rts {

// Turns sampled tokens into token records: detokenizes, holds back what may be part of a stop string, and sees where a
// sequence ends by its text. No allocation once its scratch text is warm.
class Publisher {
 public:
  explicit Publisher(std::shared_ptr<const Vocabulary> vocabulary);

  // Writes the record of the sequence's next token. kStop where that ends the sequence: by its id, or by completing a
  // stop string. `last`: it ends for another reason anyway, so nothing is held back.
  FinishReason publish(Sequence& sequence, TokenWriter& writer, std::int32_t token, float logprob, bool last);

  // Writes the stream's last record: the sequence's finish reason and timings.
  static void publish_end(const Sequence& sequence, TokenWriter& writer, std::int64_t now_ns);

 private:
  std::shared_ptr<const Vocabulary> vocabulary_;
  std::string decoded_;
  std::string released_;
};

}  // namespace rts
