#include "rts/histogram.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>

namespace rts {
namespace {

TEST(Histogram, CountsByTheBitsThatAValueHas) {
  Histogram<6> histogram;
  for (const std::uint64_t value : {0, 1, 2, 3, 4, 7, 8, 15}) histogram.add(value);
  const std::uint64_t expected[] = {1, 1, 2, 2, 2, 0};
  for (std::size_t bucket = 0; bucket < histogram.kBuckets; ++bucket) {
    EXPECT_EQ(histogram.count(bucket), expected[bucket]) << bucket;
  }
  EXPECT_EQ(histogram.sum(), 40U);
}

TEST(Histogram, TheLastBucketHasAllThatIsLarger) {
  Histogram<4> histogram;
  histogram.add(7);
  histogram.add(8);
  histogram.add(std::numeric_limits<std::uint32_t>::max());
  EXPECT_EQ(histogram.count(3), 3U);
}

TEST(Histogram, ZeroedMemoryIsAnEmptyOne) {
  alignas(Histogram<8>) unsigned char memory[sizeof(Histogram<8>)] = {};
  const auto& histogram = *reinterpret_cast<const Histogram<8>*>(memory);
  for (std::size_t bucket = 0; bucket < histogram.kBuckets; ++bucket) EXPECT_EQ(histogram.count(bucket), 0U);
  EXPECT_EQ(histogram.sum(), 0U);
}

}  // namespace
}  // namespace rts
