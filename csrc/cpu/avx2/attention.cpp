#include "cpu/attention_kernel.hpp"
#include "cpu/avx2/vector16.hpp"
#include "cpu/instruction_sets.hpp"
#include "cpu/kv_store.hpp"

namespace rts::cpu::avx2 {

void store_kv(const AttentionShape& shape, const KvLayer& cache, std::int64_t slot, const float* key,
              const float* value) noexcept {
  store_position<Vector16>(shape, cache, slot, key, value);
}

void attend(const AttentionShape& shape, const KvLayer& cache, const AttentionTask& task) noexcept {
  Attention<Vector16, std::uint16_t>(shape, cache, task).run();
}

void store_kv_float(const AttentionShape& shape, const KvLayerFloat& cache, std::int64_t slot, const float* key,
                    const float* value) noexcept {
  store_position<Vector16>(shape, cache, slot, key, value);
}

void attend_float(const AttentionShape& shape, const KvLayerFloat& cache, const AttentionTask& task) noexcept {
  Attention<Vector16, float>(shape, cache, task).run();
}

}  // namespace rts::cpu::avx2
