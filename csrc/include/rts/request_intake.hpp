#pragma once

#include <cstdint>

#include "rts/sequence.hpp"
#include "rts/submit_record.hpp"
#include "rts/vocabulary.hpp"

namespace rts {

// Takes a submit record's tokens, parameters and constraints over into a sequence. False: something of them is beyond
// what the scheduler, the sampler or the model can work with. Front ends check the same, with an answer for a person;
// this keeps a worker whole whatever reaches it.
bool take_request(const SubmitRecord& record, const Vocabulary& vocabulary, std::uint32_t max_context,
                  Sequence& sequence);

}  // namespace rts
