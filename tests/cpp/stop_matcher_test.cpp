#include "rts/stop_matcher.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <random>
#include <string>
#include <vector>

#include "rts/request.hpp"

namespace rts {
namespace {

struct Result {
  std::string text;
  bool stopped;
  bool operator==(const Result&) const = default;
  friend void PrintTo(const Result& result, std::ostream* os) {
    *os << testing::PrintToString(result.text) << (result.stopped ? " stopped" : "");
  }
};

Result run(StopMatcher matcher, const std::vector<std::string>& pieces) {
  std::string out;
  for (const std::string& piece : pieces) {
    if (matcher.push(piece, out)) {
      matcher.flush(out);
      return {out, true};
    }
  }
  matcher.flush(out);
  return {out, false};
}

// The first end at which any stop string ends; of those that end there, the longest.
Result expected(const std::vector<std::string>& stops, const std::string& text) {
  for (std::size_t end = 1; end <= text.size(); ++end) {
    std::size_t longest = 0;
    for (const std::string& stop : stops) {
      if (text.substr(0, end).ends_with(stop)) longest = std::max(longest, stop.size());
    }
    if (longest != 0) return {text.substr(0, end - longest), true};
  }
  return {text, false};
}

// The longest end of `text` that some stop string starts with.
std::size_t must_hold(const std::vector<std::string>& stops, const std::string& text) {
  std::size_t longest = 0;
  for (const std::string& stop : stops) {
    for (std::size_t n = 1; n <= stop.size(); ++n) {
      if (text.ends_with(stop.substr(0, n))) longest = std::max(longest, n);
    }
  }
  return longest;
}

TEST(StopMatcher, WithoutStopStringsEverythingPasses) {
  EXPECT_EQ(run(StopMatcher(), {"a", "", "bc"}), (Result{"abc", false}));
  EXPECT_EQ(run(StopMatcher(std::vector<std::string>{}), {"abc"}), (Result{"abc", false}));
}

TEST(StopMatcher, DropsTheStopStringAndWhatFollows) {
  EXPECT_EQ(run(StopMatcher({"END"}), {"the END of it"}), (Result{"the ", true}));
  EXPECT_EQ(run(StopMatcher({"END"}), {"the E", "N", "D of it"}), (Result{"the ", true}));
  EXPECT_EQ(run(StopMatcher({"END"}), {"END"}), (Result{"", true}));
}

TEST(StopMatcher, HoldsBackOnlyWhatMayBecomeAStopString) {
  StopMatcher matcher({"\n\nUser:"});
  std::string out;
  EXPECT_FALSE(matcher.push("hello\n", out));
  EXPECT_EQ(out, "hello");
  EXPECT_FALSE(matcher.push("\n", out));
  EXPECT_EQ(out, "hello");
  EXPECT_FALSE(matcher.push("\nUs", out));
  EXPECT_EQ(out, "hello\n");
  EXPECT_FALSE(matcher.push("e-", out));
  EXPECT_EQ(out, "hello\n\n\nUse-");
}

TEST(StopMatcher, FlushReleasesWhatIsHeldOnce) {
  StopMatcher matcher({"abc"});
  std::string out;
  EXPECT_FALSE(matcher.push("xab", out));
  EXPECT_EQ(out, "x");
  matcher.flush(out);
  EXPECT_EQ(out, "xab");
  matcher.flush(out);
  EXPECT_EQ(out, "xab");
}

TEST(StopMatcher, TheMatchThatCompletesFirstWins) {
  EXPECT_EQ(run(StopMatcher({"abcd", "bc"}), {"xabcd"}), (Result{"xa", true}));
  EXPECT_EQ(run(StopMatcher({"bc", "abcd"}), {"xabcd"}), (Result{"xa", true}));
}

TEST(StopMatcher, OfThoseTheOneThatStartsFirst) {
  EXPECT_EQ(run(StopMatcher({"aab", "ab"}), {"xaab"}), (Result{"x", true}));
  EXPECT_EQ(run(StopMatcher({"ab", "aab"}), {"xa", "ab"}), (Result{"x", true}));
  EXPECT_EQ(run(StopMatcher({"ab", "aab"}), {"xab"}), (Result{"x", true}));
}

TEST(StopMatcher, OverlapsWithItself) {
  EXPECT_EQ(run(StopMatcher({"aaab"}), {"aaaaab"}), (Result{"aa", true}));
  EXPECT_EQ(run(StopMatcher({"abcabd"}), {"abcabcabd"}), (Result{"abc", true}));
}

TEST(StopMatcher, CharactersStayWhole) {
  StopMatcher matcher({"é!", "🎉"});
  std::string out;
  EXPECT_FALSE(matcher.push("è", out));
  EXPECT_EQ(out, "è");
  EXPECT_FALSE(matcher.push("é", out));
  EXPECT_EQ(out, "è");
  EXPECT_FALSE(matcher.push("🎈", out));
  EXPECT_EQ(out, "èé🎈");
  EXPECT_TRUE(matcher.push("x🎉", out));
  EXPECT_EQ(out, "èé🎈x");
}

TEST(StopMatcher, TheSameStopStringTwiceIsOne) {
  EXPECT_EQ(run(StopMatcher({"ab", "ab"}), {"xaby"}), (Result{"x", true}));
}

TEST(StopMatcher, TakesTheMostAndLongestStopStrings) {
  std::vector<std::string> stops;
  for (std::size_t i = 0; i < kMaxStopStrings; ++i) {
    stops.push_back(std::string(kMaxStopBytes - 1, 'a') + static_cast<char>('b' + i));
  }
  const std::string text(1000, 'a');
  EXPECT_EQ(run(StopMatcher(stops), {text, "q"}), (Result{text.substr(kMaxStopBytes - 1), true}));
  EXPECT_EQ(run(StopMatcher(stops), {text, "z"}), (Result{text + "z", false}));
}

TEST(StopMatcher, ACopyGoesOnByItself) {
  StopMatcher matcher({"abc"});
  std::string out;
  matcher.push("ab", out);
  StopMatcher copy = matcher;
  std::string copied;
  EXPECT_TRUE(copy.push("c", copied));
  EXPECT_EQ(copied, "");
  EXPECT_FALSE(matcher.push("d", out));
  EXPECT_EQ(out, "abd");
}

// A small alphabet, so that stop strings overlap with each other and themselves; pieces cut anywhere.
TEST(StopMatcher, AgreesWithTheDefinition) {
  std::mt19937 random(20240611);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  const auto word = [&](std::size_t bytes) {
    std::string letters;
    while (letters.size() < bytes) letters += static_cast<char>('a' + below(2 + below(2)));
    return letters;
  };
  int stopped = 0;
  constexpr int kRounds = 20000;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<std::string> stops;
    for (std::size_t n = 1 + below(4); stops.size() < n;) stops.push_back(word(1 + below(8)));
    const std::string text = word(below(40));
    const Result want = expected(stops, text);
    SCOPED_TRACE(testing::PrintToString(stops) + " in " + text);

    StopMatcher matcher(stops);
    std::string out;
    bool matched = false;
    for (std::size_t at = 0; at < text.size() && !matched;) {
      const std::size_t piece = std::min(below(6), text.size() - at);
      matched = matcher.push(text.substr(at, piece), out);
      at += piece;
      if (!matched) {
        const std::string seen = text.substr(0, at);
        ASSERT_EQ(out, seen.substr(0, seen.size() - must_hold(stops, seen)));
      }
    }
    matcher.flush(out);
    ASSERT_EQ((Result{out, matched}), want);
    stopped += matched;
  }
  EXPECT_GT(stopped, kRounds / 10);
  EXPECT_LT(stopped, kRounds * 9 / 10);
}

}  // namespace
}  // namespace rts
