#include "cpu/avx2/integers16.hpp"
#include "cpu/avx2/vector16.hpp"
#include "cpu/float_attention.hpp"
#include "cpu/instruction_sets.hpp"
#include "cpu/int8_attention.hpp"
#include "cpu/kv_store.hpp"

namespace rts::cpu::avx2 {

void store_kv(const AttentionShape& shape, const KvLayer& cache, std::int64_t slot, const float* key,
              const float* value) noexcept {
  store_position<Vector16>(shape, cache, slot, key, value);
}

void attend(const AttentionShape& shape, const KvLayer& cache, const AttentionTask& task) noexcept {
  FloatAttention<Vector16, std::uint16_t>(shape, cache, task).run();
}

void store_kv_float(const AttentionShape& shape, const KvLayerFloat& cache, std::int64_t slot, const float* key,
                    const float* value) noexcept {
  store_position<Vector16>(shape, cache, slot, key, value);
}

void attend_float(const AttentionShape& shape, const KvLayerFloat& cache, const AttentionTask& task) noexcept {
  FloatAttention<Vector16, float>(shape, cache, task).run();
}

void store_kv_int8(const AttentionShape& shape, const KvLayerInt8& cache, std::int64_t slot, const float* key,
                   const float* value) noexcept {
  store_position<Vector16>(shape, cache, slot, key, value);
}

void attend_int8(const AttentionShape& shape, const KvLayerInt8& cache, const AttentionTask& task) noexcept {
  Int8Attention<Vector16, Integers16>(shape, cache, task).run();
}

}  // namespace rts::cpu::avx2
