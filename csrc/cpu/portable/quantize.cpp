#include "cpu/instruction_sets.hpp"
#include "cpu/quantize_rows.hpp"

namespace rts::cpu::portable {

void quantize(const float* values, std::size_t columns, std::size_t stride, std::size_t rows, const QuantizedRows& out,
              std::size_t first_row) noexcept {
  quantize_rows(values, columns, stride, rows, out, first_row);
}

}  // namespace rts::cpu::portable
