#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

// Passes over a row of logits, in the widest vectors that the processor has. The result is the same to the bit for all
// of them: sums are kept in sixteen lanes whatever the vector's width, and no multiplication is fused with an addition.
namespace rts {

// The largest value; NaN where one is NaN or +infinity. -infinity, a token that is ruled out, is a value like others.
float max_or_nan(std::span<const float> values) noexcept;

// Where `value` stands first; values.size() where it does not.
std::size_t find_first(std::span<const float> values, float value) noexcept;

// out[i] = values[i] where bit i of `allowed` is set, counted from the lowest of each word; else -infinity.
void copy_allowed(std::span<const float> values, std::span<const std::uint32_t> allowed, std::span<float> out) noexcept;

// The sum of the values that are `least` or more; its relative error is under 5e-6, as that of exp_weights' total.
double sum_above(std::span<const float> values, float least) noexcept;

// Where those values are, ascending, and how many. `found` has room for values.size().
std::size_t find_above(std::span<const float> values, float least, std::span<std::int32_t> found) noexcept;

// weights[i] = exp((values[i] - shift) * scale), for exponents of 0 or less; below exp(-87), 0. Relative error under
// 2e-7. The sum of each kWeightBlock weights goes to block_sums, which has room for them all; their total is returned.
inline constexpr std::size_t kWeightBlock = 1024;
double exp_weights(std::span<const float> values, float shift, float scale, std::span<float> weights,
                   std::span<double> block_sums) noexcept;

}  // namespace rts
