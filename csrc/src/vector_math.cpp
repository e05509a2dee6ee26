#include "rts/vector_math.hpp"

#include <algorithm>
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

namespace rts {
namespace {

constexpr std::size_t kLanes = 16;
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = std::int32_t __attribute__((vector_size(kLanes * sizeof(std::int32_t))));

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kRuledOut = -std::numeric_limits<float>::infinity();

// The last lanes of a row whose length is no multiple of theirs are filled up with what changes no result.
RTS_INLINE void load(Floats& lanes, const float* from, std::size_t count) {
  if (count >= kLanes) {
    std::memcpy(&lanes, from, sizeof lanes);
    return;
  }
  for (std::size_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? from[i] : kRuledOut;
}

// Cody and Waite's reduction to |r| <= ln(2)/2 and a polynomial of degree 6 (the coefficients of Cephes' expf, Moshier
// 1989). x is 0 or less.
RTS_INLINE void exp_in_place(Floats& x) {
  constexpr float kLog2E = 1.44269504088896341F;
  constexpr float kLn2High = 0.693359375F, kLn2Low = -2.12194440e-4F;
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  constexpr float kSmallest = -87.0F;
  const Ints vanishes = x < kSmallest;
  x = vanishes ? Floats{} + kSmallest : x;
  const Floats rounded = x * kLog2E + kRound;
  const Floats n = rounded - kRound;
  const Floats r = x - n * kLn2High - n * kLn2Low;
  Floats p = r * 1.9875691500e-4F + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  Ints bits, exponent;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&exponent, &rounded, sizeof exponent);
  bits = vanishes ? Ints{} : bits + (exponent << 23);
  std::memcpy(&x, &bits, sizeof x);
}

}  // namespace

RTS_FOR_EACH_ISA
float max_or_nan(std::span<const float> values) noexcept {
  Floats largest = Floats{} + kRuledOut;
  Ints ordinary = Ints{} - 1;
  for (std::size_t i = 0; i < values.size(); i += kLanes) {
    Floats lanes;
    load(lanes, values.data() + i, values.size() - i);
    ordinary &= lanes <= kLargest;
    largest = lanes > largest ? lanes : largest;
  }
  float result = kRuledOut;
  for (std::size_t i = 0; i < kLanes; ++i) {
    if (ordinary[i] == 0) return std::numeric_limits<float>::quiet_NaN();
    result = std::max(result, largest[i]);
  }
  return result;
}

RTS_FOR_EACH_ISA
std::size_t find_first(std::span<const float> values, float value) noexcept {
  constexpr std::size_t kStride = 8 * kLanes;
  std::size_t i = 0;
  for (; i + kStride <= values.size(); i += kStride) {
    Ints found{};
    for (std::size_t j = 0; j < kStride; j += kLanes) {
      Floats lanes;
      std::memcpy(&lanes, values.data() + i + j, sizeof lanes);
      found |= lanes == value;
    }
    std::int32_t any = 0;
    for (std::size_t lane = 0; lane < kLanes; ++lane) any |= found[lane];
    if (any != 0) break;
  }
  while (i < values.size() && values[i] != value) ++i;
  return i;
}

RTS_FOR_EACH_ISA
double exp_weights(std::span<const float> values, float shift, float scale, std::span<float> weights,
                   std::span<double> block_sums) noexcept {
  double total = 0;
  for (std::size_t start = 0, block = 0; start < values.size(); start += kWeightBlock, ++block) {
    const std::size_t end = std::min(values.size(), start + kWeightBlock);
    Floats sum{};
    for (std::size_t i = start; i < end; i += kLanes) {
      Floats x;
      load(x, values.data() + i, end - i);
      x = (x - shift) * scale;
      exp_in_place(x);
      std::memcpy(weights.data() + i, &x, std::min(kLanes, end - i) * sizeof(float));
      sum += x;
    }
    double block_sum = 0;
    for (std::size_t lane = 0; lane < kLanes; ++lane) block_sum += sum[lane];
    block_sums[block] = block_sum;
    total += block_sum;
  }
  return total;
}

}  // namespace rts
