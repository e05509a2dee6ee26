#include "rts/submit_record.hpp"

#include <cstring>

#include "rts/cache_line.hpp"

namespace rts {
namespace {

constexpr std::size_t kTailAlignment = 4;

std::uint32_t tail_bytes(const std::vector<std::string>& stops) {
  std::size_t bytes = 0;
  for (const std::string& stop : stops) bytes += sizeof(TailHeader) + align_up(stop.size(), kTailAlignment);
  return static_cast<std::uint32_t>(bytes);
}

bool read_tail(std::span<const std::byte> tail, std::vector<std::string>& stops) {
  while (tail.size() >= sizeof(TailHeader)) {
    TailHeader entry;
    std::memcpy(&entry, tail.data(), sizeof entry);
    tail = tail.subspan(sizeof entry);
    const std::size_t padded = align_up(entry.bytes, kTailAlignment);
    if (padded > tail.size()) return false;
    if (entry.type == TailHeader::kStopString) {
      stops.emplace_back(reinterpret_cast<const char*>(tail.data()), entry.bytes);
    }
    tail = tail.subspan(padded);
  }
  return true;
}

}  // namespace

std::uint32_t submit_record_bytes(std::span<const std::int32_t> prompt, const std::vector<std::string>& stops) {
  return static_cast<std::uint32_t>(sizeof(SubmitHeader) + prompt.size_bytes()) + tail_bytes(stops);
}

void write_submit_record(SubmitHeader header, std::span<const std::int32_t> prompt,
                         const std::vector<std::string>& stops, std::byte* out) {
  header.prompt_tokens = static_cast<std::uint32_t>(prompt.size());
  header.tail_bytes = tail_bytes(stops);
  std::memcpy(out, &header, sizeof header);
  out += sizeof header;
  std::memcpy(out, prompt.data(), prompt.size_bytes());
  out += prompt.size_bytes();
  for (const std::string& stop : stops) {
    const TailHeader tail{TailHeader::kStopString, static_cast<std::uint16_t>(stop.size())};
    std::memcpy(out, &tail, sizeof tail);
    std::memcpy(out + sizeof tail, stop.data(), stop.size());
    out += sizeof tail + align_up(stop.size(), kTailAlignment);
  }
}

SubmitRecord::SubmitRecord(std::span<const std::byte> record) {
  if (record.size() < sizeof header) return;
  std::memcpy(&header, record.data(), sizeof header);
  has_header = true;
  const std::span<const std::byte> body = record.subspan(sizeof header);
  const std::uint64_t id_bytes = (std::uint64_t{header.prompt_tokens} + header.generated_tokens) * sizeof(std::int32_t);
  if (body.size() < id_bytes + header.tail_bytes) return;
  ids = body.first(id_bytes);
  valid = read_tail(body.subspan(id_bytes, header.tail_bytes), stops);
}

}  // namespace rts
