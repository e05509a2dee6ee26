#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "rts/request.hpp"

// A submit record's bytes: how the front end writes them and the worker reads them.
namespace rts {

// What a request carries besides its header. Empty parts are not sent.
struct SubmitContent {
  std::span<const std::int32_t> prompt;
  std::span<const std::string> stops;
  std::string_view request_id;
  std::string_view payload;
  std::span<const TokenBias> logit_bias = {};
  std::span<const std::int32_t> stop_token_ids = {};
};

std::uint64_t submit_record_bytes(const SubmitContent& content);

// Writes submit_record_bytes() bytes. The header's counts of tokens and tail bytes are set here.
void write_submit_record(SubmitHeader header, const SubmitContent& content, std::byte* out);

// A submit record's parts. They come from another process: whatever the bytes are, nothing outside them is read.
struct SubmitRecord {
  explicit SubmitRecord(std::span<const std::byte> record);

  SubmitHeader header;
  // Valid as long as the record's bytes.
  std::span<const std::byte> ids;  // int32 each: the prompt's, then those already generated
  std::string_view request_id;
  std::string_view payload;
  std::vector<std::string> stops;
  std::vector<TokenBias> logit_bias;
  std::vector<std::int32_t> stop_token_ids;
  bool has_header = false;
  bool valid = false;  // the header's sizes fit the record, and its tail is well formed
};

}  // namespace rts
