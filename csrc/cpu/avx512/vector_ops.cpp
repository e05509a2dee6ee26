#include "cpu/vector_ops.hpp"

#include "cpu/avx512/vector16.hpp"
#include "cpu/instruction_sets.hpp"

namespace rts::cpu::avx512 {

void rms_norm(const float* x, const float* weight, std::size_t size, float epsilon, float* out) noexcept {
  rms_norm_over<Vector16>(x, weight, size, epsilon, out);
}

void layer_norm(const float* x, const float* weight, const float* bias, std::size_t size, float epsilon,
                float* out) noexcept {
  layer_norm_over<Vector16>(x, weight, bias, size, epsilon, out);
}

void rotate_positions(float* x, std::size_t size, const float* cosines, const float* sines) noexcept {
  rotate_positions_over<Vector16>(x, size, cosines, sines);
}

void add(float* x, const float* y, std::size_t size) noexcept {
  add_over<Vector16>(x, y, size);
}

}  // namespace rts::cpu::avx512
