#pragma once

namespace rts::cpu {

// e^x for x at most 0, within 2e-7 relative: exactly 1 at 0, and exactly 0 below -87, where the result would soon be a
// denormal. NaN stays NaN. Cody and Waite's reduction to |r| <= ln(2)/2, then a polynomial of degree 5 fitted to the
// least relative error (9e-8) with its constant term held at 1.
template <typename Vector>
inline Vector exp_or_zero(Vector x) {
  constexpr float kLog2E = 1.44269504088896341F;
  constexpr float kLn2High = 0.693359375F, kLn2Low = -2.12194440e-4F;
  constexpr float kRound = 12582912.0F;  // 1.5 × 2^23: adding it leaves the nearest integer in the low bits
  const Vector rounded = multiply_add(x, Vector::broadcast(kLog2E), Vector::broadcast(kRound));
  const Vector n = rounded - Vector::broadcast(kRound);
  const Vector high = multiply_add(n, Vector::broadcast(-kLn2High), x);
  const Vector r = multiply_add(n, Vector::broadcast(-kLn2Low), high);
  Vector p = multiply_add(r, Vector::broadcast(0x1.0fa7d8p-7F), Vector::broadcast(0x1.573ad0p-5F));
  p = multiply_add(p, r, Vector::broadcast(0x1.555a6ep-3F));
  p = multiply_add(p, r, Vector::broadcast(0x1.fffdc4p-2F));
  p = multiply_add(p, r, Vector::broadcast(0x1.fffff6p-1F));
  p = multiply_add(p, r, Vector::broadcast(1.0F));
  return select_less(x, Vector::broadcast(-87.0F), Vector(), p * power_of_two(rounded));
}

}  // namespace rts::cpu
