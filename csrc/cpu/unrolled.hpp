#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

namespace rts::cpu {

// work(0), work(1), ... with numbers known when compiled. GCC 12 keeps an array in registers only where its indices are
// constants before it looks at loops: of a plain loop over a tile's sums it stores them all in every turn.
template <std::size_t kCount, typename Work>
__attribute__((always_inline)) inline void unrolled(Work work) {
  [&]<std::size_t... kIndices>(std::index_sequence<kIndices...>) __attribute__((always_inline)) {
    (work(std::integral_constant<std::size_t, kIndices>()), ...);
  }(std::make_index_sequence<kCount>());
}

}  // namespace rts::cpu
