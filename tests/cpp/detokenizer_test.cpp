#include "rts/detokenizer.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace rts {
namespace {

const std::string kReplacement = "\xEF\xBF\xBD";

std::string text_of(const std::vector<std::string>& tokens) {
  Detokenizer detokenizer;
  std::string out;
  for (const std::string& token : tokens) detokenizer.push(token, out);
  detokenizer.flush(out);
  return out;
}

std::string encoded(unsigned c) {
  const auto tail = [c](unsigned shift) { return static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x80) return {static_cast<char>(c)};
  if (c < 0x800) return {static_cast<char>(0xC0 | c >> 6), tail(0)};
  if (c < 0x10000) return {static_cast<char>(0xE0 | c >> 12), tail(6), tail(0)};
  return {static_cast<char>(0xF0 | c >> 18), tail(12), tail(6), tail(0)};
}

bool surrogate(unsigned c) {
  return c >= 0xD800 && c < 0xE000;
}

TEST(Detokenizer, TextComesOutAsItIs) {
  EXPECT_EQ(text_of({}), "");
  EXPECT_EQ(text_of({"", "hello", "", ", wörld – 你好 🎉"}), "hello, wörld – 你好 🎉");
}

TEST(Detokenizer, EveryCharacterSurvivesEveryCut) {
  for (unsigned c = 0; c < 0x110000; ++c) {
    if (surrogate(c)) continue;
    const std::string character = encoded(c);
    for (std::size_t cut = 0; cut < character.size(); ++cut) {
      Detokenizer detokenizer;
      std::string out;
      detokenizer.push(character.substr(0, cut), out);
      ASSERT_EQ(out, "") << c;
      detokenizer.push(character.substr(cut), out);
      ASSERT_EQ(out, character) << c;
      detokenizer.flush(out);
      ASSERT_EQ(out, character) << c;
    }
  }
}

TEST(Detokenizer, ACharacterComesOutWithItsLastByte) {
  Detokenizer detokenizer;
  std::string out;
  detokenizer.push("a\xF0", out);
  EXPECT_EQ(out, "a");
  detokenizer.push("\x9F", out);
  detokenizer.push("\x8E", out);
  EXPECT_EQ(out, "a");
  detokenizer.push("\x89z", out);
  EXPECT_EQ(out, "a🎉z");
}

TEST(Detokenizer, FlushReplacesAnIncompleteCharacterOnce) {
  EXPECT_EQ(text_of({"a\xF0\x9F\x8E"}), "a" + kReplacement);
  Detokenizer detokenizer;
  std::string out;
  detokenizer.push("\xE2", out);
  detokenizer.flush(out);
  detokenizer.flush(out);
  detokenizer.push("b", out);
  EXPECT_EQ(out, kReplacement + "b");
}

// Unicode 16, tables 3-8 to 3-11, with one U+FFFD for each maximal subpart.
TEST(Detokenizer, ReplacesMaximalSubparts) {
  const std::string r = kReplacement;
  EXPECT_EQ(text_of({"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"}), r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(text_of({"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"}), r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(text_of({"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"}), r + r + r + r + r + "A" + r + r + "B");
  EXPECT_EQ(text_of({"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"}), r + r + r + r + "A");
}

// The definition, read literally: the longest prefix that begins a character, or else one byte. A prefix begins one if
// it is a prefix of some character's encoding; those of the four-byte ones need only be looked at by 64.
class MaximalSubparts {
 public:
  MaximalSubparts() {
    for (unsigned c = 0; c < 0x110000; c += c < 0x10000 ? 1 : 64) {
      if (surrogate(c)) continue;
      const std::string character = encoded(c);
      if (c < 0x10000) mark(character, kCharacter);
      for (std::size_t n = 1; n < character.size(); ++n) mark(character.substr(0, n), kPrefix);
    }
  }

  std::string replaced(std::string_view bytes) const {
    std::string out;
    while (!bytes.empty()) {
      std::size_t n = 1;
      while (n < bytes.size() && what(bytes.substr(0, n)) == kPrefix && what(bytes.substr(0, n + 1)) != kNothing) ++n;
      out += what(bytes.substr(0, n)) == kCharacter ? std::string(bytes.substr(0, n)) : kReplacement;
      bytes.remove_prefix(n);
    }
    return out;
  }

 private:
  enum What : char { kNothing, kPrefix, kCharacter };

  static std::size_t key(std::string_view bytes) {
    std::size_t key = 0;
    for (const char byte : bytes) key = key << 8 | static_cast<unsigned char>(byte);
    return key;
  }
  void mark(std::string_view bytes, What what) { known_[bytes.size()][key(bytes)] = what; }
  What what(std::string_view bytes) const {
    if (bytes.size() < 4) return known_[bytes.size()][key(bytes)];
    const auto last = static_cast<unsigned char>(bytes[3]);
    const bool continues = what(bytes.substr(0, 3)) == kPrefix && (last & 0xC0) == 0x80;
    return bytes.size() == 4 && continues ? kCharacter : kNothing;
  }

  std::vector<What> known_[4] = {std::vector<What>(1), std::vector<What>(1 << 8), std::vector<What>(1 << 16),
                                 std::vector<What>(1 << 24)};
};

// All strings of up to four bytes from the border values of every range that UTF-8 tells apart, as one token and as a
// token a byte.
TEST(Detokenizer, ReplacesMaximalSubpartsOfAllBorderValues) {
  const unsigned char borders[] = {0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF,
                                   0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF};
  const MaximalSubparts oracle;
  std::vector<std::string> bytes{""};
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    if (bytes[i].size() < 4) {
      for (const unsigned char border : borders) bytes.push_back(bytes[i] + static_cast<char>(border));
    }
    const std::string expected = oracle.replaced(bytes[i]);
    std::vector<std::string> single;
    for (const char byte : bytes[i]) single.emplace_back(1, byte);
    ASSERT_EQ(text_of({bytes[i]}), expected) << testing::PrintToString(bytes[i]);
    ASSERT_EQ(text_of(single), expected) << testing::PrintToString(bytes[i]);
  }
}

TEST(Detokenizer, OneBadByteIsFoundAtEachPlaceOfEachLength) {
  for (std::size_t length = 1; length <= 40; ++length) {
    for (std::size_t place = 0; place < length; ++place) {
      std::string token(length, 'x');
      token[place] = '\x80';
      const std::string before = token.substr(0, place);
      const std::string after = token.substr(place + 1);
      ASSERT_EQ(text_of({token}), before + kReplacement + after) << place << " of " << length;
    }
  }
}

}  // namespace
}  // namespace rts
