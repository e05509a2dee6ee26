#pragma once

#include <cstring>
#include <span>
#include <string_view>

#include "rts/request.hpp"
#include "rts/spsc_ring.hpp"
#include "rts/top_logprobs.hpp"

// Token records in a stream's ring: one for each token, then the last record, which says how the stream ended.
namespace rts {

// A plan may be in flight while the ring fills: its token may still be committed after the one that filled it.
inline constexpr std::uint32_t kTokensInFlight = 2;
// The longest token's text, what a stop string or an incomplete character held back before it, and the header. What a
// token has of top logprobs comes on top.
inline constexpr std::uint32_t kMaxTokenRecordBytes =
    static_cast<std::uint32_t>(sizeof(TokenHeader) + kMaxTokenBytes + kMaxStopBytes + 16);

// The longest text, with its top logprobs, that a stream fed by push() takes: what an empty ring of kMinRingBytes has
// room for, wherever its position is, together with the last record.
inline constexpr std::uint32_t kMaxPushedTextBytes = 8000;
inline constexpr std::uint32_t kMinRingBytes = 1 << 14;
// Twice what is asked for at once: an empty ring then has that in one piece, wherever its position is.
static_assert(kMinRingBytes >=
              2 * (kTokensInFlight * (kMaxTokenRecordBytes + max_top_logprobs_bytes(kMaxTopLogprobs)) + 128));
static_assert(kMinRingBytes >= 2 * (kMaxPushedTextBytes + 128));

// A token record's parts. It comes from another process: `valid` says whether its sizes fit the record and its codes
// are among those that there are.
struct TokenRecord {
  explicit TokenRecord(std::span<const std::byte> record) {
    if (record.size() < sizeof(TokenHeader)) return;
    std::memcpy(&header, record.data(), sizeof(TokenHeader));
    const std::size_t text_end = sizeof(TokenHeader) + header.text_bytes;
    if (record.size() < text_end + header.extension_bytes) return;
    text = {reinterpret_cast<const char*>(record.data()) + sizeof(TokenHeader), header.text_bytes};
    extension = record.subspan(text_end, header.extension_bytes);
    valid = header.finish <= FinishReason::kError && header.error <= StreamError::kTimeout;
  }
  bool is_last() const { return (header.flags & TokenHeader::kEnd) != 0; }
  bool is_payload() const { return (header.flags & TokenHeader::kPayload) != 0; }
  PayloadKind payload_kind() const {
    const bool known = header.token_id >= 0 && header.token_id <= static_cast<int>(PayloadKind::kNumpy);
    return known ? static_cast<PayloadKind>(header.token_id) : PayloadKind::kNone;
  }
  // For a TopLogprobReader; of a token's record.
  std::string_view top_logprobs() const { return {reinterpret_cast<const char*>(extension.data()), extension.size()}; }
  EndExtension end() const {
    EndExtension end;
    if (extension.size() >= sizeof end) std::memcpy(&end, extension.data(), sizeof end);
    return end;
  }

  TokenHeader header;
  std::string_view text;
  std::span<const std::byte> extension;
  bool valid = false;
};

// The producer's side of a stream's ring. One thread at a time uses it; each operation is wait-free, with the ring's
// memory orders: has_room() and the writes acquire (4), what was written is released (1).
class TokenWriter {
 public:
  // Beyond the tokens that a stream may be ahead by: those of the steps in flight, and the last record.
  static constexpr std::uint32_t kReservedRecords = kTokensInFlight + 1;

  explicit TokenWriter(const SpscRing<>& ring) : ring_(ring.producer()) {}

  // Whether the ring can take the tokens of the steps in flight, however long their text, each with that many top
  // logprobs, and the last record.
  bool has_room(std::uint32_t top_logprobs = 0) noexcept {
    const std::size_t token = kMaxTokenRecordBytes + max_top_logprobs_bytes(top_logprobs);
    return ring_.can_claim(kReservedRecords, static_cast<std::uint32_t>(kTokensInFlight * token + kLastRecordBytes));
  }
  // Whether it can take a token of that much text and top logprobs, and the last record with that much of its own.
  bool has_room_for(std::size_t token_bytes, std::size_t detail_bytes = 0) noexcept {
    return token_bytes <= kMaxPushedTextBytes &&
           ring_.can_claim(
               2, static_cast<std::uint32_t>(sizeof(TokenHeader) + token_bytes + kLastRecordBytes + detail_bytes));
  }
  // False: the ring is full. The header's sizes are set here.
  bool write_token(TokenHeader header, std::string_view text) { return write(header, text, {}); }
  bool write_token(TokenHeader header, std::string_view text, std::string_view top_logprobs) {
    return write(header, text, std::as_bytes(std::span(top_logprobs)));
  }
  // Room for it is left by whoever asks has_room() before each token.
  bool write_last(TokenHeader header, const EndExtension& end, std::string_view detail = {}) {
    header.flags |= TokenHeader::kEnd;
    return write(header, detail, std::as_bytes(std::span(&end, 1)));
  }

 private:
  static constexpr std::size_t kLastRecordBytes = sizeof(TokenHeader) + sizeof(EndExtension);

  bool write(TokenHeader& header, std::string_view text, std::span<const std::byte> extension) {
    header.text_bytes = static_cast<std::uint16_t>(text.size());
    header.extension_bytes = static_cast<std::uint16_t>(extension.size());
    return ring_.push(std::span(&header, 1), text, extension);
  }

  SpscRing<>::Producer ring_;
};

}  // namespace rts
