#include "rts/submit_record.hpp"

#include <algorithm>
#include <cstring>
#include <span>

#include "rts/cache_line.hpp"

namespace rts {
namespace {

constexpr std::size_t kTailAlignment = 4;

template <class T>
std::string_view as_text(std::span<const T> values) {
  return {reinterpret_cast<const char*>(values.data()), values.size_bytes()};
}

// False: they are not whole.
template <class T>
bool append_values(std::string_view bytes, std::vector<T>& values) {
  if (bytes.size() % sizeof(T) != 0) return false;
  const std::size_t before = values.size();
  values.resize(before + bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(values.data() + before, bytes.data(), bytes.size());
  return true;
}

template <class Visit>
void each_tail_entry(const SubmitContent& content, Visit&& visit) {
  for (const std::string& stop : content.stops) visit(TailHeader::kStopString, std::string_view(stop));
  if (!content.request_id.empty()) visit(TailHeader::kRequestId, content.request_id);
  if (!content.payload.empty()) visit(TailHeader::kPayload, content.payload);
  if (!content.logit_bias.empty()) visit(TailHeader::kLogitBias, as_text(content.logit_bias));
  if (!content.stop_token_ids.empty()) visit(TailHeader::kStopTokenIds, as_text(content.stop_token_ids));
}

std::uint64_t tail_bytes(const SubmitContent& content) {
  std::uint64_t bytes = 0;
  each_tail_entry(content, [&](TailHeader::Type, std::string_view entry) {
    bytes += sizeof(TailHeader) + align_up(entry.size(), kTailAlignment);
  });
  return bytes;
}

bool read_tail(std::span<const std::byte> tail, SubmitRecord& record) {
  while (tail.size() >= sizeof(TailHeader)) {
    TailHeader entry;
    std::memcpy(&entry, tail.data(), sizeof entry);
    tail = tail.subspan(sizeof entry);
    const std::uint64_t padded = align_up(std::uint64_t{entry.bytes}, kTailAlignment);
    if (padded > tail.size()) return false;
    const std::string_view bytes(reinterpret_cast<const char*>(tail.data()), entry.bytes);
    if (entry.type == TailHeader::kStopString) record.stops.emplace_back(bytes);
    if (entry.type == TailHeader::kRequestId) record.request_id = bytes;
    if (entry.type == TailHeader::kPayload) record.payload = bytes;
    if (entry.type == TailHeader::kLogitBias && !append_values(bytes, record.logit_bias)) return false;
    if (entry.type == TailHeader::kStopTokenIds && !append_values(bytes, record.stop_token_ids)) return false;
    tail = tail.subspan(padded);
  }
  return true;
}

}  // namespace

std::uint64_t submit_record_bytes(const SubmitContent& content) {
  return sizeof(SubmitHeader) + content.prompt.size_bytes() + tail_bytes(content);
}

void write_submit_record(SubmitHeader header, const SubmitContent& content, std::byte* out) {
  header.prompt_tokens = static_cast<std::uint32_t>(content.prompt.size());
  header.tail_bytes = static_cast<std::uint32_t>(tail_bytes(content));
  std::memcpy(out, &header, sizeof header);
  out += sizeof header;
  out = std::ranges::copy(std::as_bytes(content.prompt), out).out;
  each_tail_entry(content, [&](TailHeader::Type type, std::string_view entry) {
    const TailHeader tail{type, 0, static_cast<std::uint32_t>(entry.size())};
    std::memcpy(out, &tail, sizeof tail);
    std::memcpy(out + sizeof tail, entry.data(), entry.size());
    out += sizeof tail + align_up(entry.size(), kTailAlignment);
  });
}

SubmitRecord::SubmitRecord(std::span<const std::byte> record) {
  if (record.size() < sizeof header) return;
  std::memcpy(&header, record.data(), sizeof header);
  has_header = true;
  const std::span<const std::byte> body = record.subspan(sizeof header);
  const std::uint64_t id_bytes = (std::uint64_t{header.prompt_tokens} + header.generated_tokens) * sizeof(std::int32_t);
  if (body.size() < id_bytes + header.tail_bytes) return;
  ids = body.first(id_bytes);
  valid = read_tail(body.subspan(id_bytes, header.tail_bytes), *this);
}

}  // namespace rts
