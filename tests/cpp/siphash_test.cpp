#include "rts/siphash.hpp"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <utility>

namespace rts {
namespace {

constexpr SipKey kKey{0x0706050403020100, 0x0f0e0d0c0b0a0908};

Hash128 hash_of(std::size_t bytes, const SipKey& key = kKey) {
  std::array<std::byte, 64> input{};
  for (std::size_t i = 0; i < input.size(); ++i) input[i] = static_cast<std::byte>(i);
  return siphash128(key, std::span(input).first(bytes));
}

// Of the authors' test vectors: the key's and the input's bytes count up from 0.
TEST(SipHash, GivesWhatItsAuthorsSay) {
  EXPECT_EQ(hash_of(0), (Hash128{0xe6a825ba047f81a3, 0x930255c71472f66d}));
  EXPECT_EQ(hash_of(1), (Hash128{0x44af996bd8c187da, 0x45fc229b11597634}));
}

TEST(SipHash, EveryBitOfInputLengthAndKeyCounts) {
  std::set<std::pair<std::uint64_t, std::uint64_t>> seen;
  std::size_t made = 0;
  const auto add = [&](const Hash128& hash) {
    seen.emplace(hash.low, hash.high);
    ++made;
  };
  for (std::size_t bytes = 0; bytes <= 64; ++bytes) add(hash_of(bytes));
  for (unsigned bit = 0; bit < 128; ++bit) {
    SipKey key = kKey;
    key[bit / 64] ^= std::uint64_t{1} << bit % 64;
    add(hash_of(17, key));
  }
  for (unsigned bit = 0; bit < 136; ++bit) {
    std::array<std::byte, 17> input{};
    input[bit / 8] = static_cast<std::byte>(1U << bit % 8);
    add(siphash128(kKey, input));
  }
  EXPECT_EQ(seen.size(), made);
}

}  // namespace
}  // namespace rts
