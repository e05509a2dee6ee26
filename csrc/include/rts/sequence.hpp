#pragma once

#include <cstdint>
#include <vector>

#include "rts/detokenizer.hpp"
#include "rts/request.hpp"
#include "rts/siphash.hpp"
#include "rts/stop_matcher.hpp"

namespace rts {

enum class SequenceState : std::uint8_t {
  kWaiting,   // in the heap
  kRunning,   // holds a row and blocks
  kFinished,  // has a finish reason; its row and blocks are freed once no plan in flight names it
};

// A request inside the engine. The engine core owns it; the scheduler, the assembler and the publisher each own the
// part that is headed by their name and only read the others'.
struct Sequence {
  // engine core
  std::uint64_t stream_id = 0;
  std::uint64_t group_id = 0;
  std::uint32_t choice_index = 0;
  std::uint32_t channel = 0;  // index of the channel that it came by
  std::uint32_t slot = 0;     // its stream slot there
  Priority priority = Priority::kNormal;
  SamplingParams sampling;
  std::int64_t arrival_ns = 0;
  std::int64_t deadline_ns = 0;
  std::uint64_t extra_key = 0;
  std::uint32_t prompt_tokens = 0;
  std::vector<std::int32_t> tokens;  // the prompt's, then the generated ones; commit appends
  std::vector<TokenBias> logit_bias;
  std::vector<std::int32_t> stop_token_ids;
  bool pause_asked = false;  // by the client's pause flag
  bool paused = false;       // asked, or its ring has no room: not scheduled

  // scheduler
  SequenceState state = SequenceState::kWaiting;
  FinishReason finish = FinishReason::kNone;
  StreamError error = StreamError::kNone;
  std::uint32_t row = 0;        // of the block table, while running
  std::uint32_t scheduled = 0;  // positions handed to the model, in committed plans or in the one in flight
  std::uint32_t pending = 0;    // tokens being sampled by the plan in flight: they count as there, but have no id yet
  // Of those that plans in flight still sample: the next so many are dropped, for the sequence has another past by now.
  std::uint32_t void_samples = 0;
  std::uint32_t in_flight = 0;  // plans that name it and are not committed
  std::vector<std::int32_t> blocks;
  // Chained hashes of its full blocks, each over all tokens up to its end; those of the first `shareable_blocks` are
  // looked up when it is admitted, those of the first `published_blocks` can be found by others.
  std::vector<Hash128> hashes;
  std::uint32_t shareable_blocks = 0;
  std::uint32_t published_blocks = 0;
  std::uint32_t cached_tokens = 0;  // of the prompt, that others had computed when it was first admitted
  bool was_preempted = false;
  std::uint64_t waiting_handle = 0;  // in the heap, while waiting
  std::int64_t admitted_ns = 0;
  std::uint32_t sampled_by = 0;  // row of the plan in flight that samples its last pending token

  // batch assembler
  std::uint32_t assembled_blocks = 0;  // that are written in its row of the block table; 0 when it is admitted

  // publisher
  Detokenizer detokenizer;
  StopMatcher stop_matcher;
  std::uint32_t published = 0;  // token records written
  std::int64_t first_token_ns = 0;
  std::int64_t last_token_ns = 0;
  std::int64_t stalled_ns = 0;
  std::int64_t stalled_since_ns = 0;  // 0: not stalled

  std::uint32_t generated() const { return static_cast<std::uint32_t>(tokens.size()) - prompt_tokens; }
};

}  // namespace rts
