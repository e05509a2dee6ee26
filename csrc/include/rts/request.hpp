#pragma once

#include <cstdint>
#include <type_traits>

// What a request is on the wire between a front end and a worker. These structs cross process borders as bytes: plain
// data, no pointers, sizes asserted, and any change of layout raises channel.hpp's kLayoutVersion.
namespace rts {

enum class Priority : std::uint8_t { kLow = 0, kNormal = 1, kHigh = 2 };
inline constexpr int kPriorities = 3;

enum class FinishReason : std::uint8_t { kNone = 0, kStop = 1, kLength = 2, kCancelled = 3, kTimeout = 4, kError = 5 };

// Why a stream ended with FinishReason::kError.
enum class StreamError : std::uint8_t {
  kNone = 0,
  kInvalidLogits = 1,
  kModelFailed = 2,
  kWorkerDied = 3,
  kInvalidRequest = 4,
  kTimeout = 5,
};

// What a payload's bytes are: a callable model's input or output.
enum class PayloadKind : std::uint8_t {
  kNone = 0,
  kText = 1,   // UTF-8, the prompt of a model that generates
  kJson = 2,   // one JSON value
  kBytes = 3,  // as they are
  kNumpy = 4,  // a NumPy array in NumPy's own file format
};

struct SamplingParams {
  enum Flag : std::uint32_t { kIgnoreEos = 1, kLogprobs = 2 };

  float temperature = 1.0F;  // 0: greedy
  float top_p = 1.0F;        // 1: off
  float min_p = 0.0F;        // 0: off
  std::int32_t top_k = 0;    // 0: off
  float repetition_penalty = 1.0F;
  float presence_penalty = 0.0F;
  float frequency_penalty = 0.0F;
  std::int32_t max_tokens = 100;
  std::int32_t min_tokens = 0;  // so many first tokens end nothing, by their id or by their text
  std::uint32_t flags = 0;
  std::uint32_t top_logprobs = 0;  // how many of each position's most likely tokens are told; needs kLogprobs
  std::uint32_t reserved = 0;
  std::uint64_t seed = 0;

  bool has(Flag flag) const { return (flags & flag) != 0; }
  // Whether the answer's token of this index is one of those that end nothing.
  bool must_go_on(std::uint32_t index) const { return std::int64_t{index} < min_tokens; }
};
static_assert(sizeof(SamplingParams) == 56 && std::is_trivially_copyable_v<SamplingParams>);

// Added to a token's logit before anything else.
struct TokenBias {
  std::int32_t token = 0;
  float bias = 0.0F;

  friend bool operator==(const TokenBias&, const TokenBias&) = default;
};
static_assert(sizeof(TokenBias) == 8 && std::is_trivially_copyable_v<TokenBias>);

// Submit record: this header, then prompt_tokens + generated_tokens ids (int32), then tail_bytes of tail entries.
struct SubmitHeader {
  std::uint64_t stream_id = 0;
  std::uint64_t group_id = 0;   // the request that this sequence is a choice of
  std::uint64_t extra_key = 0;  // adapter, salt and version; part of the prefix hash
  std::int64_t arrival_ns = 0;
  std::int64_t deadline_ns = 0;  // 0: none
  SamplingParams sampling;
  std::uint32_t slot = 0;
  std::uint32_t choice_index = 0;
  std::uint32_t prompt_tokens = 0;
  std::uint32_t generated_tokens = 0;  // > 0 where a stream is taken over from another worker
  std::uint32_t tail_bytes = 0;
  Priority priority = Priority::kNormal;
  PayloadKind payload_kind = PayloadKind::kNone;  // of the tail's payload
  PayloadKind answer_kind = PayloadKind::kNone;   // what the answer's payload has to be; kNone: what fits it
  std::uint8_t reserved = 0;
};
static_assert(sizeof(SubmitHeader) == 120 && std::is_trivially_copyable_v<SubmitHeader>);

// One entry of a submit record's tail: this header, then `bytes` bytes, then padding to 4. Unknown types are skipped.
struct TailHeader {
  enum Type : std::uint16_t {
    kStopString = 1,
    kRequestId = 2,  // as logs show it
    kPayload = 3,
    kLogitBias = 4,     // TokenBias each
    kStopTokenIds = 5,  // int32 each
  };
  std::uint16_t type = 0;
  std::uint16_t reserved = 0;
  std::uint32_t bytes = 0;
};
static_assert(sizeof(TailHeader) == 8);

// Token record: this header, then text_bytes of UTF-8, then extension_bytes: the position's top_logprobs.hpp, if any.
struct TokenHeader {
  enum Flag : std::uint16_t {
    kSpecial = 1,  // a control token: it has no text of its own
    kEnd = 2,      // no token: the stream's last record; finish and error are set, the text says more of the error,
                   // the extension is an EndExtension
    kPayload = 4,  // no token: a piece of an answer's payload, whose PayloadKind is the token id
  };
  std::uint32_t index = 0;  // of the token within the stream's generated ones; for kEnd, how many there were
  std::int32_t token_id = 0;
  float logprob = 0.0F;  // NaN where none was asked for
  std::uint16_t flags = 0;
  std::uint16_t text_bytes = 0;
  std::uint16_t extension_bytes = 0;
  FinishReason finish = FinishReason::kNone;
  StreamError error = StreamError::kNone;
};
static_assert(sizeof(TokenHeader) == 20 && std::is_trivially_copyable_v<TokenHeader>);

struct EndExtension {
  std::uint32_t prompt_tokens = 0;
  std::uint32_t cached_tokens = 0;
  std::int64_t queue_ns = 0;    // submitted → admitted
  std::int64_t prefill_ns = 0;  // admitted → first token
  std::int64_t decode_ns = 0;   // first token → last
  std::int64_t stalled_ns = 0;  // part of it in which the reader had no room
};
static_assert(sizeof(EndExtension) == 40 && std::is_trivially_copyable_v<EndExtension>);

// Bounds of a request, checked where it enters; they bound what a token record can hold back.
inline constexpr std::size_t kMaxStopStrings = 16;
inline constexpr std::size_t kMaxStopBytes = 256;    // each
inline constexpr std::size_t kMaxTokenBytes = 1024;  // the longest text of a vocabulary entry that is served
inline constexpr std::uint32_t kMaxTopLogprobs = 20;
// These bound what a step does for it.
inline constexpr std::size_t kMaxBiasedTokens = 1024;
inline constexpr float kMaxTokenBias = 100.0F;  // either way
inline constexpr std::size_t kMaxStopTokenIds = 64;
// Of a last record's text.
inline constexpr std::size_t kMaxErrorDetailBytes = 512;

}  // namespace rts
