#include "rts/vector_math.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

// A clone of each pass for every level of x86-64, chosen when the library is loaded. ThreadSanitizer instruments the
// choosing itself, which runs before its runtime is there.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define RTS_FOR_EACH_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RTS_FOR_EACH_ISA
#endif
#define RTS_INLINE __attribute__((always_inline)) inline

// The loops are plain ones that the compiler makes into vectors of the clone's width: one element is like another, or
// the reduction is of integers, whose order is free.
namespace rts {
namespace {

constexpr std::size_t kLanes = 16;

// Floats as integers of the same order: -NaN, -infinity, ..., -0, +0, ..., +infinity, NaN.
RTS_INLINE constexpr std::int32_t in_order(std::int32_t bits) {
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
constexpr std::int32_t in_order(float value) {
  return in_order(std::bit_cast<std::int32_t>(value));
}

// Cody and Waite's reduction to |r| <= ln(2)/2 and a polynomial of degree 6 (the coefficients of Cephes' expf, Moshier
// 1989). x is 0 or less.
RTS_INLINE float exp_or_zero(float x) {
  constexpr float kLog2E = 1.44269504088896341F;
  constexpr float kLn2High = 0.693359375F, kLn2Low = -2.12194440e-4F;
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  constexpr float kSmallest = -87.0F;
  const bool vanishes = x < kSmallest;
  x = vanishes ? kSmallest : x;
  const float rounded = x * kLog2E + kRound;
  const float n = rounded - kRound;
  const float r = x - n * kLn2High - n * kLn2Low;
  float p = r * 1.9875691500e-4F + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(p) + (std::bit_cast<std::uint32_t>(rounded) << 23);
  return std::bit_cast<float>(vanishes ? 0U : bits);
}

RTS_INLINE double sum_of(const float* weights, std::size_t count) {
  float sums[kLanes] = {};
  const std::size_t whole = count / kLanes * kLanes;
  for (std::size_t i = 0; i < whole; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) sums[lane] += weights[i + lane];
  }
  for (std::size_t i = whole; i < count; ++i) sums[i - whole] += weights[i];
  double total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

}  // namespace

RTS_FOR_EACH_ISA
float max_or_nan(std::span<const float> values) noexcept {
  constexpr std::int32_t kRuledOut = in_order(-std::numeric_limits<float>::infinity());
  constexpr std::int32_t kInfinite = in_order(std::numeric_limits<float>::infinity());
  std::int32_t largest = kRuledOut, smallest = kRuledOut;
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::int32_t bits;
    std::memcpy(&bits, &values[i], sizeof bits);
    largest = std::max(largest, in_order(bits));
    smallest = std::min(smallest, in_order(bits));
  }
  if (largest >= kInfinite || smallest < kRuledOut) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(in_order(largest));
}

RTS_FOR_EACH_ISA
std::size_t find_first(std::span<const float> values, float value) noexcept {
  constexpr std::size_t kStride = 8 * kLanes;
  std::size_t i = 0;
  for (; i + kStride <= values.size(); i += kStride) {
    std::int32_t found = 0;
    for (std::size_t j = 0; j < kStride; ++j) found |= values[i + j] == value ? 1 : 0;
    if (found != 0) break;
  }
  while (i < values.size() && values[i] != value) ++i;
  return i;
}

RTS_FOR_EACH_ISA
void copy_allowed(std::span<const float> values, std::span<const std::uint32_t> allowed,
                  std::span<float> out) noexcept {
  constexpr std::size_t kBits = 32;
  constexpr float kRuledOut = -std::numeric_limits<float>::infinity();
  const float* const in = values.data();
  float* const to = out.data();
  const std::size_t whole = values.size() / kBits * kBits;
  for (std::size_t start = 0; start < whole; start += kBits) {
    const std::uint32_t bits = allowed[start / kBits];
    for (std::uint32_t bit = 0; bit < kBits; ++bit) {
      to[start + bit] = (bits & (1U << bit)) != 0 ? in[start + bit] : kRuledOut;
    }
  }
  for (std::size_t i = whole; i < values.size(); ++i) {
    to[i] = (allowed[i / kBits] & (1U << (i % kBits))) != 0 ? in[i] : kRuledOut;
  }
}

RTS_FOR_EACH_ISA
double sum_above(std::span<const float> values, float least) noexcept {
  const float* const in = values.data();
  double total = 0;
  for (std::size_t start = 0; start < values.size(); start += kWeightBlock) {
    const std::size_t end = std::min(values.size(), start + kWeightBlock);
    const std::size_t whole = start + (end - start) / kLanes * kLanes;
    float sums[kLanes] = {};
    for (std::size_t i = start; i < whole; i += kLanes) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) sums[lane] += in[i + lane] >= least ? in[i + lane] : 0.0F;
    }
    for (std::size_t i = whole; i < end; ++i) sums[i - whole] += in[i] >= least ? in[i] : 0.0F;
    for (const float sum : sums) total += sum;
  }
  return total;
}

RTS_FOR_EACH_ISA
std::size_t find_above(std::span<const float> values, float least, std::span<std::int32_t> found) noexcept {
  constexpr std::size_t kStride = 2 * kLanes;
  const float* const in = values.data();
  std::int32_t* const out = found.data();
  std::size_t count = 0;
  const auto look_at = [&](std::size_t i) {
    // Written in any case and counted if wanted: a branch here is mispredicted.
    out[count] = static_cast<std::int32_t>(i);
    count += in[i] >= least ? 1 : 0;
  };
  std::size_t i = 0;
  for (; i + kStride <= values.size(); i += kStride) {
    std::int32_t any = 0;
    for (std::size_t j = 0; j < kStride; ++j) any |= in[i + j] >= least ? 1 : 0;
    if (any == 0) continue;
    for (std::size_t j = 0; j < kStride; ++j) look_at(i + j);
  }
  for (; i < values.size(); ++i) look_at(i);
  return count;
}

RTS_FOR_EACH_ISA
double exp_weights(std::span<const float> values, float shift, float scale, std::span<float> weights,
                   std::span<double> block_sums) noexcept {
  const float* const in = values.data();
  float* const out = weights.data();
  double total = 0;
  for (std::size_t start = 0, block = 0; start < values.size(); start += kWeightBlock, ++block) {
    const std::size_t count = std::min(values.size() - start, kWeightBlock);
    for (std::size_t i = start; i < start + count; ++i) out[i] = exp_or_zero((in[i] - shift) * scale);
    block_sums[block] = sum_of(out + start, count);
    total += block_sums[block];
  }
  return total;
}

}  // namespace rts
