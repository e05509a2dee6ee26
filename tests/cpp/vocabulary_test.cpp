#include "rts/vocabulary.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <set>
#include <stdexcept>
#include <string>

#include "rts/request.hpp"

namespace rts {
namespace {

using namespace std::string_literals;

TEST(Vocabulary, GivesEachTokensBytes) {
  const Vocabulary vocabulary({"a", "", "\xE2\x82", "b\0c"s}, {}, {});
  EXPECT_EQ(vocabulary.size(), 4U);
  EXPECT_EQ(vocabulary.bytes(0), "a");
  EXPECT_EQ(vocabulary.bytes(1), "");
  EXPECT_EQ(vocabulary.bytes(2), "\xE2\x82");
  EXPECT_EQ(vocabulary.bytes(3), "b\0c"s);
}

TEST(Vocabulary, SpecialTokensHaveNoBytes) {
  const Vocabulary vocabulary({"a", "<end>", "<pad>", "b"}, {1, 2}, {1, 3});
  EXPECT_EQ(vocabulary.bytes(1), "");
  EXPECT_EQ(vocabulary.bytes(2), "");
  EXPECT_EQ(vocabulary.bytes(3), "b");
  EXPECT_FALSE(vocabulary.special(0));
  EXPECT_TRUE(vocabulary.special(1));
  EXPECT_TRUE(vocabulary.special(2));
  EXPECT_FALSE(vocabulary.special(3));
  EXPECT_FALSE(vocabulary.eos(0));
  EXPECT_TRUE(vocabulary.eos(1));
  EXPECT_FALSE(vocabulary.eos(2));
  EXPECT_TRUE(vocabulary.eos(3));
}

TEST(Vocabulary, AnIdOutsideIsNoToken) {
  const Vocabulary vocabulary({"a"}, {0}, {0});
  for (const std::int32_t id :
       {-1, 1, std::numeric_limits<std::int32_t>::min(), std::numeric_limits<std::int32_t>::max()}) {
    EXPECT_EQ(vocabulary.bytes(id), "");
    EXPECT_FALSE(vocabulary.special(id));
    EXPECT_FALSE(vocabulary.eos(id));
  }
}

TEST(Vocabulary, RefusesIdsOutside) {
  EXPECT_THROW(Vocabulary({"a"}, {1}, {}), std::invalid_argument);
  EXPECT_THROW(Vocabulary({"a"}, {}, {-1}), std::invalid_argument);
}

TEST(Vocabulary, BoundsTokensWithText) {
  const std::string longest(kMaxTokenBytes, 'x');
  EXPECT_EQ(Vocabulary({longest}, {}, {}).bytes(0), longest);
  EXPECT_THROW(Vocabulary({longest + "x"}, {}, {}), std::invalid_argument);
  EXPECT_EQ(Vocabulary({longest + "x"}, {0}, {}).bytes(0), "");
  // A byte that is no UTF-8 becomes three of text, and a token record has room for the text.
  EXPECT_NO_THROW(Vocabulary({std::string(kMaxTokenBytes / 3, '\xFF')}, {}, {}));
  EXPECT_THROW(Vocabulary({std::string(kMaxTokenBytes / 3 + 1, '\xFF')}, {}, {}), std::invalid_argument);
}

TEST(DecodeByteLevel, UndoesGpt2sMap) {
  EXPECT_EQ(decode_byte_level(""), "");
  EXPECT_EQ(decode_byte_level("Ġhello"), " hello");
  EXPECT_EQ(decode_byte_level("ĊĉčĀġ"), "\n\t\r\0\x7F"s);
  EXPECT_EQ(decode_byte_level("Ã©"), "é");
  EXPECT_EQ(decode_byte_level("łŃ"), "\xA0\xAD");
  EXPECT_EQ(decode_byte_level("!~¡¬®ÿ"), "!~\xA1\xAC\xAE\xFF");
}

std::string two_bytes(unsigned character) {
  return {static_cast<char>(0xC0 | character >> 6), static_cast<char>(0x80 | (character & 0x3F))};
}

TEST(DecodeByteLevel, EveryByteHasOneCharacter) {
  std::set<std::string> bytes;
  for (unsigned character = 0; character < 0x800; ++character) {
    const std::string entry = character < 0x80 ? std::string(1, static_cast<char>(character)) : two_bytes(character);
    try {
      const std::string byte = decode_byte_level(entry);
      ASSERT_EQ(byte.size(), 1U);
      EXPECT_TRUE(bytes.insert(byte).second) << character;
    } catch (const std::invalid_argument&) {
    }
  }
  EXPECT_EQ(bytes.size(), 256U);
}

TEST(DecodeByteLevel, RefusesWhatIsNotInTheMap) {
  const std::string refused[] = {" ", "\n", "\x7F", "\0"s, two_bytes(0x80), two_bytes(0xA0), two_bytes(0xAD), "ń", "€",
                                 "𝄞",
                                 // Not UTF-8 at all: cut off, stray, overlong, no continuation.
                                 "\xC4", "\x80", "\xC1\x81", "\xC4g", "\xFF"};
  for (const std::string& entry : refused) {
    EXPECT_THROW(decode_byte_level(entry), std::invalid_argument) << testing::PrintToString(entry);
    EXPECT_THROW(decode_byte_level("a" + entry), std::invalid_argument) << testing::PrintToString(entry);
  }
}

}  // namespace
}  // namespace rts
