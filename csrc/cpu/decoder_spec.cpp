#include "cpu/decoder_spec.hpp"

#include <stdexcept>
#include <string>

namespace rts::cpu {

void DecoderSpec::check() const {
  const auto require = [](bool is_so, const std::string& what) {
    if (!is_so) throw std::invalid_argument(what);
  };
  require(layers > 0 && hidden > 0 && intermediate > 0 && vocabulary > 0, "every dimension must be 1 or more");
  require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0,
          std::to_string(heads) + " heads cannot share " + std::to_string(kv_heads) + " KV heads");
  require(head_dim > 0 && head_dim % 8 == 0 && head_dim <= kMaxHeadDim,
          "a head must have a multiple of 8 values, at most " + std::to_string(kMaxHeadDim) + "; it has " +
              std::to_string(head_dim));
  require(windows.size() == layers, "there must be a window a layer");
  require(frequencies.empty() || frequencies.size() == head_dim / 2, "there must be a frequency a rotary pair");
  require(local_frequencies.empty() || local_frequencies.size() == head_dim / 2,
          "there must be a frequency a rotary pair");
}

}  // namespace rts::cpu
